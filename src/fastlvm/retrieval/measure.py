"""What a searcher finds of the exact neighbours and how long it takes, and the setting that this makes right."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastlvm.retrieval.searcher import NEIGHBOURS, Searcher
from fastlvm.retrieval.vectors import Vectors

_TIES, _TIE = 14, 1e-5  # how many may tie with the 50th neighbour, and by what share of its score
_WARMUP, _CALLS, _SECONDS = 5, 200, 0.5  # calls timed for a median, fewer where they take longer than that together


class Point(NamedTuple):
    """A searcher of `rows` vectors at one setting: its recall@50, and the median milliseconds of a single query."""

    kind: str
    rows: int
    nlist: int | None
    nprobe: int | None
    ef_search: int | None
    recall_at_50: float
    ms: float


class Trial:
    """Queries with their exact neighbours, and the points of all that was tried on them."""

    def __init__(self, vectors: Vectors, queries: np.ndarray) -> None:
        self.vectors = vectors
        self.queries = queries
        self.points: list[Point] = []
        self._truth = nearest(vectors, queries)

    def point(self, kind: str, nlist: int | None, searcher: Searcher, setting: int | None) -> Point:
        """The searcher at a setting, which it is left with."""
        if setting is not None:
            searcher.setting = setting
        given: dict[str, Any] = dict.fromkeys(("nprobe", "ef_search"))
        if searcher.SETTING is not None:
            given[searcher.SETTING] = setting
        found = recall(searcher, self.queries, self._truth)
        ms = _median(searcher, self.queries, min(NEIGHBOURS, len(self.vectors)))
        point = Point(kind, len(self.vectors), nlist, **given, recall_at_50=found, ms=ms)
        self.points.append(point)
        return point

    def smallest(self, kind: str, nlist: int | None, searcher: Searcher, wanted: float) -> Point:
        """The point of the smallest setting of that recall, or of the greatest setting where none reaches it."""
        tried: dict[int, Point] = {}

        def recall_of(setting: int) -> float:
            tried[setting] = self.point(kind, nlist, searcher, setting)
            return tried[setting].recall_at_50

        setting = smallest_setting(searcher.bounds, recall_of, wanted)
        searcher.setting = setting
        return tried[setting] if setting in tried else self.point(kind, nlist, searcher, setting)


def smallest_setting(bounds: tuple[int, int], recall_of: Callable[[int], float], wanted: float) -> int:
    """The smallest setting of that recall, or the greatest. More is found with a greater one: double, then halve."""
    high, most = bounds
    low = high - 1  # does not reach it
    while high < most and recall_of(high) < wanted:
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if recall_of(middle) < wanted:
            low = middle
        else:
            high = middle
    return high


def nearest(vectors: Vectors, queries: np.ndarray) -> np.ndarray:
    """Ids of the exact nearest neighbours, best first: int64 [q, m], with m ≥ 50 where there are as many.

    After the 50th stand those that float32 cannot tell from it, which are as right; -1 where there is none.
    """
    count = min(NEIGHBOURS + _TIES, len(vectors))
    best = np.empty((len(queries), 0), np.int64)
    scores = np.empty((len(queries), 0), np.float32)
    for first, block in vectors.blocks():
        ids = np.broadcast_to(np.arange(first, first + len(block)), (len(queries), len(block)))
        best, scores = np.concatenate([best, ids], axis=1), np.concatenate([scores, queries @ block.T], axis=1)
        if scores.shape[1] > count:
            kept = np.argpartition(-scores, count - 1, axis=1)[:, :count]
            best, scores = np.take_along_axis(best, kept, axis=1), np.take_along_axis(scores, kept, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    best, scores = np.take_along_axis(best, order, axis=1), np.take_along_axis(scores, order, axis=1)
    last = scores[:, min(NEIGHBOURS, count) - 1 :][:, :1]
    return np.where(scores >= last - _TIE * np.abs(last), best, -1)


def recall(searcher: Searcher, queries: np.ndarray, truth: np.ndarray) -> float:
    """Share of the 50 nearest that the searcher finds; truth is what `nearest` says."""
    k = min(NEIGHBOURS, truth.shape[1])
    _, found = searcher.search(queries, k)
    hits = (found[:, :, None] == truth[:, None, :]) & (found >= 0)[:, :, None]
    return float(hits.sum() / (k * len(queries)))


def _median(searcher: Searcher, queries: np.ndarray, k: int) -> float:
    """Milliseconds of a search for one query, a query a call."""
    times: list[float] = []
    for i in range(_WARMUP + _CALLS):
        query = queries[i % len(queries)][None]
        start = time.perf_counter()
        searcher.search(query, k)
        if i >= _WARMUP:
            times.append(time.perf_counter() - start)
        if sum(times) > _SECONDS:
            break
    return round(1e3 * float(np.median(times)), 4)
