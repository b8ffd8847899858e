"""One token of the selective scan on the CPU: the compiled kernel, for numpy arrays and torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlvm.ops import _arrays, _native, _step
from fastlvm.ops._native import describe

__all__ = ["describe", "run", "supports"]


def supports(state: Any, *args: Any) -> tuple[bool, str]:
    return _native.supports(state)


def run(state: Any, x: Any, *args: Any) -> Any:
    if _arrays.kind(state) == "torch":
        from fastlvm.ops.ssm_step import custom_op

        return custom_op.run(state, x, *args)
    return _run(state, *(_native.aligned(a) for a in (x, *args)))


def _run(state: np.ndarray, x: np.ndarray, *rest: Any) -> np.ndarray:
    from fastlvm import _C

    out = np.empty_like(x, subok=False)
    _step.run_in_place("ssm_step", lambda held: _C.ssm_step(held, x, *rest, out), state)
    return out
