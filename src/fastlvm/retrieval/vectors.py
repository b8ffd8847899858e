"""The vectors of an index: one of every duplicate group of a payload, in a space, read block by block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from fastlvm.data import Payload, Space

CONTEXT = 5
DECAY = 0.7
"""Weight of a chunk in a window query by that of the next one; the query is their mean."""

_BLOCK = 8192
_HELD = 100_000  # rows that are kept when they are read, since measuring reads them again and again


def representatives(groups: np.ndarray) -> np.ndarray:
    """The smallest row of every duplicate group, ascending, int64."""
    return np.flatnonzero(groups == np.arange(len(groups)))


class Vectors:
    """Payload rows `rows` (int64, ascending) after `space.apply`; vector i is that of rows[i]."""

    def __init__(self, payload: Payload, space: Space, rows: np.ndarray) -> None:
        self.rows = rows
        self.dim = payload.dim
        self.centroids: dict[tuple[int, int], np.ndarray] = {}  # by number and seed, for the next kind that wants them
        self._payload = payload
        self._space = space

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """float32 [len(ids), dim]"""
        return self._all[ids] if len(self) <= _HELD else self._read(self.rows[ids])

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first id, vectors float32 [n, dim]) of consecutive pieces that make up all of them."""
        for first in range(0, len(self), _BLOCK):
            yield first, self.take(np.arange(first, min(first + _BLOCK, len(self))))

    def sample(self, most: int, seed: int) -> np.ndarray:
        """At most `most` of the vectors, drawn with the seed: float32 [n, dim]."""
        rng = np.random.default_rng(seed)
        return self._together(np.sort(rng.choice(len(self), min(len(self), most), replace=False)), self.take)

    def part(self, most: int, seed: int) -> Vectors:
        """Those of whole articles drawn with the seed, the last one cut where `most` is reached; or all of them."""
        if len(self) <= most:
            return self
        articles = self._payload.keys[self.rows, 0]
        _, numbers = np.unique(articles, return_inverse=True)
        turns = np.random.default_rng(seed).permutation(numbers.max() + 1)[numbers]
        return Vectors(self._payload, self._space, np.sort(self.rows[np.argsort(turns, kind="stable")[:most]]))

    def windows(self, most: int, seed: int) -> np.ndarray:
        """Queries float32 [q, dim]: recency-weighted means of five consecutive chunks of one article, of length 1.

        They are drawn with the seed, at most `most`, from the articles that the vectors are of; where none has five
        consecutive chunks, from as many as there are.
        """
        keys = self._payload.keys.astype(np.int64)
        ours = np.isin(keys[:, 0], keys[self.rows, 0])
        starts = np.empty(0, np.int64)
        for length in range(CONTEXT, 0, -1):
            ends = keys[length - 1 :]
            begins = keys[: len(ends)]
            whole = ours[: len(ends)] & (begins[:, 0] == ends[:, 0]) & (ends[:, 1] - begins[:, 1] == length - 1)
            starts = np.flatnonzero(whole)
            if len(starts):
                break
        chosen = np.random.default_rng(seed).choice(starts, min(most, len(starts)), replace=False)
        weights = DECAY ** np.arange(length - 1, -1, -1)
        moved = self._read(chosen[:, None] + np.arange(length))  # [q, length, dim]
        means = np.einsum("l,qld->qd", weights, moved.astype(np.float64))
        lengths = np.linalg.norm(means, axis=1, keepdims=True)
        return np.ascontiguousarray(means / np.maximum(lengths, np.finfo(np.float64).tiny), dtype=np.float32)

    @functools.cached_property
    def _all(self) -> np.ndarray:
        return self._together(self.rows, self._read)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self._space.apply(self._payload.take(rows)), dtype=np.float32)

    def _together(self, chosen: np.ndarray, take: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """float32 [len(chosen), dim], a block at a time, since a payload is read in another dtype."""
        found = np.empty((len(chosen), self.dim), np.float32)
        for first in range(0, len(chosen), _BLOCK):
            found[first : first + _BLOCK] = take(chosen[first : first + _BLOCK])
        return found
