"""What is ranked: a named prediction in a space, and the payload seen through that space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlvm.data import Payload, Space
from fastlvm.errors import InputError
from fastlvm.evaluation.metrics import Ranks, checked_predictions, rank_many

_CONTEXT_BLOCK = 4096


@dataclass(frozen=True)
class Ranker:
    """A name and `predict`: raw contexts float32 [n, L, dim], oldest first → predictions float [n, dim] in `space`.

    space None: the payload's own space. kind: "model" or "baseline". note: what a reader has to know, e.g. a fitted λ.
    """

    name: str
    predict: Callable[[np.ndarray], np.ndarray]
    space: Space | None = None
    kind: str = "model"
    note: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("model", "baseline"):
            raise InputError(f"kind of ranker {self.name!r} is {self.kind!r}, and model or baseline is wanted")


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


def predict_all(ranker: Ranker, payload: Payload, context_rows: np.ndarray) -> np.ndarray:
    """Predictions float32 [n, dim] for the windows whose context rows [n, L] are given, a block at a time."""
    result = np.empty((len(context_rows), payload.dim), np.float32)
    for start in range(0, len(context_rows), _CONTEXT_BLOCK):
        rows = context_rows[start : start + _CONTEXT_BLOCK]
        predicted = ranker.predict(payload.take(rows))
        piece = checked_predictions(predicted, (len(rows), payload.dim), f"prediction of {ranker.name}")
        result[start : start + len(rows)] = piece
    return result


def rank_windows(predictions: list[np.ndarray], pool: Pool, rows: np.ndarray, groups: np.ndarray) -> list[Ranks]:
    """Ranks of the targets of windows [n, L + 1] (target last), the context's groups excluded and included."""
    return rank_many(predictions, pool, rows[:, -1], rows[:, :-1], groups)
