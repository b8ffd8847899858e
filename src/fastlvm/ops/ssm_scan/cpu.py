"""The selective scan on the CPU: compiled kernels, forward and backward, for numpy arrays and torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlvm.ops import _arrays, _native
from fastlvm.ops._native import describe

__all__ = ["describe", "run", "scan_last", "supports"]


def supports(u: Any, *args: Any) -> tuple[bool, str]:
    return _native.supports(u)


def run(*args: Any) -> tuple[Any, Any]:
    """`args` end with whether the final state is wanted; if not, what stands in its place means nothing."""
    if _arrays.kind(args[0]) == "torch":
        from fastlvm.ops.ssm_scan import autograd

        return autograd.run(*args)
    aligned = [_native.aligned(a) for a in args]
    return _scan(np.empty_like(aligned[0], subok=False), *aligned)


def scan_last(*args: Any, outputs: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Outputs of the last tokens alone, [B, D, outputs] for 0 <= `outputs` <= L, and the final state [B, D, N] or None.

    `args` are those of `run`, aligned numpy arrays with no `cu_seqlens` among them; the extension checks them.

    Raises:
        ValueError: an array does not fit, or there are more outputs than tokens.
    """
    u = args[0]
    return _scan(np.empty_like(u, shape=(*u.shape[:2], outputs), subok=False), *args)


def _scan(out: np.ndarray, *args: Any) -> tuple[np.ndarray, np.ndarray | None]:
    from fastlvm import _C

    u, _, A, *_, cu_seqlens, return_final_state = args
    final_state = None
    if return_final_state:
        sequences = len(u) if cu_seqlens is None else len(cu_seqlens) - 1
        final_state = np.empty((sequences, *A.shape), np.float64 if u.dtype == np.float64 else np.float32)
    _C.ssm_scan(*args[:-2], out, final_state, cu_seqlens)
    return out, final_state
