"""The scan of Mamba-2 on the CPU: compiled kernels, forward and backward, for numpy arrays and torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlvm.ops import _arrays, _native
from fastlvm.ops._native import describe

__all__ = ["describe", "run", "supports"]


def supports(x: Any, *args: Any) -> tuple[bool, str]:
    return _native.supports(x)


def run(*args: Any) -> tuple[Any, Any]:
    if _arrays.kind(args[0]) == "torch":
        from fastlvm.ops.ssd_scan import autograd

        return autograd.run(*args)
    return _scan(*(_native.aligned(a) for a in args))


def _scan(x: np.ndarray, *args: Any) -> tuple[np.ndarray, np.ndarray | None]:
    from fastlvm import _C

    _, _, B, *_, cu_seqlens, return_final_state = args
    out, final_state = np.empty_like(x, subok=False), None
    if return_final_state:
        sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        dtype = np.float64 if x.dtype == np.float64 else np.float32
        final_state = np.empty((sequences, *x.shape[2:], B.shape[3]), dtype)
    _C.ssd_scan(x, *args[:-2], out, final_state, cu_seqlens)
    return out, final_state
