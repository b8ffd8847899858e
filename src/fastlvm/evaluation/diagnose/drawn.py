"""The windows of a file that a diagnosis looks at, and where each of their vectors is in the payload."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastlvm.data import Payload
from fastlvm.data.held import HeldWindows
from fastlvm.data.rows import blocks, normalised, norms
from fastlvm.data.split import ALIASES, SPLITS
from fastlvm.errors import InputError

_POOL, _QUERIES = 8192, 1024


@dataclass(frozen=True)
class Drawn:
    """Windows drawn from a file.

    index int64 [m]: their places in it, rising; asked bool [m]: of the split that was asked for, else of another;
    vectors float32 [m, L + 1, dim]: of length 1, target last, 0 where a window is `broken`; lengths float64 [m, L + 1]:
    what they had; broken bool [m]: a vector is NaN, infinite or zero; keys int64 [m, 2] or None.
    """

    index: np.ndarray
    asked: np.ndarray
    vectors: np.ndarray
    lengths: np.ndarray
    broken: np.ndarray
    keys: np.ndarray | None


def draw(held: HeldWindows, split: str, sample: int, seed: int) -> Drawn:
    """Up to `sample` windows of a split and as many of the others, in both cases a seeded draw.

    Of a file without splits all are of the one that is asked for. Raises InputError where it has none.
    """
    if isinstance(sample, bool) or sample < 1:
        raise InputError(f"sample is {sample}, and a number of windows from 1 is wanted")
    of_split = split_mask(held, split)
    rng = np.random.default_rng(seed)
    asked, others = (_some(np.flatnonzero(mask), sample, rng) for mask in (of_split, ~of_split))
    if not len(asked):
        raise InputError(f"{held.path} has no window in split {split!r}: name another one with --split")
    index = np.sort(np.concatenate([asked, others]))
    found = held.take(index)
    flat = found.reshape(-1, held.dim)
    lengths = norms(flat).reshape(found.shape[:2])
    broken = ~(np.isfinite(lengths) & (lengths > 0)).all(axis=1)
    found[broken] = 0
    for part in blocks(*flat.shape):
        flat[part] = normalised(flat[part])
    keys = None if held.keys is None else held.keys[index]
    return Drawn(index, of_split[index], found, lengths, broken, keys)


def split_mask(held: HeldWindows, split: str) -> np.ndarray:
    """Which windows of a file are of a split, bool [count]; all where it has no splits."""
    name = ALIASES.get(split, split)
    if name not in SPLITS:
        raise InputError(f"split is {split!r}, and wants one of {', '.join(SPLITS)}")
    if held.split is None:
        return np.ones(held.count, bool)
    return held.split == SPLITS.index(name)


def _some(places: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    return places if len(places) <= most else rng.choice(places, most, replace=False)


def nearest(queries: np.ndarray, payload: Payload, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Nearest payload row of each query float32 [q, dim] of length 1: int64 [q], and its cosine, float32 [q].

    rows int64 [r]: look among these alone, r ≥ 1. Exact; of equal rows the first. One block of scores at a time.
    """
    where = np.arange(len(payload)) if rows is None else rows
    found = np.full(len(queries), where[0], np.int64)
    best = np.full(len(queries), -np.inf, np.float32)
    for start in range(0, len(where), _POOL):
        some = where[start : start + _POOL]
        pool = normalised(payload.take(some))
        for first in range(0, len(queries), _QUERIES):
            part = slice(first, first + _QUERIES)
            scores = queries[part] @ pool.T  # [q, b]
            at = scores.argmax(axis=1)
            value = scores[np.arange(len(scores)), at]
            higher = value > best[part]
            found[part][higher] = some[at[higher]]
            best[part][higher] = value[higher]
    return found, best
