"""Rerankers: each puts the candidates of a search in another order, as one stage of `rerank.rerank`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from typing import ClassVar

import numpy as np

from fastlvm.errors import InputError, shown

NEAR = 0.02
"""A vector this near to another, of its length, is the same: in an index of a byte a component one is 0.01 off."""

LARGEST = 1e15
"""Greatest weight, and greatest length of a vector: what is made of them stays finite in float32."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a stage sees: m candidates for each of n queries, best first; where none remain, last and with score -inf.

    scores: float32 [n, m], finite or -inf. What the stage does not need is None: vectors float32 [n, m, dim], those of
    the candidates; predicted and last float32 [n, dim]; key int64 [n, 2], -1 = not known; keys int32 [n, m, 2], those
    of the candidates, for a stage that needs `key`. All are finite.
    """

    scores: np.ndarray
    vectors: np.ndarray | None = None
    predicted: np.ndarray | None = None
    last: np.ndarray | None = None
    key: np.ndarray | None = None
    keys: np.ndarray | None = None


@dataclass(frozen=True)
class Stage(ABC):
    """A reranker: a name and numbers, its fields. str(stage) is a text that `parse` reads.

    needs: what it has to have of the arguments of `rerank` vectors, predicted, last and key; it sees no other. It uses
    keys if it needs the key. A new one is a class of this shape, and an entry in RERANKERS. A number that does not fit
    raises InputError.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    uses_keys: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        cls.uses_keys = "key" in cls.needs  # not said by hand, so that no label is forgotten

    @abstractmethod
    def run(self, candidates: Candidates, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """The best w = min(wanted, m) candidates: their positions among the m, int64 [n, w], and new scores [n, w].

        A query's positions are distinct. Scores are float32, best first; -inf where no candidate remains.
        """

    def __str__(self) -> str:
        return ":".join([self.name, *map(repr, astuple(self))])

    def _check(self, field: str, wanted: str, fits: Callable[[float], bool]) -> None:
        """Make a field a float. Raises InputError where it is no number, or one that does not fit."""
        value = getattr(self, field)
        number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if not number or not fits(value):
            raise InputError(f"{field} of {self.name} is {shown(value)}, and a number {wanted} is wanted")
        object.__setattr__(self, field, float(value))  # the dataclass is frozen

    def _check_weight(self) -> None:
        self._check("weight", f"from 0 to {LARGEST:g}", lambda value: 0 <= value <= LARGEST)


@dataclass(frozen=True)
class Mmr(Stage):
    """Maximal marginal relevance: the best that is unlike what has been taken, one after the other.

    The next is argmax over what is left of λ·s(i) - (1 - λ)·max over the taken j of ⟨v(i), v(j)⟩, with λ = `relevance`
    from 0 to 1, s the score and v the vector of a candidate; the max over nothing is 0. λ = 1 changes no order.
    New score: the value at a candidate's turn, but no more than that of the one before, so that scores are best first
    (only the second can exceed it, where ⟨v(i), v(j)⟩ is negative).

    Carbonell and Goldstein, "The use of MMR, diversity-based reranking for reordering documents and producing
    summaries", SIGIR 1998. Takes w·m·dim multiplications a query for the best w of m: no m × m matrix is made.
    """

    name: ClassVar[str] = "mmr"
    needs: ClassVar[tuple[str, ...]] = ("vectors",)

    relevance: float = 0.9

    def __post_init__(self) -> None:
        self._check("relevance", "from 0 to 1", lambda value: 0 <= value <= 1)

    def run(self, candidates: Candidates, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        scores, vectors = candidates.scores, candidates.vectors
        assert vectors is not None
        n, m = scores.shape
        width, rows = min(wanted, m), np.arange(n)
        remain = scores > -np.inf
        relevance, likeness = np.float32(self.relevance), np.float32(1 - self.relevance)
        # -inf: taken, or none there. 0 · -inf would be NaN.
        left = np.where(remain, relevance * np.where(remain, scores, np.float32(0)), np.float32(-np.inf))
        nearest = np.zeros((n, m), np.float32)  # to what has been taken
        order = np.empty((n, width), np.int64)
        values = np.empty((n, width), np.float32)
        for turn in range(width):
            value = left - likeness * nearest
            best = value.argmax(axis=1)  # the first of equals, which is the earlier one
            order[:, turn], values[:, turn] = best, value[rows, best]
            left[rows, best] = -np.inf
            alike = np.matmul(vectors, vectors[rows, best][:, :, None])[:, :, 0]
            nearest = alike if turn == 0 else np.maximum(nearest, alike)
        # A query whose candidates are all taken goes on with the empty places, which are the last ones.
        turns = np.arange(width)
        order = np.where(turns < remain.sum(axis=1)[:, None], order, turns)
        return order, np.minimum.accumulate(values, axis=1)


@dataclass(frozen=True)
class DirectionalBonus(Stage):
    """More for candidates that lie from the last chunk where the prediction lies from it.

    s(i) + weight · cos(v(i) - last, predicted - last), of vectors of the index's space; the cosine is 0 where a
    difference is that of a vector to itself, or to what an index that rounds holds of it (NEAR). It is no evidence of a
    model's sense of direction: predictions that shrink towards the context are nearer to the last chunk than to the
    next. Takes about 3·m·dim multiplications a query and a copy of the vectors.
    """

    name: ClassVar[str] = "directional-bonus"
    needs: ClassVar[tuple[str, ...]] = ("vectors", "predicted", "last")

    weight: float = 0.05

    def __post_init__(self) -> None:
        self._check_weight()

    def run(self, candidates: Candidates, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        vectors, predicted, last = candidates.vectors, candidates.predicted, candidates.last
        assert vectors is not None and predicted is not None and last is not None
        ahead = predicted - last  # [n, dim]
        apart = vectors - last[:, None]  # [n, m, dim]; of ⟨v, v⟩ - 2⟨v, last⟩ + ⟨last, last⟩ rounding leaves little
        products = np.matmul(apart, ahead[:, :, None])[:, :, 0]
        near = np.float32(NEAR) * lengths(last)
        far = (lengths(apart) > near[:, None]) & (lengths(ahead) > near)[:, None]
        both = lengths(apart) * lengths(ahead)[:, None]
        cosines = np.divide(products, both, out=np.zeros_like(products), where=far & (both > 0))
        return _best(candidates.scores + np.float32(self.weight) * cosines, wanted)


@dataclass(frozen=True)
class SequenceBias(Stage):
    """More for the chunks that follow: the next one gets the most, the last one and those before it nothing.

    s(i) + weight · decay^(gap - 1) for a candidate of the context's article whose chunk is gap ≥ 1 after the context's
    last one; decay from 0 (the next chunk alone) to less than 1. Uses keys. A candidate's key is that of the smallest
    row of its duplicate group. Takes a few operations a candidate.
    """

    name: ClassVar[str] = "sequence-bias"
    needs: ClassVar[tuple[str, ...]] = ("key",)

    weight: float = 0.1
    decay: float = 0.5

    def __post_init__(self) -> None:
        self._check_weight()
        self._check("decay", "from 0 to less than 1", lambda value: 0 <= value < 1)

    def run(self, candidates: Candidates, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        keys, key = candidates.keys, candidates.key
        assert keys is not None and key is not None
        gap = keys[:, :, 1] - key[:, None, 1]  # int64: key is
        follows = _same_article(keys, key) & (gap >= 1) & (key[:, None, 1] >= 0)
        bonus = np.where(follows, self.weight * self.decay ** (np.where(follows, gap, 1) - 1), 0)
        return _best(candidates.scores + bonus.astype(np.float32), wanted)


@dataclass(frozen=True)
class ShardAssist(Stage):
    """More for candidates of the article that the context is of: s(i) + weight.

    It reorders what was found, and finds no more of that article. Uses keys. A candidate's key is that of the smallest
    row of its duplicate group. Takes a few operations a candidate.
    """

    name: ClassVar[str] = "shard-assist"
    needs: ClassVar[tuple[str, ...]] = ("key",)

    weight: float = 0.1

    def __post_init__(self) -> None:
        self._check_weight()

    def run(self, candidates: Candidates, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        keys, key = candidates.keys, candidates.key
        assert keys is not None and key is not None
        bonus = np.where(_same_article(keys, key), np.float32(self.weight), np.float32(0))
        return _best(candidates.scores + bonus, wanted)


RERANKERS: dict[str, type[Stage]] = {stage.name: stage for stage in (Mmr, DirectionalBonus, SequenceBias, ShardAssist)}


def parse(text: str) -> Stage:
    """The stage that a text names, such as "mmr" or "sequence-bias:0.2:0.5": numbers in the order of its fields.

    What is left out has its default; str(stage) is such a text. Raises InputError, naming the choices.
    """
    name, *given = text.split(":") if isinstance(text, str) else [""]
    if name not in RERANKERS:
        raise InputError(f"reranker is {shown(text)}, and one of {', '.join(RERANKERS)} is wanted")
    names = [field.name for field in fields(RERANKERS[name])]
    form = ":".join([name, *map(str.upper, names)])
    if len(given) > len(names):
        raise InputError(f"reranker {shown(text)} has {len(given)} numbers, and {form} is wanted")
    try:
        numbers = [float(value) for value in given]
    except ValueError:
        raise InputError(f"reranker {shown(text)} has a part that is no number, and {form} is wanted") from None
    return RERANKERS[name](*numbers)


def lengths(vectors: np.ndarray) -> np.ndarray:
    """float32 [...] of vectors [..., dim]"""
    return np.sqrt(np.einsum("...d,...d->...", vectors, vectors))


def _best(scores: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and scores of the highest, equal ones in the order they have; -inf is last."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :wanted]
    return order, np.take_along_axis(scores, order, axis=1)


def _same_article(keys: np.ndarray, key: np.ndarray) -> np.ndarray:
    """bool [n, m]; no candidate is of article -1, which is not known."""
    return keys[:, :, 0] == key[:, None, 0]
