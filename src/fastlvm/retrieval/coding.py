"""Vectors as the lists of rabitq.py hold them: turned, one bit and eight bits a dimension, row by row or in blocks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastlvm import _C
from fastlvm.retrieval import blas

ROWS = _C.BLOCK_ROWS
_FLOAT = 4  # bytes of a factor


def rotated(rows: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Rows float32 [n, dim] in the coordinates of the lists, lengths and inner products as they were."""
    moved = np.array(rows, np.float32, order="C")
    _C.rotate(signs, moved)
    return moved


def turned_back(rows: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """The inverse of `rotated`."""
    moved = np.array(rows, np.float32, order="C")
    _C.rotate(signs, moved, back=True)
    return moved


def quantised(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [n, dim] and the float32 [n] that a step of 1 is worth: the largest component becomes 127."""
    most = np.abs(rows).max(axis=1, initial=0)
    scales = np.where(most > 1e-30, most / np.float32(127), 0).astype(np.float32)
    inverse = np.where(scales > 0, 1 / np.where(scales > 0, scales, 1), 0).astype(np.float32)
    return np.rint(rows * inverse[:, None]).clip(-127, 127).astype(np.int8), scales


def columns(dim: int) -> int:
    """Bytes of a row's bits, even."""
    return -(-dim // 16) * 2


def layers(dim: int) -> int:
    """Of ROWS bytes in a block: the columns, and then the factors."""
    return columns(dim) + _FLOAT


class Coded(NamedTuple):
    """Rows with what they have in a list: lists int64 [n], ids int32 [n], bits uint8 [n, columns], …"""

    lists: np.ndarray
    ids: np.ndarray
    bits: np.ndarray
    factors: np.ndarray
    codes: np.ndarray
    scales: np.ndarray

    @classmethod
    def empty(cls, rows: int, dim: int) -> Coded:
        return cls(
            np.empty(rows, np.int64),
            np.empty(rows, np.int32),
            np.empty((rows, columns(dim)), np.uint8),
            np.empty(rows, np.float32),
            np.empty((rows, dim), np.int8),
            np.empty(rows, np.float32),
        )

    def where(self, good: np.ndarray) -> Coded:
        return self if good.all() else Coded(*(each[good] for each in self))

    def packed(self, nlist: int) -> dict[str, np.ndarray]:
        """In the order of the lists, and of rows within one: sizes, ids, blocks, codes and scales as in a file."""
        order = np.argsort(self.lists, kind="stable")
        sizes = np.bincount(self.lists, minlength=nlist).astype(np.int64)
        places = Places(sizes)
        bits = np.zeros((places.blocks * ROWS, self.bits.shape[1]), np.uint8)
        slots = places.slots(np.arange(len(order)))
        bits[slots] = self.bits[order]
        blocks = np.zeros((places.blocks, self.bits.shape[1] + _FLOAT, ROWS), np.uint8)
        blocks[:, : self.bits.shape[1]] = bits.reshape(-1, ROWS, bits.shape[1]).transpose(0, 2, 1)
        factors_of(blocks)[slots // ROWS, slots % ROWS] = self.factors[order]
        return {
            "sizes": sizes,
            "ids": self.ids[order],
            "blocks": blocks,
            "codes": self.codes[order],
            "scales": self.scales[order],
        }


class Places:
    """Where the rows of lists of these sizes are: a row's position is its place among all, its slot that in blocks."""

    def __init__(self, sizes: np.ndarray) -> None:
        blocks = -(-sizes // ROWS)
        self.blocks = int(blocks.sum())
        self._ends = np.cumsum(sizes)
        self._shift = ROWS * (np.cumsum(blocks) - blocks) - (self._ends - sizes)

    def lists(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._ends, positions, side="right")

    def slots(self, positions: np.ndarray) -> np.ndarray:
        return positions + self._shift[self.lists(positions)]


def factors_of(blocks: np.ndarray) -> np.ndarray:
    """float32 [blocks, ROWS], the memory of the blocks itself; NaN where a row was removed."""
    flat = blocks.reshape(len(blocks), blocks.shape[1] * ROWS)
    return flat[:, flat.shape[1] - _FLOAT * ROWS :].view(np.float32)


def unpacked(parts: dict[str, np.ndarray]) -> Coded:
    """The rows of lists, in their order, without those that were removed."""
    sizes, blocks = parts["sizes"], parts["blocks"]
    places = Places(sizes)
    positions = np.arange(len(parts["ids"]))
    slots = places.slots(positions)
    bits = blocks[:, :-_FLOAT].transpose(0, 2, 1).reshape(-1, blocks.shape[1] - _FLOAT)[slots]
    factors = factors_of(blocks).reshape(-1)[slots]
    whole = Coded(places.lists(positions), parts["ids"], bits, factors, parts["codes"], parts["scales"])
    return whole.where(~np.isnan(factors))


class Coder:
    """Puts rotated rows into lists, and codes them there. centroids: float32 [nlist, dim], of length 1."""

    def __init__(self, centroids: np.ndarray, level: float | None = None, sample: np.ndarray | None = None) -> None:
        """level: what centroids are multiplied by, or what is right for a sample of the rows."""
        self._index = blas.faiss.IndexFlatIP(centroids.shape[1])
        self._index.add(centroids)
        if level is None:
            assert sample is not None
            # Least squares: centroids have length 1, and their lists' means are shorter.
            near = self._index.search(sample, 1)[0]
            square = np.square(centroids).sum(axis=1).mean()
            level = near.mean() / square if square > 0 else 0
        self.level = np.float32(level)
        self._centroids = centroids * self.level

    def code(self, rows: np.ndarray, first: int, to: Coded) -> None:
        """Rotated rows float32 [n, dim] that become ids from `first` on; `to` is as long."""
        to.lists[:] = self._index.search(rows, 1)[1][:, 0]
        to.ids[:] = np.arange(first, first + len(rows))
        residual = rows - self._centroids[to.lists]
        size = np.abs(residual).sum(axis=1)
        to.factors[:] = np.where(size > 0, np.square(residual).sum(axis=1) / np.where(size > 0, size, 1), 0)
        bits = np.packbits(residual > 0, axis=1, bitorder="little")
        to.bits[:, : bits.shape[1]], to.bits[:, bits.shape[1] :] = bits, 0
        to.codes[:], to.scales[:] = quantised(rows)
