"""The causal convolution on the CPU: compiled kernels, forward and backward, for numpy arrays and torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlvm.ops import _arrays, _native
from fastlvm.ops._native import describe

__all__ = ["describe", "run", "supports"]


def supports(x: Any, *args: Any) -> tuple[bool, str]:
    return _native.supports(x)


def run(x: Any, weight: Any, bias: Any, activation: str | None, initial_state: Any, cu_seqlens: Any) -> tuple[Any, Any]:
    args = (x, weight, bias, activation is not None, initial_state, cu_seqlens)
    if _arrays.kind(x) == "torch":
        from fastlvm.ops.causal_conv1d import autograd

        return autograd.run(*args)
    return _conv(*(_native.aligned(a) for a in args))


def _conv(*args: Any) -> tuple[np.ndarray, np.ndarray]:
    from fastlvm import _C

    x, weight, *_, cu_seqlens = args
    out = np.empty_like(x, subok=False)
    sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
    final_state = np.empty((sequences, x.shape[1], weight.shape[1] - 1), x.dtype)
    _C.causal_conv1d(*args[:-1], out, final_state, cu_seqlens)
    return out, final_state
