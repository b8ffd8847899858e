"""One token of the causal convolution on the CPU: the compiled kernel, for numpy arrays and torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlvm.ops import _arrays, _native, _step
from fastlvm.ops._native import describe

__all__ = ["describe", "run", "supports"]


def supports(x: Any, *args: Any) -> tuple[bool, str]:
    return _native.supports(x)


def run(x: Any, state: Any, weight: Any, bias: Any, activation: str | None, state_indices: Any) -> Any:
    rest = (weight, bias, activation is not None, state_indices)
    if _arrays.kind(x) == "torch":
        from fastlvm.ops.causal_conv1d_step import custom_op

        return custom_op.run(x, state, *rest)
    return _run(_native.aligned(x), state, *(_native.aligned(a) for a in rest))


def _run(x: np.ndarray, state: np.ndarray, *rest: Any) -> np.ndarray:
    from fastlvm import _C

    out = np.empty_like(x, subok=False)
    _step.run_in_place("causal_conv1d_step", lambda held: _C.causal_conv1d_step(x, held, *rest, out), state)
    return out
