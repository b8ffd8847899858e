"""Exact ranks of the true next chunk over a whole payload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastlvm.errors import InputError
from fastlvm.evaluation.scoring import Combined, Scored, Scorer

MISS = int(np.iinfo(np.int64).max)
"""Rank of a truth that cannot be retrieved, because its own duplicate group is excluded with the context."""

_POOL_BLOCK = 4096
_ROWS, _WORDS = 32, 128


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
    predictions: Sequence[np.ndarray | Combined],
    pool: Any,
    truth_rows: np.ndarray,
    exclude_rows: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    *,
    advance: Callable[[int], None] = lambda _: None,
    observe: Callable[[Block], None] = lambda _: None,
) -> list[Ranks]:
    """`exact_ranks` of several rankers on the same queries, in one pass over the pool, with and without the exclusion.

    A vector that is asked for more than once is scored once, and `Combined` predictions cost little. advance is called
    with the rows of the pool that are done, observe with every block of scores.

    Memory: one block of the pool (4,096 rows) and one block of scores (2,048 × 4,096 floats) at a time.
    """
    rows, dim = _pool_shape(pool)
    truth = _rows_in_range("truth_rows", truth_rows, rows, lowest=0)
    if truth.ndim != 1:
        raise InputError(f"truth_rows has shape {truth.shape}, and one row per query [n] is wanted")
    queries = [_checked(p, (len(truth), dim), f"predictions[{i}]") for i, p in enumerate(predictions)]
    group = _checked_groups(groups, rows)
    masked, unanswerable = _masked_entries(truth, exclude_rows, group)
    vectors = np.asarray(pool[truth], dtype=np.float32)
    truth_scores = np.stack([np.einsum("nd,nd->n", _vectors(q), vectors) for q in queries])  # [r, n]
    del vectors
    scorer = Scorer(queries, pool, _POOL_BLOCK)
    above = np.zeros(truth_scores.shape, np.int64)
    among_excluded = np.zeros_like(above)
    for start in range(0, rows, _POOL_BLOCK):
        stop = min(start + _POOL_BLOCK, rows)
        voting = np.flatnonzero(group[start:stop] == np.arange(start, stop))  # the smallest rows of their groups
        block = np.asarray(pool[start:stop], dtype=np.float32)
        entries = masked.within(start, stop, voting)
        for found in scorer.score(block if len(voting) == len(block) else block[voting]):
            _count(found, truth_scores, entries, above, among_excluded)
            observe(Block(found, start + voting, entries))
        advance(stop - start)

    result = []
    for all_above, excluded_above in zip(above, among_excluded, strict=True):
        ranks = 1 + all_above - excluded_above
        ranks[unanswerable] = MISS
        result.append(Ranks(ranks, 1 + all_above))
    return result


def _count(
    found: Scored, truth_scores: np.ndarray, entries: Entries, above: np.ndarray, among_excluded: np.ndarray
) -> None:
    """Add, per ranker and query, how many groups of this block score above the truth, and how many excluded ones do.

    The truth's own group is taken off again, as are, by the caller, the excluded ones.
    """
    limits = truth_scores[found.ranker, found.query]
    counts = _higher(found.scores, found.row, limits)
    above[found.ranker, found.query] += counts
    if not len(entries.row):
        return
    which, entry = entries.of(found.query)
    higher = found.scores[found.row[which], entries.row[entry]] > limits[which]
    ranker, query, own = found.ranker[which], found.query[which], entries.own[entry]
    np.subtract.at(above, (ranker[own & higher], query[own & higher]), 1)
    np.add.at(among_excluded, (ranker[~own & higher], query[~own & higher]), 1)


def _higher(scores: np.ndarray, rows: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """How many of scores[rows[i]] are above limits[i]: int64 [a].

    A few rows at a time, which stay in the cache; their flags are bytes of 0 and 1, added eight in a word, and not so
    many that a byte runs over.
    """
    width = scores.shape[1]
    flags = np.zeros((_ROWS, -(-width // _WORDS // 8) * _WORDS * 8), bool)
    counts = np.empty(len(limits), np.int64)
    in_order = len(rows) == len(scores) and bool((rows == np.arange(len(rows))).all())
    for start in range(0, len(limits), _ROWS):
        part = slice(start, min(start + _ROWS, len(limits)))
        some = scores[part] if in_order else scores[rows[part]]
        here = flags[: len(some)]
        np.greater(some, limits[part, None], out=here[:, :width])
        words = here.view(np.uint64).reshape(len(some), -1, _WORDS)
        counts[part] = np.add.reduce(words, axis=2).view(np.uint8).sum(axis=1, dtype=np.int64)
    return counts


@dataclass(frozen=True)
class Entries:
    """(query, group) pairs to treat apart: the truth's own group (`own`), or a group excluded for that query."""

    row: np.ndarray
    query: np.ndarray
    own: np.ndarray

    def within(self, start: int, stop: int, voting: np.ndarray | None = None) -> Entries:
        """Of pairs sorted by row those in [start, stop), sorted by query; rows are counted from start, or are places
        in start + `voting`."""
        a, b = np.searchsorted(self.row, [start, stop])
        order = np.argsort(self.query[a:b], kind="stable") + a
        row = self.row[order] - start
        return Entries(row if voting is None else np.searchsorted(voting, row), self.query[order], self.own[order])

    def of(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All (i, entry) with the entry's query queries[i], of what `within` gave."""
        first, last = (np.searchsorted(self.query, queries, side=side) for side in ("left", "right"))
        count = last - first
        which = np.repeat(np.arange(len(queries)), count)
        return which, np.arange(len(which)) - np.repeat(np.cumsum(count) - count - first, count)


class Block(NamedTuple):
    """Scores of some queries with some rows of the pool, int64 [b], one of every group; and the pairs among these."""

    found: Scored
    rows: np.ndarray
    entries: Entries


def _masked_entries(truth: np.ndarray, exclude_rows: Any, group: np.ndarray) -> tuple[Entries, np.ndarray]:
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
    return Entries(row[order], query[order], own[order]), unanswerable


def ranks_within(
    predictions: Sequence[np.ndarray | Combined],
    pool: Any,
    windows: np.ndarray,
    spans: np.ndarray,
    groups: np.ndarray,
) -> list[np.ndarray]:
    """Ranks of the targets of windows [n, L + 1] among the rows of their own article, the context left out: int64 [n].

    spans int [n, 2]: first row of the target's article and the one after its last. One array a ranker; a duplicate
    group has one vote in an article. A context row of another article is not in the way and is not left out.
    """
    result = [np.empty(len(windows), np.int64) for _ in predictions]
    order = np.argsort(spans[:, 0], kind="stable")
    for some in np.split(order, np.flatnonzero(np.diff(spans[order, 0])) + 1) if len(order) else []:
        first, last = (int(at) for at in spans[some[0]])
        own = windows[some] - first
        own = np.where((own >= 0) & (own < last - first), own, -1)
        _, smallest, group = np.unique(groups[first:last], return_index=True, return_inverse=True)
        vectors = np.asarray(pool[first:last], dtype=np.float32)
        found = rank_many([_vectors(p)[some] for p in predictions], vectors, own[:, -1], own[:, :-1], smallest[group])
        for ranks, one in zip(result, found, strict=True):
            ranks[some] = one.excluded
    return result


def cosines(predictions: np.ndarray, pool: Any, truth_rows: np.ndarray) -> np.ndarray:
    """Cosine of each prediction with its truth's vector in the same space, float64 [n]."""
    p = np.asarray(predictions, dtype=np.float64)
    t = np.asarray(pool[np.asarray(truth_rows)], dtype=np.float64)
    return np.einsum("nd,nd->n", p, t) / (np.linalg.norm(p, axis=1) * np.linalg.norm(t, axis=1))


def _checked(given: Any, shape: tuple[int, int], name: str) -> np.ndarray | Combined:
    if not isinstance(given, Combined):
        return checked_predictions(given, shape, name)
    return Combined(checked_predictions(given.vectors, shape, name), given.rows, given.weights)


def _vectors(query: np.ndarray | Combined) -> np.ndarray:
    return query.vectors if isinstance(query, Combined) else query


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
