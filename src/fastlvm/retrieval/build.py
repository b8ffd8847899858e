"""How the FAISS index of a payload is filled, and how the number of lists and of probes is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fastlvm.data import Payload, Space
from fastlvm.errors import InputError

FLAT_BELOW = 50_000
"""Payload rows from which "auto" takes inverted lists."""

RECALL = 0.95
"""Recall@50 against exact search that nprobe is chosen for."""

_BLOCK = 8192
_SAMPLE_QUERIES = 256
_NEIGHBOURS = 50
_ROWS_PER_LIST = 39  # FAISS's own minimum of training rows per centroid


class Built(NamedTuple):
    index: Any
    nlist: int | None = None
    nprobe: int | None = None
    recall: float | None = None


def representatives(groups: np.ndarray) -> np.ndarray:
    """The smallest row of every duplicate group, ascending, int64."""
    return np.flatnonzero(groups == np.arange(len(groups)))


def flat(payload: Payload, space: Space, groups: np.ndarray) -> Built:
    """Exact search."""
    import faiss

    index = faiss.IndexFlatIP(payload.dim)
    for _, block in _blocks(payload, space, representatives(groups)):
        index.add(block)
    return Built(index)


def ivf_flat(
    payload: Payload, space: Space, groups: np.ndarray, *, nlist: int | None, nprobe: int | None, seed: int
) -> Built:
    """Inverted lists, their centroids trained on a seeded sample of 39 rows a list."""
    import faiss

    rows = representatives(groups)
    nlist = _option("nlist", default_nlist(len(rows)) if nlist is None else nlist, len(rows))
    if nprobe is not None:
        _option("nprobe", nprobe, nlist)
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.choice(rows, min(len(rows), _ROWS_PER_LIST * nlist), replace=False))
    queries = _sample_queries(payload, space, rows, rng)

    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(payload.dim), payload.dim, nlist, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = int(seed) % (1 << 31)
    index.cp.min_points_per_centroid = 1  # small indexes are asked for by name; FAISS would warn on stderr
    index.train(np.concatenate([block for _, block in _blocks(payload, space, sample)]))
    nearest = _Nearest(len(queries), min(_NEIGHBOURS, len(rows)))
    for first, block in _blocks(payload, space, rows):
        index.add(block)
        nearest.add(queries @ block.T, first)
    if nprobe is None:
        nprobe = _smallest_nprobe(index, queries, nearest.ids)
    return Built(index, nlist, int(nprobe), _recall(index, queries, nearest.ids, int(nprobe)))


def default_nlist(rows: int) -> int:
    """The largest power of two ≤ 4·√rows that leaves at least 39 rows a list (584,545 rows: 2,048)."""
    bound = max(1, int(min(4 * rows**0.5, rows / _ROWS_PER_LIST)))
    return 1 << (bound.bit_length() - 1)


def _option(name: str, value: Any, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= most:
        raise InputError(f"{name} is {value!r}, and an integer from 1 to {most} is wanted")
    return int(value)


def _blocks(payload: Payload, space: Space, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first position, vectors in the space) of consecutive pieces of `rows`."""
    for first in range(0, len(rows), _BLOCK):
        block = space.apply(payload.take(rows[first : first + _BLOCK]))
        yield first, np.ascontiguousarray(block, dtype=np.float32)


def _sample_queries(payload: Payload, space: Space, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indexed vectors themselves: harder than predictions, whose averages lie nearer to the centroids. [q, dim]"""
    chosen = np.sort(rng.choice(rows, min(_SAMPLE_QUERIES, len(rows)), replace=False))
    return np.ascontiguousarray(space.apply(payload.take(chosen)), dtype=np.float32)


class _Nearest:
    """The exact nearest neighbours of some queries, gathered block by block."""

    def __init__(self, queries: int, count: int) -> None:
        self.count = count
        self.ids = np.empty((queries, 0), np.int64)
        self.scores = np.empty((queries, 0), np.float32)

    def add(self, scores: np.ndarray, first: int) -> None:
        ids = np.broadcast_to(np.arange(first, first + scores.shape[1]), scores.shape)
        ids = np.concatenate([self.ids, ids], axis=1)
        scores = np.concatenate([self.scores, scores], axis=1)
        if scores.shape[1] > self.count:
            best = np.argpartition(-scores, self.count - 1, axis=1)[:, : self.count]
            ids, scores = np.take_along_axis(ids, best, axis=1), np.take_along_axis(scores, best, axis=1)
        self.ids, self.scores = ids, scores


def _recall(index: Any, queries: np.ndarray, truth: np.ndarray, nprobe: int) -> float:
    """Share of the exact neighbours found with nprobe lists; leaves the index set to it."""
    index.nprobe = nprobe
    _, found = index.search(queries, truth.shape[1])
    hits = sum(len(np.intersect1d(f, t, assume_unique=False)) for f, t in zip(found, truth, strict=True))
    return hits / truth.size


def _smallest_nprobe(index: Any, queries: np.ndarray, truth: np.ndarray) -> int:
    """Smallest nprobe of recall ≥ 0.95. Lists probed are nested, so recall grows with it: double, then halve."""
    high = 1
    while high < index.nlist and _recall(index, queries, truth, high) < RECALL:
        high = min(2 * high, index.nlist)
    low = high // 2  # does not reach it (0 when high is 1)
    while high - low > 1:
        middle = (low + high) // 2
        if _recall(index, queries, truth, middle) < RECALL:
            low = middle
        else:
            high = middle
    return high
