"""Checks and arithmetic over the rows of a table of vectors, in blocks so that a table may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastlvm.errors import InputError

_BLOCK_BYTES = 1 << 25
_INT32_MAX = np.iinfo(np.int32).max

TOLERANCE = {"float16": 1e-3, "float32": 1e-5, "float64": 1e-5}
"""Distance from 1 within which a row's norm is what rounding to the dtype leaves of a unit vector."""


def blocks(rows: int, dim: int) -> Iterator[slice]:
    """Slices over `rows` whose float64 copy stays around 32 MB."""
    step = max(1, _BLOCK_BYTES // (8 * max(dim, 1)))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def check_vectors(vectors: Any) -> np.ndarray:
    """`vectors` as a two-dimensional floating array, not copied. Raises InputError."""
    array = vectors if isinstance(vectors, np.ndarray) else np.asarray(vectors)
    if array.dtype.name not in TOLERANCE:
        raise InputError(f"vectors have dtype {array.dtype}, and want float16, float32 or float64")
    if array.ndim != 2:
        raise InputError(f"vectors have shape {array.shape}, and want [rows, dim]")
    if 0 in array.shape:
        raise InputError(f"vectors have shape {array.shape}: there is nothing to store")
    return array.view(np.ndarray)


def check_keys(keys: Any, rows: int) -> np.ndarray:
    """`keys` as int32 [rows, 2] (article, chunk). Raises InputError naming the first row that is wrong."""
    array = keys if isinstance(keys, np.ndarray) else np.asarray(keys)
    if array.dtype.kind not in "iu":
        raise InputError(f"keys have dtype {array.dtype}, and want integers (article, chunk)")
    if array.ndim != 2 or array.shape[1] != 2:
        raise InputError(f"keys have shape {array.shape}, and want [rows, 2]: article, chunk")
    if len(array) != rows:
        raise InputError(f"there are {len(array)} keys for {rows} vectors: one key a vector is wanted")
    wrong = ((array < 0) | (array > _INT32_MAX)).any(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(
            f"keys row {row} is ({array[row, 0]}, {array[row, 1]}), and articles and chunks go from 0 to {_INT32_MAX}"
        )
    return np.ascontiguousarray(array, dtype=np.int32)


def norms(vectors: np.ndarray) -> np.ndarray:
    """Euclidean norm of every row, float64 [N]; a row that holds NaN or infinity has a norm that is not finite."""
    result = np.empty(len(vectors))
    for part in blocks(*vectors.shape):
        block = vectors[part].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            result[part] = np.sqrt(np.einsum("nd,nd->n", block, block))
    return result


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Rows [..., dim] at length 1, float32; a zero row stays zero."""
    block = np.array(vectors, dtype=np.float32)
    length = np.sqrt(np.einsum("...d,...d->...", block, block))[..., None]
    return np.divide(block, length, out=block, where=length > 0)


def codes(keys: np.ndarray) -> np.ndarray:
    """Keys [n, 2] as one int64 [n] each, in the same order."""
    wide = np.asarray(keys, dtype=np.int64)
    return (wide[..., 0] << 32) | wide[..., 1]


def duplicate_groups(vectors: np.ndarray) -> np.ndarray:
    """Smallest row with the same vector, for every row: int64 [N].

    Rows are told apart by a 64-bit hash, and rows whose hashes agree by their values.
    """
    count, dim = vectors.shape
    factors = np.random.default_rng(0).integers(1, 2**63, size=dim, dtype=np.uint64) | np.uint64(1)
    hashes = np.empty(count, np.uint64)
    for part in blocks(count, dim):
        bits = _bits(vectors[part]).astype(np.uint64)
        hashes[part] = (bits * factors).sum(axis=1, dtype=np.uint64)  # wraps
    groups = np.arange(count)
    order = np.argsort(hashes, kind="stable")
    same = hashes[order[1:]] == hashes[order[:-1]]
    twin = np.zeros(count, bool)
    twin[1:] |= same
    twin[:-1] |= same
    first: dict[bytes, int] = {}
    for row in np.sort(order[twin]):
        groups[row] = first.setdefault(_bits(vectors[row : row + 1]).tobytes(), int(row))
    return groups


def _bits(block: np.ndarray) -> np.ndarray:
    """Bit patterns of floats; the two zeros have one."""
    zeroed = np.ascontiguousarray(block) + block.dtype.type(0)
    return zeroed.view(f"u{zeroed.dtype.itemsize}")
