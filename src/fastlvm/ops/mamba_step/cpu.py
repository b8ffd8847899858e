"""One token of a Mamba block on the CPU: the compiled kernel, for numpy arrays and torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlvm.ops import _arrays, _native, _step
from fastlvm.ops._native import describe

__all__ = ["describe", "run", "supports"]


def supports(x: Any, *args: Any) -> tuple[bool, str]:
    return _native.supports(x)


def run(x: Any, conv_state: Any, ssm_state: Any, *args: Any) -> Any:
    if _arrays.kind(x) == "torch":
        from fastlvm.ops.mamba_step import custom_op

        return custom_op.run(x, conv_state, ssm_state, *args)
    return _run(conv_state, ssm_state, *(_native.aligned(a) for a in (x, *args)))


def _run(conv_state: np.ndarray, ssm_state: np.ndarray, x: np.ndarray, *rest: Any) -> np.ndarray:
    from fastlvm import _C

    out = np.empty_like(x, subok=False)

    def both(conv: np.ndarray) -> None:
        _step.run_in_place("mamba_step", lambda ssm: _C.mamba_step(x, conv, ssm, *rest, out), ssm_state, "ssm_state")

    _step.run_in_place("mamba_step", both, conv_state, "conv_state")
    return out
