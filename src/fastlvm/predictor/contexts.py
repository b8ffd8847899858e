"""What predictors of every device are asked and answer: contexts, checked, and what is found."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastlvm.errors import InputError

UNIT = 1e-3  # a length this far from 1 is float16 rounding, and kept


class Found(NamedTuple):
    """Best first: ids int64 [n, k] are payload rows, scores float32 [n, k], keys int32 [n, k, 2].

    For a single context without the n. Where fewer than k rows remain: id -1, score -inf, key (-1, -1).
    """

    ids: np.ndarray
    scores: np.ndarray
    keys: np.ndarray


def shaped(context: Any, positions: int, dim: int) -> np.ndarray:
    """The floats [n, positions, dim] or [positions, dim] that a context is; InputError for another shape or kind."""
    return floats(context, (2, 3), (positions, dim), f"[n, {positions}, {dim}] or [{positions}, {dim}]", "context")


def checked(context: Any, positions: int, dim: int) -> tuple[np.ndarray, bool]:
    """float32 [n, positions, dim] of unit vectors, and whether a single context was given.

    Raises InputError for another shape, and for a vector that is not finite or zero, naming it.
    """
    raw = shaped(context, positions, dim)
    return unit(raw, "context").reshape(-1, positions, dim), raw.ndim == 2


def floats(given: Any, ndims: tuple[int, ...], tail: tuple[int, ...], wanted: str, name: str) -> np.ndarray:
    """`given` as an array of floats whose last axes are `tail`."""
    try:
        raw = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(given).__name__
        raise InputError(f"{name} is a {kind} that is no array ({error}), and {wanted} is wanted") from error
    if not np.issubdtype(raw.dtype, np.floating):
        raise InputError(f"{name} is {raw.dtype}, and a float array {wanted} is wanted")
    if raw.ndim not in ndims or raw.shape[-len(tail) :] != tail:
        raise InputError(f"{name} has shape {list(raw.shape)}, and {wanted} is wanted")
    return raw


def unit(raw: np.ndarray, name: str) -> np.ndarray:
    """float32 [..., dim]: what has not length 1 is divided by its length. Raises InputError naming a vector without."""
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(raw, dtype=np.float32)
    squares = np.einsum("...d,...d->...", vectors, vectors, dtype=np.float64)
    if not np.isfinite(squares).all():
        at = _first(~np.isfinite(vectors).all(axis=-1))
        raise InputError(f"{name}{at} holds a value that is not finite in float32: mend that vector")
    if not squares.all():
        at = _first(np.equal(squares, 0))
        raise InputError(f"{name}{at} is all zeros, and an encoder's vector is wanted: leave that window out")
    lengths = np.sqrt(squares)
    off = np.abs(lengths - 1) > UNIT
    if off.any():
        scaled = (vectors / lengths[..., None]).astype(np.float32)
        vectors = np.where(off[..., None], scaled, vectors)
    return vectors


def _first(bad: Any) -> str:
    """Where the first true entry is, as an index into what the caller gave."""
    place = np.argwhere(bad)[0]
    return f"[{', '.join(map(str, place))}]" if place.size else ""
