"""The causal convolution on the CPU: compiled kernels, forward and backward, for numpy arrays and torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlvm.ops import _arrays, _native
from fastlvm.ops._native import describe

__all__ = ["describe", "run", "supports"]


def supports(x: Any, *args: Any) -> tuple[bool, str]:
    return _native.supports(x)


def run(x: Any, weight: Any, bias: Any, activation: str | None, initial_state: Any) -> tuple[Any, Any]:
    args = (x, weight, bias, activation is not None, initial_state)
    if _arrays.kind(x) == "torch":
        from fastlvm.ops.causal_conv1d import autograd

        return autograd.causal_conv1d(*args)
    return _conv(*(_native.aligned(a) for a in args))


def _conv(x: np.ndarray, weight: np.ndarray, *rest: Any) -> tuple[np.ndarray, np.ndarray]:
    from fastlvm import _C

    out = np.empty_like(x, subok=False)
    final_state = np.empty((*x.shape[:2], weight.shape[1] - 1), x.dtype)
    _C.causal_conv1d(x, weight, *rest, out, final_state)
    return out, final_state
