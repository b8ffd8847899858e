"""Scores of many predictions with a block of the pool, each different vector's once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

_QUERY_BLOCK = 2048
_TOGETHER = 32  # combinations that one small product makes
_SPREAD = 128  # base rows that these may lie apart: with more, scoring the vectors themselves takes no longer


@dataclass(frozen=True)
class Combined:
    """Predictions `vectors` float32 [n, d] that are sums of the pool's own rows int64 [n, m], times weights [m].

    Their scores are the same sums of the rows' scores: neighbouring windows share rows, so this takes a tenth of what
    scoring the vectors does.
    """

    vectors: np.ndarray
    rows: np.ndarray
    weights: np.ndarray


class Scored(NamedTuple):
    """scores float32 [q, b]; entry i of the others, int64 [a], says that ranker[i] asks for query[i] row scores[i]."""

    scores: np.ndarray
    row: np.ndarray
    ranker: np.ndarray
    query: np.ndarray


class Scorer:
    """What is asked by rankers of n queries each. queries: float32 [n, d], or `Combined`; pool: what blocks are of."""

    def __init__(self, queries: Sequence[np.ndarray | Combined], pool: Any, block: int) -> None:
        plain = [(at, one) for at, one in enumerate(queries) if isinstance(one, np.ndarray)]
        sums = [(at, one) for at, one in enumerate(queries) if isinstance(one, Combined)]
        rows = np.unique(np.concatenate([one.rows.ravel() for _, one in sums])) if sums else np.empty(0, np.int64)
        batches: list[_Batch] = []
        for at, one in sums:
            own = _batches(at, one, np.searchsorted(rows, one.rows))
            if own is None:
                plain.append((at, one.vectors))
            else:
                batches += own
        self._asked = _Asked.of(plain)
        self._base = np.asarray(pool[rows], dtype=np.float32)
        self._parts = _parts(batches)
        most = [min(_QUERY_BLOCK, len(self._asked.vectors)), *(last - first for first, last, _ in self._parts)]
        self._room = np.empty((max(most), block), np.float32)
        self._sums = np.empty((_TOGETHER, block), np.float32)

    def score(self, block: np.ndarray) -> Iterator[Scored]:
        """With a block float32 [b, d] of the pool. A result is good until the next one is asked for."""
        for first in range(0, len(self._asked.vectors), _QUERY_BLOCK):
            some = self._asked.vectors[first : first + _QUERY_BLOCK]
            scores = np.matmul(some, block.T, out=self._room[: len(some), : len(block)])
            asked = self._asked.within(first, first + len(some))
            yield Scored(scores, asked.vector, asked.ranker, asked.query)
        for first, last, batches in self._parts:
            scores = np.matmul(self._base[first:last], block.T, out=self._room[: last - first, : len(block)])
            for batch in batches:
                own = scores[batch.first - first : batch.last - first]
                if batch.weights is None:
                    yield Scored(own, batch.rows, batch.ranker, batch.query)
                else:
                    sums = np.matmul(batch.weights, own, out=self._sums[: len(batch.query), : len(block)])
                    yield Scored(sums, np.arange(len(sums)), batch.ranker, batch.query)


@dataclass(frozen=True)
class _Batch:
    """Up to `_TOGETHER` queries of one ranker, of base rows [first, last): single `rows` of these, or sums with
    weights float32 [q, last - first].
    """

    first: int
    last: int
    rows: np.ndarray
    weights: np.ndarray | None
    ranker: np.ndarray
    query: np.ndarray


def _batches(ranker: int, one: Combined, places: np.ndarray) -> list[_Batch] | None:
    """Queries next to each other in the base, `places` [n, m] being theirs there; None where they lie too far apart."""
    order = np.argsort(places[:, 0], kind="stable")
    found = []
    for start in range(0, len(order), _TOGETHER):
        query = order[start : start + _TOGETHER]
        own = places[query]
        first, last = int(own.min()), int(own.max()) + 1
        if last - first > _SPREAD and own.shape[1] > 1:
            return None
        weights = None
        if own.shape[1] > 1 or one.weights[0] != 1:
            weights = np.zeros((len(query), last - first), np.float32)
            np.add.at(weights, (np.arange(len(query))[:, None], own - first), one.weights[None, :])
        found.append(_Batch(first, last, own[:, 0] - first, weights, np.full(len(query), ranker), query))
    return found


def _parts(batches: list[_Batch]) -> list[tuple[int, int, list[_Batch]]]:
    """Batches by the stretch of base rows, first and last, that is scored for them."""
    parts: dict[int, list[_Batch]] = {}
    for batch in batches:
        parts.setdefault(batch.first // _QUERY_BLOCK, []).append(batch)
    return [(min(batch.first for batch in some), max(batch.last for batch in some), some) for some in parts.values()]


@dataclass(frozen=True)
class _Asked:
    """Different vectors [m, d], and who asks for them: by ranker and query, sorted by vector."""

    vectors: np.ndarray
    vector: np.ndarray
    ranker: np.ndarray
    query: np.ndarray

    @classmethod
    def of(cls, queries: Sequence[tuple[int, np.ndarray]]) -> _Asked:
        place: dict[bytes, int] = {}
        vectors: list[np.ndarray] = []
        vector: list[int] = []
        for _, one in queries:
            for row in one:
                at = place.setdefault(hashlib.blake2b(row, digest_size=16).digest(), len(place))
                if at == len(vectors):
                    vectors.append(row)
                vector.append(at)
        if not vectors:
            return cls(np.empty((0, 0), np.float32), *(np.empty(0, np.int64) for _ in range(3)))
        of = np.asarray(vector, dtype=np.int64)
        order = np.argsort(of, kind="stable")
        ranker = np.repeat([at for at, _ in queries], [len(one) for _, one in queries])
        query = np.concatenate([np.arange(len(one)) for _, one in queries])
        return cls(np.stack(vectors), of[order], ranker[order], query[order])

    def within(self, first: int, last: int) -> _Asked:
        """What is asked of the vectors [first, last), with vectors counted from first."""
        a, b = np.searchsorted(self.vector, [first, last])
        return _Asked(self.vectors[first:last], self.vector[a:b] - first, self.ranker[a:b], self.query[a:b])
