"""The selective scan on the CPU: compiled kernels, forward and backward, for numpy arrays and torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlvm.ops import _arrays, _native
from fastlvm.ops._native import describe

__all__ = ["describe", "run", "supports"]


def supports(u: Any, *args: Any) -> tuple[bool, str]:
    return _native.supports(u)


def run(*args: Any) -> tuple[Any, Any]:
    if _arrays.kind(args[0]) == "torch":
        from fastlvm.ops.ssm_scan import autograd

        return autograd.ssm_scan(*args)
    return _scan(*(_native.aligned(a) for a in args))


def _scan(u: np.ndarray, delta: np.ndarray, A: np.ndarray, *rest: Any) -> tuple[np.ndarray, np.ndarray]:
    from fastlvm import _C

    out = np.empty_like(u, subok=False)
    final_state = np.empty((*u.shape[:2], A.shape[1]), np.float64 if u.dtype == np.float64 else np.float32)
    _C.ssm_scan(u, delta, A, *rest, out, final_state)
    return out, final_state
