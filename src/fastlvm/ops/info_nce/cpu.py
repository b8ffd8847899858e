"""InfoNCE on the CPU: compiled kernels over tiles, forward and backward, for numpy arrays and torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlvm.ops import _arrays, _native
from fastlvm.ops._native import describe
from fastlvm.ops.info_nce.reference import split

__all__ = ["describe", "run", "supports"]


def supports(queries: Any, *args: Any) -> tuple[bool, str]:
    return _native.supports(queries)


def run(queries: Any, keys: Any, temperature: float, symmetric: bool, mask: Any, reduction: str) -> Any:
    args = (float(temperature), bool(symmetric), *split(mask))
    if _arrays.kind(queries) == "torch":
        from fastlvm.ops.info_nce import autograd

        return autograd.run(queries, keys, *args, reduction)
    return _loss(_native.aligned(queries), _native.aligned(keys), *args, reduction)


def _loss(queries: np.ndarray, keys: np.ndarray, *args: Any) -> Any:
    from fastlvm import _C

    temperature, symmetric, mask, query_labels, key_labels, reduction = args
    labels = [x if x is None else np.ascontiguousarray(x) for x in (query_labels, key_labels)]
    dtype = np.float64 if queries.dtype == np.float64 else np.float32
    single = reduction != "none"
    loss = np.empty(() if single else len(queries), dtype)
    outputs = (None, loss) if single else (loss, None)
    _C.info_nce(queries, keys, temperature, symmetric, mask, *labels, *outputs, None, None, None)
    if reduction == "mean":
        loss = loss / dtype(len(queries)) if len(queries) else np.full((), np.nan, dtype)
    return loss[()]
