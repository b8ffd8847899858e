"""How the searcher of a payload is filled, and how its kind, its lists and its setting are chosen by measurement.

Kinds and numbers of lists are compared on a part of whole articles, at most 50,000 rows; the setting is then measured
on all rows. Of several numbers of lists that one is taken whose search reads the fewest bytes at the wanted recall, so
that a seed always gives the same; only the kind that "auto" takes depends on time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastlvm.errors import InputError
from fastlvm.retrieval.kinds import KINDS
from fastlvm.retrieval.measure import Point, Trial
from fastlvm.retrieval.searcher import Searcher
from fastlvm.retrieval.vectors import Vectors

MEASURED_FROM = 10_000
"""Vectors from which "auto" measures; below, every kind is quick and it takes flat."""

RECALL = 0.95
"""Recall@50 against exact search that a setting is chosen for."""

QUERIES = 512
"""Queries that recall is measured on; of more that are given, a seeded draw of as many."""

PART = 50_000
"""Most vectors that kinds and numbers of lists are compared on."""

_MULTIPLES = (4, 8, 16)  # lists by the square root of rows
_ROWS_PER_LIST = 16  # at least


class Built(NamedTuple):
    """A searcher left at its setting, what was measured there (None where it is exact), and all that was tried."""

    kind: str
    searcher: Searcher
    nlist: int | None
    point: Point | None
    curve: list[Point]

    @property
    def ms(self) -> float:
        return 0.0 if self.point is None else self.point.ms

    @property
    def recall(self) -> float:
        return 1.0 if self.point is None or self.searcher.SETTING is None else self.point.recall_at_50


def build(
    vectors: Vectors,
    kind: str,
    *,
    nlist: int | None = None,
    nprobe: int | None = None,
    wanted: float = RECALL,
    queries: np.ndarray | None = None,
    seed: int = 0,
) -> Built:
    """A searcher of that kind, or of the quickest for "auto", at the smallest setting of the wanted recall.

    Raises InputError where nlist or nprobe do not fit the kind, or where it does not reach that recall.
    """
    nlist, nprobe = _options(kind, nlist, nprobe, len(vectors))
    if kind == "auto" and len(vectors) < MEASURED_FROM:
        kind = "flat"
    choice = _Choice(vectors, wanted, queries, seed)
    if kind == "auto":
        return choice.quickest()
    if KINDS[kind].SETTING is None:
        return Built(kind, KINDS[kind].build(vectors, None, seed), None, None, [])
    if nprobe is not None:
        return choice.probing(kind, nlist, nprobe)
    built = choice.of(kind) if nlist is None else choice.tuned(kind, choice.trial(vectors), [nlist])
    if built.recall < wanted:
        raise InputError(
            f"recall is {wanted:g}, and kind {kind} reaches {built.recall:.4f} on these queries: ask for less, or for "
            "another kind"
        )
    return built


def list_numbers(rows: int) -> list[int]:
    """Powers of two around 4, 8 and 16·√rows that leave at least 16 rows a list, or 1 list."""
    bounds = [max(1, int(min(multiple * rows**0.5, rows / _ROWS_PER_LIST))) for multiple in _MULTIPLES]
    return [1 << (bound.bit_length() - 1) for bound in bounds]


def _options(kind: str, nlist: Any, nprobe: Any, rows: int) -> tuple[int | None, int | None]:
    if kind == "auto" or not KINDS[kind].LISTS:
        if nlist is not None or nprobe is not None:
            lists = " or ".join(name for name, one in KINDS.items() if one.LISTS)
            raise InputError(f"nlist and nprobe belong to kind {lists}: leave them out, or ask for that kind")
        return None, None
    nlist = None if nlist is None else _option("nlist", nlist, rows)
    return nlist, None if nprobe is None else _option("nprobe", nprobe, nlist or rows)


def _option(name: str, value: Any, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= most:
        raise InputError(f"{name} is {value!r}, and an integer from 1 to {most} is wanted")
    return int(value)


@dataclass(frozen=True)
class _Choice:
    """Kinds and lists for some vectors, compared on a part of them."""

    vectors: Vectors
    wanted: float
    queries: np.ndarray | None
    seed: int

    @functools.cached_property
    def part(self) -> Vectors:
        return self.vectors.part(PART, self.seed)

    def of(self, kind: str) -> Built:
        """All vectors in the number of lists that is best on a part of them."""
        numbers = _numbers(kind, self.vectors)
        if len(set(numbers)) == 1 or self.part is self.vectors:
            return self.tuned(kind, self.trial(self.vectors), numbers)
        chosen = self.tuned(kind, self.trial(self.part), _numbers(kind, self.part))
        return self.on_all(kind, chosen.nlist, chosen.curve)

    def quickest(self) -> Built:
        """The kind of the quickest single query at the wanted recall."""
        trial = self.trial(self.part)
        good: list[tuple[float, str, int | None]] = []
        best: Built | None = None  # the others make room
        for kind in KINDS:
            built = self.tuned(kind, trial, _numbers(kind, self.part))
            if built.recall >= self.wanted:
                good.append((built.ms, kind, built.nlist))
                best = built if best is None or built.ms < best.ms else best
        assert best is not None  # flat is exact
        if self.part is self.vectors:
            return best
        for _, kind, nlist in sorted(good):  # the first, unless a kind that sufficed for the part does not for all
            best = self.on_all(kind, nlist, trial.points)
            if best.recall >= self.wanted:
                break
        return best

    def probing(self, kind: str, nlist: int | None, nprobe: int) -> Built:
        """A searcher that probes as many lists as was asked for; its recall is what it is."""
        if nlist is None:
            nlist = self.of(kind).nlist
            assert nlist is not None
            _option("nprobe", nprobe, nlist)
        trial = self.trial(self.vectors)
        searcher = KINDS[kind].build(self.vectors, nlist, self.seed)
        return Built(kind, searcher, nlist, trial.point(kind, nlist, searcher, nprobe), trial.points)

    def on_all(self, kind: str, nlist: int | None, curve: list[Point]) -> Built:
        """What was chosen on a part, built of all vectors; its curve goes on from the part's."""
        if nlist is not None:
            nlist = _numbers(kind, self.vectors)[_numbers(kind, self.part).index(nlist)]
        built = self.tuned(kind, self.trial(self.vectors), [nlist])
        return built._replace(curve=curve + built.curve)

    def tuned(self, kind: str, trial: Trial, numbers: Sequence[int | None]) -> Built:
        """The best of some numbers of lists: it reaches the recall and, of those that do, reads the fewest bytes."""
        best: tuple[tuple[float, float], Built] | None = None
        for nlist in dict.fromkeys(numbers):
            searcher = KINDS[kind].build(trial.vectors, nlist, self.seed)
            if searcher.SETTING is None:
                point = trial.point(kind, nlist, searcher, None)
            else:
                point = trial.smallest(kind, nlist, searcher, self.wanted)
            built = Built(kind, searcher, nlist, point, trial.points)
            rank = max(0.0, self.wanted - built.recall), searcher.reads(trial.queries) if searcher.LISTS else 0.0
            if best is None or rank < best[0]:
                best = rank, built
        assert best is not None
        return best[1]

    def trial(self, vectors: Vectors) -> Trial:
        queries = self.queries
        if queries is None:
            queries = vectors.windows(QUERIES, self.seed)
        elif len(queries) > QUERIES:
            chosen = np.random.default_rng(self.seed).choice(len(queries), QUERIES, replace=False)
            queries = queries[np.sort(chosen)]
        return Trial(vectors, queries)


def _numbers(kind: str, vectors: Vectors) -> list[int | None]:
    return [*list_numbers(len(vectors))] if KINDS[kind].LISTS else [None]
