"""What a searcher finds of the exact neighbours, and the setting that this makes right."""

from __future__ import annotations

import numpy as np

from fastlvm.retrieval.searcher import Searcher
from fastlvm.retrieval.vectors import Vectors

NEIGHBOURS = 50
"""How many neighbours recall is measured over."""


def nearest(vectors: Vectors, queries: np.ndarray) -> np.ndarray:
    """Ids of the exact nearest neighbours, in no order: int64 [q, 50], or all of them where there are fewer."""
    count = min(NEIGHBOURS, len(vectors))
    best = np.empty((len(queries), 0), np.int64)
    scores = np.empty((len(queries), 0), np.float32)
    for first, block in vectors.blocks():
        ids = np.broadcast_to(np.arange(first, first + len(block)), (len(queries), len(block)))
        best, scores = np.concatenate([best, ids], axis=1), np.concatenate([scores, queries @ block.T], axis=1)
        if scores.shape[1] > count:
            kept = np.argpartition(-scores, count - 1, axis=1)[:, :count]
            best, scores = np.take_along_axis(best, kept, axis=1), np.take_along_axis(scores, kept, axis=1)
    return best


def recall(searcher: Searcher, queries: np.ndarray, truth: np.ndarray, setting: int) -> float:
    """Share of the exact neighbours `truth` found with a setting, which the searcher is left with."""
    searcher.setting = setting
    _, found = searcher.search(queries, truth.shape[1])
    hits = sum(len(np.intersect1d(f, t)) for f, t in zip(found, truth, strict=True))
    return hits / truth.size


def smallest_setting(searcher: Searcher, queries: np.ndarray, truth: np.ndarray, wanted: float) -> int:
    """The smallest setting of that recall. More is found with a greater one: double, then halve."""
    low, most = searcher.bounds
    high, low = low, low - 1  # low does not reach it
    while high < most and recall(searcher, queries, truth, high) < wanted:
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if recall(searcher, queries, truth, middle) < wanted:
            low = middle
        else:
            high = middle
    return high
