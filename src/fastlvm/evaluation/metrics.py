"""Exact ranks of the true next chunk over a whole payload, the metrics made of them, and their bootstrap intervals.

The windows of one article share vectors and topic, so intervals come from resampling *articles*, not windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastlvm.errors import InputError

MISS = int(np.iinfo(np.int64).max)
"""Rank of a truth that cannot be retrieved, because its own duplicate group is excluded with the context."""

MEANS = ("R@1", "R@5", "R@10", "MRR@10", "Contain@50", "cosine")
"""Metrics that are means over windows, in the order of the columns of `outcomes`."""

METRICS = ("R@1", "R@5", "R@10", "MRR@10", "Contain@50", "Eff@5", "median_rank", "cosine")
"""All metrics, in the order they are reported."""

_POOL_BLOCK = 4096
_QUERY_BLOCK = 2048


class Ranks(NamedTuple):
    """Ranks of the truths, int64 [n] each: with the excluded groups left out, and with every group counted."""

    excluded: np.ndarray
    included: np.ndarray


def exact_ranks(
    predictions: np.ndarray,
    pool: Any,
    truth_rows: np.ndarray,
    exclude_rows: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Rank of each truth: 1 + #{groups v : p·v > p·truth}, int64 [n].

    predictions [n, d] float; pool [N, d], any array (memory-mapped too) whose slices are vectors in the same space;
    truth_rows int [n]; exclude_rows int [n, m] or None, -1 = none; groups int [N], the smallest row of each row's
    duplicate group (None: every row is its own).

    A duplicate group has one vote, that of its smallest row. Only strictly greater scores count. The truth's own group
    never counts against it. A truth whose group is among the excluded ones cannot be retrieved: its rank is `MISS`.

    Raises InputError for shapes that do not fit, rows out of range, and predictions that are NaN, infinite or zero (a
    zero vector scores every row alike, which would rank every truth first).
    """
    return rank_many([predictions], pool, truth_rows, exclude_rows, groups)[0].excluded


