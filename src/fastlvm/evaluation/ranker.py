"""What is ranked: a named prediction in a space, and the payload seen through that space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlvm.data import Payload, Space
from fastlvm.errors import InputError
from fastlvm.evaluation.ranks import Ranks, checked_predictions, rank_many
from fastlvm.evaluation.scoring import Combined

_CONTEXT_BLOCK = 4096


KINDS = ("model", "baseline", "oracle", "reranked")


@dataclass(frozen=True)
class Listing:
    """An index's list of a ranker's best chunks, which is what a user gets.

    search: contexts float32 [n, L, dim], predictions float32 [n, dim] and context rows int64 [n, L], which are left
    out → ids int64 [n, k], -1 = none. target: vectors float32 [n, dim] in the ranker's space → ids int64 [n, k] with
    nothing left out. label: what reorders the list, "" for the index's own order; keys: whether that looks at keys.
    """

    about: str
    k: int
    search: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    target: Callable[[np.ndarray], np.ndarray]
    label: str = ""
    keys: bool = False


@dataclass(frozen=True)
class Ranker:
    """A name and `predict`: raw contexts float32 [n, L, dim], oldest first → predictions float [n, dim] in `space`.

    space None: the payload's own space. kind: one of `KINDS`; an oracle knows the truth, "reranked" is an order that an
    index's list was put in. keys: it looks at chunks' keys, not at vectors alone. by_rows: `predict` takes payload rows
    int64 [n, L + 1], the target last, instead of contexts. combine: from these rows to payload rows int64 [n, m] and
    weights float32 [m] whose sum in the space is the prediction, where it is such a sum. note: what a reader has to
    know, e.g. a fitted λ. listings: what an index lists for its predictions. identity: what tells this ranker from
    others in a folder of outcomes, "" for one that is not kept. domain: "out" for a model of another payload.
    """

    name: str
    predict: Callable[[np.ndarray], np.ndarray]
    space: Space | None = None
    kind: str = "model"
    note: str = ""
    keys: bool = False
    by_rows: bool = False
    combine: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
    listings: Sequence[Listing] = ()
    identity: str = ""
    domain: str = "in"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind of ranker {self.name!r} is {self.kind!r}, and one of {', '.join(KINDS)} is wanted")


class Pool:
    """A payload's vectors in a space, float32, by slice or by rows: what `metrics.exact_ranks` takes as pool.

    Kept in memory while that needs at most `cache_bytes`, else worked out again for every slice.
    """

    def __init__(self, payload: Payload, space: Space | None = None, *, cache_bytes: int = 1 << 30) -> None:
        if space is not None and space.dim != payload.dim:
            raise InputError(f"space has {space.dim} dimensions and the payload {payload.dim}: fit it on this payload")
        self.shape = (len(payload), payload.dim)
        self._payload, self._space = payload, space
        self._vectors: np.ndarray | None = None
        self._keep = 4 * self.shape[0] * self.shape[1] <= cache_bytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if self._keep and self._vectors is None:
            vectors = np.empty(self.shape, np.float32)
            for start in range(0, len(self), _CONTEXT_BLOCK):
                piece = slice(start, start + _CONTEXT_BLOCK)
                vectors[piece] = self._read(piece)
            self._vectors = vectors
        return self._read(rows) if self._vectors is None else self._vectors[rows]

    def _read(self, rows: Any) -> np.ndarray:
        vectors = np.asarray(self._payload.vectors[rows], dtype=np.float32)
        return vectors if self._space is None else self._space.apply(vectors)


class Pools:
    """One pool a space, made when first asked for."""

    def __init__(self, payload: Payload) -> None:
        self.payload = payload
        self._pools: dict[str, Pool] = {}

    def of(self, space: Space | None) -> Pool:
        key = space_key(space)
        if key not in self._pools:
            self._pools[key] = Pool(self.payload, space)
        return self._pools[key]


def space_key(space: Space | None) -> str:
    """The space's id, "raw" for the payload's own."""
    return "raw" if space is None else space.id


def predict_all(ranker: Ranker, payload: Payload, rows: np.ndarray) -> np.ndarray:
    """Predictions float32 [n, dim] for windows of payload rows [n, L + 1], the target last, a block at a time."""
    result = np.empty((len(rows), payload.dim), np.float32)
    for start in range(0, len(rows), _CONTEXT_BLOCK):
        some = rows[start : start + _CONTEXT_BLOCK]
        predicted = ranker.predict(some if ranker.by_rows else payload.take(some[:, :-1]))
        piece = checked_predictions(predicted, (len(some), payload.dim), f"prediction of {ranker.name}")
        result[start : start + len(some)] = piece
    return result


def queries(ranker: Ranker, predictions: np.ndarray, rows: np.ndarray) -> np.ndarray | Combined:
    """Predictions [n, dim] for windows [n, L + 1] as `rank_many` takes them."""
    return predictions if ranker.combine is None else Combined(predictions, *ranker.combine(rows))


def rank_windows(
    predictions: Sequence[np.ndarray | Combined],
    pool: Pool | np.ndarray,
    rows: np.ndarray,
    groups: np.ndarray,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Ranks]:
    """Ranks of the targets of windows [n, L + 1] (target last), the context's groups excluded and included."""
    return rank_many(predictions, pool, rows[:, -1], rows[:, :-1], groups, advance=advance)
