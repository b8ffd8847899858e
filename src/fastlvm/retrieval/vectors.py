"""The vectors of an index: one of every duplicate group of a payload, in a space, read block by block."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastlvm.data import Payload, Space

_BLOCK = 8192


def representatives(groups: np.ndarray) -> np.ndarray:
    """The smallest row of every duplicate group, ascending, int64."""
    return np.flatnonzero(groups == np.arange(len(groups)))


class Vectors:
    """Payload rows `rows` (int64, ascending) after `space.apply`; vector i is that of rows[i]."""

    def __init__(self, payload: Payload, space: Space, rows: np.ndarray) -> None:
        self.rows = rows
        self.dim = payload.dim
        self._payload = payload
        self._space = space

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """float32 [len(ids), dim]"""
        moved = self._space.apply(self._payload.take(self.rows[ids]))
        return np.ascontiguousarray(moved, dtype=np.float32)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first id, vectors float32 [n, dim]) of consecutive pieces that make up all of them."""
        for first in range(0, len(self), _BLOCK):
            yield first, self.take(np.arange(first, min(first + _BLOCK, len(self))))

    def sample(self, most: int, seed: int) -> np.ndarray:
        """At most `most` of the vectors, drawn with the seed: float32 [n, dim]."""
        rng = np.random.default_rng(seed)
        ids = np.sort(rng.choice(len(self), min(len(self), most), replace=False))
        return np.concatenate([self.take(ids[first : first + _BLOCK]) for first in range(0, len(ids), _BLOCK)])