def rank_many(
    predictions: Sequence[np.ndarray],
    pool: Any,
    truth_rows: np.ndarray,
    exclude_rows: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> list[Ranks]:
    """`exact_ranks` of several rankers on the same queries, in one pass over the pool, with and without the exclusion.

    Memory: one block of the pool (4,096 rows) and one block of scores (2,048 × 4,096 floats) at a time.
    """
    rows, dim = _pool_shape(pool)
    truth = _rows_in_range("truth_rows", truth_rows, rows, lowest=0)
    if truth.ndim != 1:
        raise InputError(f"truth_rows has shape {truth.shape}, and one row per query [n] is wanted")
    queries = [checked_predictions(p, (len(truth), dim), f"predictions[{i}]") for i, p in enumerate(predictions)]
    group = _checked_groups(groups, rows)
    masked, unanswerable = _masked_entries(truth, exclude_rows, group)
    vectors = np.asarray(pool[truth], dtype=np.float32)
    truth_scores = [np.einsum("nd,nd->n", q, vectors) for q in queries]
    del vectors

    above = np.zeros((len(queries), len(truth)), np.int64)
    among_excluded = np.zeros_like(above)
    for start in range(0, rows, _POOL_BLOCK):
        stop = min(start + _POOL_BLOCK, rows)
        block = np.asarray(pool[start:stop], dtype=np.float32)
        silent = np.flatnonzero(group[start:stop] != np.arange(start, stop))  # not the smallest row of their group
        entries = masked.within(start, stop)
        for q, scores_of in enumerate(queries):
            _count_block(scores_of, block, truth_scores[q], silent, entries, above[q], among_excluded[q])

    result = []
    for all_above, excluded_above in zip(above, among_excluded, strict=True):
        ranks = 1 + all_above - excluded_above
        ranks[unanswerable] = MISS
        result.append(Ranks(ranks, 1 + all_above))
    return result


def _count_block(
    queries: np.ndarray,
    block: np.ndarray,
    truth_scores: np.ndarray,
    silent: np.ndarray,
    entries: _Entries,
    above: np.ndarray,
    among_excluded: np.ndarray,
) -> None:
    """Add, per query, how many groups of this block score above the truth, and how many of those are excluded ones."""
    for first in range(0, len(queries), _QUERY_BLOCK):
        last = min(first + _QUERY_BLOCK, len(queries))
        scores = queries[first:last] @ block.T  # [q, b]
        scores[:, silent] = -np.inf
        here = (entries.query >= first) & (entries.query < last)
        query, column, own = entries.query[here], entries.row[here], entries.own[here]
        scores[query[own] - first, column[own]] = -np.inf
        higher = scores > truth_scores[first:last, None]
        above[first:last] += [np.count_nonzero(row) for row in higher]  # much faster than with axis=1
        hit = higher[query - first, column]
        np.add.at(among_excluded, query[hit], 1)


@dataclass(frozen=True)
class _Entries:
    """(query, group) pairs to treat apart: the truth's own group (`own`), or a group excluded for that query."""

    row: np.ndarray
    query: np.ndarray
    own: np.ndarray

    def within(self, start: int, stop: int) -> _Entries:
        """The pairs whose group's row lies in [start, stop), with rows counted from start; `row` is sorted."""
        a, b = np.searchsorted(self.row, [start, stop])
        return _Entries(self.row[a:b] - start, self.query[a:b], self.own[a:b])


def _masked_entries(truth: np.ndarray, exclude_rows: Any, group: np.ndarray) -> tuple[_Entries, np.ndarray]:
    """The pairs sorted by row, each excluded group once per query, and which queries' truth is itself excluded."""
    n = len(truth)
    truth_group = group[truth]
    unanswerable = np.zeros(n, bool)
    row, query, own = truth_group, np.arange(n), np.ones(n, bool)
    if exclude_rows is not None:
        excluded = _rows_in_range("exclude_rows", exclude_rows, len(group), lowest=-1)
        if excluded.ndim != 2 or len(excluded) != n:
            raise InputError(f"exclude_rows has shape {excluded.shape}, and [n, m] with n = {n} queries is wanted")
        excluded_group = np.where(excluded >= 0, group[np.maximum(excluded, 0)], -1)
        unanswerable = (excluded_group == truth_group[:, None]).any(axis=1)
        pairs = np.stack([np.repeat(np.arange(n), excluded.shape[1]), excluded_group.ravel()], axis=1)
        pairs = pairs[(pairs[:, 1] >= 0) & (pairs[:, 1] != truth_group[pairs[:, 0]])]
        pairs = np.unique(pairs, axis=0)
        row = np.concatenate([row, pairs[:, 1]])
        query = np.concatenate([query, pairs[:, 0]])
        own = np.concatenate([own, np.zeros(len(pairs), bool)])
    order = np.argsort(row, kind="stable")
    return _Entries(row[order], query[order], own[order]), unanswerable


def cosines(predictions: np.ndarray, pool: Any, truth_rows: np.ndarray) -> np.ndarray:
    """Cosine of each prediction with its truth's vector in the same space, float64 [n]."""
    p = np.asarray(predictions, dtype=np.float64)
    t = np.asarray(pool[np.asarray(truth_rows)], dtype=np.float64)
    return np.einsum("nd,nd->n", p, t) / (np.linalg.norm(p, axis=1) * np.linalg.norm(t, axis=1))


def outcomes(ranks: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Per-window value of every metric of `MEANS`, float64 [n, 6]. A rank of `MISS` counts as a miss in all of them."""
    rank = np.asarray(ranks)
    return np.stack(
        [
            rank <= 1,
            rank <= 5,
            rank <= 10,
            np.where(rank <= 10, 1.0 / rank, 0.0),
            rank <= 50,
            np.asarray(cosine, dtype=np.float64),
        ],
        axis=1,
    ).astype(np.float64)


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval. None: undefined (0/0), unbounded (a median at `MISS`), or fewer than two articles."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}

    @classmethod
    def from_dict(cls, raw: Mapping[str, float | None]) -> Estimate:
        return cls(raw["value"], raw["low"], raw["high"])


class Bootstrap:
    """Resamples whole clusters (articles) with replacement, the same draws for every ranker: paired by construction.

    clusters int [n] names the article of each window. Percentile intervals; with fewer than about 20 articles they are
    somewhat too narrow, with fewer than two there is none.
    """

    def __init__(self, clusters: np.ndarray, *, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> None:
        clusters = np.asarray(clusters)
        if clusters.ndim != 1 or len(clusters) == 0:
            raise InputError(f"clusters has shape {clusters.shape}, and one article per window [n], n ≥ 1, is wanted")
        if resamples < 1 or not 0 < level < 1:
            raise InputError(f"resamples is {resamples} and level {level}: wanted are resamples ≥ 1 and 0 < level < 1")
        self.names, self.of_window = np.unique(clusters, return_inverse=True)
        count = len(self.names)
        rng = np.random.default_rng(seed)
        self.weights = rng.multinomial(count, np.full(count, 1.0 / count), size=resamples).astype(np.float64)  # [B, A]
        self.resamples, self.seed, self.level = resamples, seed, level

    def summarise(self, ranks: np.ndarray, cosine: np.ndarray) -> dict[str, Estimate]:
        """Every metric of `METRICS` with its interval."""
        values, draws = self._means(outcomes(ranks, cosine))
        result = {name: self._estimate(values[i], draws[:, i]) for i, name in enumerate(MEANS)}
        result["Eff@5"] = self._estimate(*_efficiency(values, draws))
        result["median_rank"] = self._median(ranks)
        return {name: result[name] for name in METRICS}

    def difference(
        self, ranks: np.ndarray, cosine: np.ndarray, other_ranks: np.ndarray, other_cosine: np.ndarray
    ) -> dict[str, Estimate]:
        """This ranker minus the other, on the same windows and the same draws, for all metrics but the median rank."""
        values, draws = self._means(outcomes(ranks, cosine))
        other_values, other_draws = self._means(outcomes(other_ranks, other_cosine))
        result = {
            name: self._estimate(values[i] - other_values[i], draws[:, i] - other_draws[:, i])
            for i, name in enumerate(MEANS)
        }
        value, draw = _efficiency(values, draws)
        other_value, other_draw = _efficiency(other_values, other_draws)
        result["Eff@5"] = self._estimate(value - other_value, draw - other_draw)
        return {name: result[name] for name in METRICS if name in result}

    def _means(self, outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means over windows [m], and the same in every resample [B, m]."""
        if len(outcome) != len(self.of_window):
            raise InputError(f"{len(outcome)} windows were ranked, and the clusters name {len(self.of_window)}")
        sums = np.stack([np.bincount(self.of_window, weights=column) for column in outcome.T], axis=1)  # [A, m]
        windows = np.bincount(self.of_window).astype(np.float64)
        return outcome.mean(axis=0), (self.weights @ sums) / (self.weights @ windows)[:, None]

    def _estimate(self, value: float, draws: np.ndarray) -> Estimate:
        known = draws[np.isfinite(draws)]
        if len(self.names) < 2 or len(known) == 0 or not math.isfinite(value):
            return Estimate(_finite(value))
        tail = (1 - self.level) / 2
        low, high = np.quantile(known, [tail, 1 - tail])
        return Estimate(float(value), float(low), float(high))

    def _median(self, ranks: np.ndarray) -> Estimate:
        """The smallest rank at or below which half the windows lie, so that `MISS` can be counted among them."""
        ranks = np.asarray(ranks)
        order = np.argsort(ranks, kind="stable")
        ordered, cluster = ranks[order], self.of_window[order]
        value = _rank_or_none(ordered[(len(ordered) - 1) // 2])
        if len(self.names) < 2:
            return Estimate(value)
        draws = np.empty(self.resamples, np.int64)
        step = max(1, 8_000_000 // len(ordered))
        for start in range(0, self.resamples, step):
            total = np.cumsum(self.weights[start : start + step][:, cluster], axis=1)
            draws[start : start + step] = ordered[np.argmax(2 * total >= total[:, -1:], axis=1)]
        draws.sort()
        tail = (1 - self.level) / 2
        last = self.resamples - 1
        low, high = draws[int(tail * last)], draws[math.ceil((1 - tail) * last)]
        return Estimate(value, _rank_or_none(low), _rank_or_none(high))


def _efficiency(values: np.ndarray, draws: np.ndarray) -> tuple[float, np.ndarray]:
    """Eff@5 = R@5 / Contain@50, NaN where nothing is contained."""
    five, contain = MEANS.index("R@5"), MEANS.index("Contain@50")
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.divide(values[five], values[contain])), draws[:, five] / draws[:, contain]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _rank_or_none(rank: Any) -> float | None:
    return None if int(rank) == MISS else float(rank)


def checked_predictions(predictions: Any, shape: tuple[int, int], name: str) -> np.ndarray:
    """Predictions as contiguous float32 [n, d], or an InputError that names the first bad row."""
    array = np.asarray(predictions)
    if array.shape != shape or not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{name} is {array.dtype} {list(array.shape)}, and floats of shape {list(shape)} are wanted")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    squares = np.einsum("nd,nd->n", array, array)
    if len(bad := np.flatnonzero(~np.isfinite(squares))):
        raise InputError(f"{name} row {bad[0]} holds NaN or an infinite value: a ranker has to predict finite vectors")
    if len(bad := np.flatnonzero(squares == 0)):
        raise InputError(f"{name} row {bad[0]} is zero, which scores every row alike: predict a direction")
    return array


def _pool_shape(pool: Any) -> tuple[int, int]:
    shape = tuple(pool.shape)
    if len(shape) != 2:
        raise InputError(f"pool has shape {shape}, and [N, d] is wanted")
    return int(shape[0]), int(shape[1])


def _rows_in_range(name: str, rows: Any, count: int, *, lowest: int) -> np.ndarray:
    array = np.asarray(rows)
    if array.size == 0:
        return array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} is {array.dtype}, and integer rows are wanted")
    array = array.astype(np.int64)
    if array.min() < lowest or array.max() >= count:
        raise InputError(f"{name} spans {array.min()} to {array.max()}: wanted are rows {lowest} to {count - 1}")
    return array


def _checked_groups(groups: Any, rows: int) -> np.ndarray:
    if groups is None:
        return np.arange(rows)
    group = _rows_in_range("groups", groups, rows, lowest=0)
    if group.shape != (rows,) or (group > np.arange(rows)).any() or (group[group] != group).any():
        raise InputError("groups does not name the smallest row of each row's duplicate group: take Payload.groups")
    return group
