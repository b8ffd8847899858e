"""What a search and a build are given, checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlvm.errors import InputError


def checked_queries(queries: Any, dim: int) -> np.ndarray:
    """float32 [n, dim], C-contiguous and finite."""
    array = np.asarray(queries)
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"queries is {array.dtype}, and a float array is wanted")
    if array.ndim not in (1, 2) or array.shape[-1] != dim:
        raise InputError(f"queries has shape {list(array.shape)}, and [n, {dim}] or [{dim}] is wanted")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array.reshape(-1, dim), dtype=np.float32)
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise InputError(f"queries row {row} holds a value that is not finite in float32: mend that query")
    return array


def checked_k(k: Any, name: str = "k") -> int:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise InputError(f"{name} is {k!r}, and an integer ≥ 1 is wanted")
    return int(k)


def checked_rows(given: Any, name: str, total: int) -> np.ndarray:
    """Ids of rows, -1 = none: int64."""
    array = np.asarray(given)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} is {array.dtype}, and integer ids of rows are wanted")
    if array.size and (array.min() < -1 or array.max() >= total):
        raise InputError(f"{name} spans {array.min()} to {array.max()}: wanted are rows -1 to {total - 1}")
    return array.astype(np.int64)


def checked_given(queries: Any, dim: int) -> np.ndarray:
    """Queries to measure with."""
    array = checked_queries(queries, dim)
    if not len(array):
        raise InputError("queries is empty: leave it out, or give some to measure recall with")
    if not array.any(axis=1).all():
        row = int(np.argmin(array.any(axis=1)))
        raise InputError(f"queries row {row} is all zeros, which is as near to every vector: leave that query out")
    return array


def checked_recall(recall: Any) -> float:
    number = isinstance(recall, (int, float, np.integer, np.floating)) and not isinstance(recall, bool)
    if not number or not 0 < recall <= 1:
        raise InputError(f"recall is {recall!r}, and a share above 0 and up to 1 is wanted")
    return float(recall)
