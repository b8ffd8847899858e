"""FAISS's files of the kinds that we write, checked before FAISS reads them: it allocates whatever a file claims.

flat: kind, header, number of floats, floats. Inverted lists: kind, header, lists and probes, the centroids as a flat
index, a direct map (which we leave empty), the quantizer of a kind that has one, and the lists: their number, bytes a
vector, sizes, then each one's vectors and row numbers. hnsw: kind, header, the graph, and its vectors as an index of
their own. The graph is, each with its length, odds of a level, places up to a level, levels of every vector, where its
places begin, and the places, each a neighbour or -1; then the entry point, the highest level and three settings.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastlvm.errors import IntegrityError, shown
from fastlvm.retrieval import blas
from fastlvm.retrieval.searcher import Shape

REMEDY = "it is damaged or the folder holds files of different indexes, build the index again"
HNSW_LINKS, HNSW_EFFORT = 32, 100
"""Neighbours of a vector, twice as many on the lowest level, and candidates looked at for each when it is added.

100 candidates instead of FAISS's 40 find 0.007 to 0.010 more of 50 neighbours among 76,050 vectors of 768, at 50 to 100
candidates of a search, and take 2.3 times the time to build.
"""

HNSW_MOST = 4096
"""Most candidates of a search that an index is saved with: FAISS makes room for as many as a file says."""

_INNER_PRODUCT = 0  # faiss.METRIC_INNER_PRODUCT
_BLOCK = 8192  # vectors
_LEVELS = 6  # above which FAISS puts no vector, for 32 links


def read(file: Path, kind: str, shape: Shape) -> Any:
    """The FAISS index of a file that passes `check`."""
    check(file, kind, shape)
    try:
        return blas.faiss.read_index(str(file))
    except RuntimeError as error:
        raise IntegrityError(f"{file} cannot be read by FAISS ({shown(str(error))}): {REMEDY}") from error


def check(file: Path, kind: str, shape: Shape) -> None:
    """Raises IntegrityError unless the file holds an index of this kind and shape, and nothing else."""
    walk = _Walk(file)
    _LAYOUTS[kind](walk, shape)
    walk.end()


class _Walk:
    """Goes through a file from its start, never past its end."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._size = file.stat().st_size
        self._data = np.memmap(file, np.uint8, "r") if self._size else np.empty(0, np.uint8)
        self._at = 0

    def wrong(self, found: str) -> IntegrityError:
        return IntegrityError(f"{self.file} {found}: {REMEDY}")

    def take(self, size: int) -> np.ndarray:
        """The next `size` bytes."""
        if size > self._size - self._at:
            raise self.wrong(f"is truncated: {self._size} bytes, and at least {self._at + size} are wanted")
        self._at += size
        return self._data[self._at - size : self._at]

    def value(self, layout: str) -> Any:
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")).tobytes())[0]

    def numbers(self, count: int, layout: str = "<u8") -> np.ndarray:
        """The next `count` numbers."""
        return np.frombuffer(self.take(np.dtype(layout).itemsize * count).tobytes(), layout)

    def expect(self, layout: str, wanted: Any, what: str) -> None:
        found = self.value(layout)
        if found != wanted:
            raise self.wrong(f"has {shown(found)} {what}, and wants {shown(wanted)}")

    def end(self) -> None:
        if self._at != self._size:
            raise self.wrong(f"has {self._size - self._at} bytes after its end, and wants none")


def _header(walk: _Walk, kind: bytes, dim: int, count: int) -> None:
    walk.expect("4s", kind, "as its kind")
    walk.expect("i", dim, "dimensions")
    walk.expect("q", count, "vectors")
    walk.take(16)  # two numbers that FAISS ignores
    walk.expect("B", 1, "as its mark of training")
    walk.expect("i", _INNER_PRODUCT, "as its metric")


def _flat(walk: _Walk, shape: Shape) -> None:
    _header(walk, b"IxFI", shape.dim, shape.count)
    walk.expect("Q", shape.count * shape.dim, "floats")
    walk.take(4 * shape.count * shape.dim)


def _ivf_flat(walk: _Walk, shape: Shape) -> None:
    nlist = _coarse(walk, b"IwFl", shape)
    _inverted_lists(walk, 4 * shape.dim, shape.count, nlist)


def _ivf_sq8(walk: _Walk, shape: Shape) -> None:
    nlist = _coarse(walk, b"IwSq", shape)
    _quantizer(walk, shape.dim)
    walk.expect("Q", shape.dim, "bytes a vector")
    walk.expect("B", 1, "as its mark of residuals")
    _inverted_lists(walk, shape.dim, shape.count, nlist)


def _hnsw(walk: _Walk, shape: Shape) -> None:
    _header(walk, b"IHNf", shape.dim, shape.count)
    _graph(walk, shape.count)
    walk.expect("i", HNSW_EFFORT, "candidates when it was built")
    if shape.setting is None or shape.setting > HNSW_MOST:
        raise walk.wrong(f"is to search {shown(shape.setting)} candidates, and {HNSW_MOST} are the most")
    walk.expect("i", shape.setting, "candidates of a search")
    walk.take(4)  # a number that FAISS ignores
    _flat(walk, shape)


_LAYOUTS: dict[str, Callable[[_Walk, Shape], None]] = {
    "flat": _flat,
    "ivf_flat": _ivf_flat,
    "ivf_sq8": _ivf_sq8,
    "hnsw": _hnsw,
}


def _coarse(walk: _Walk, kind: bytes, shape: Shape) -> int:
    """What comes before the lists of every kind that has them; their number."""
    assert shape.nlist is not None
    _header(walk, kind, shape.dim, shape.count)
    walk.expect("Q", shape.nlist, "lists")
    walk.expect("Q", shape.setting, "probes")
    _flat(walk, Shape(shape.dim, shape.nlist, None, None))
    walk.expect("B", 0, "as the kind of its direct map")
    walk.expect("Q", 0, "rows in its direct map")
    return shape.nlist


def _quantizer(walk: _Walk, dim: int) -> None:
    """Eight bits a component, between a least value and a range of its own."""
    walk.expect("i", 0, "as the kind of its quantizer")
    walk.take(8)  # how the ranges were found
    walk.expect("Q", dim, "dimensions in its quantizer")
    walk.expect("Q", dim, "bytes a vector in its quantizer")
    walk.expect("Q", 2 * dim, "numbers in its quantizer")
    if not np.isfinite(walk.numbers(2 * dim, "<f4")).all():
        raise walk.wrong("has a number that is not finite in its quantizer")


def _graph(walk: _Walk, count: int) -> None:
    """A search follows places to vectors and from there to places: none may lead out of the arrays."""
    walk.expect("Q", _LEVELS, "odds of a level")
    walk.take(8 * _LEVELS)
    walk.expect("Q", _LEVELS + 1, "numbers of places up to a level")
    upto = HNSW_LINKS * np.r_[0, 2 : _LEVELS + 2]
    if not np.array_equal(walk.numbers(_LEVELS + 1, "<i4"), upto):
        raise walk.wrong(f"has other numbers of places up to a level than {upto.tolist()}")
    walk.expect("Q", count, "levels")
    levels = walk.numbers(count, "<i4")
    if levels.min() < 1 or levels.max() > _LEVELS:
        raise walk.wrong(f"has vectors on {levels.min()} to {levels.max()} levels, and wants 1 to {_LEVELS}")
    walk.expect("Q", count + 1, "beginnings of places")
    begins = np.r_[0, np.cumsum(upto[levels])]
    if not np.array_equal(walk.numbers(count + 1), begins):
        raise walk.wrong("has places that do not follow one another as the levels of its vectors have it")
    walk.expect("Q", int(begins[-1]), "places")
    _neighbours(walk, levels, begins, upto)
    entry, highest = walk.value("i"), walk.value("i")
    if highest != levels.max() - 1:
        raise walk.wrong(f"has {highest} as its highest level, and wants {levels.max() - 1}")
    if not 0 <= entry < count or levels[entry] != highest + 1:
        raise walk.wrong(f"has {entry} as its entry point, and a vector on the highest level is wanted")


def _neighbours(walk: _Walk, levels: np.ndarray, begins: np.ndarray, upto: np.ndarray) -> None:
    """Checks that whoever stands in a place of a level is on that level as well, a block of vectors at a time."""
    count = len(levels)
    for first in range(0, count, _BLOCK):
        last = min(first + _BLOCK, count)
        found = walk.numbers(int(begins[last] - begins[first]), "<i4")
        if found.min() < -1 or found.max() >= count:
            raise walk.wrong(f"has neighbours {found.min()} to {found.max()}, and wants -1 to {count - 1}")
        place = np.arange(len(found)) - np.repeat(begins[first:last] - begins[first], upto[levels[first:last]])
        level = np.searchsorted(upto, place, side="right") - 1
        if ((found >= 0) & (levels[found] <= level)).any():
            raise walk.wrong("has neighbours on a level that they are not on")


def _inverted_lists(walk: _Walk, nbytes: int, count: int, nlist: int) -> None:
    walk.expect("4s", b"ilar", "as the kind of its lists")
    walk.expect("Q", nlist, "inverted lists")
    walk.expect("Q", nbytes, "bytes a vector")
    sizes = _sizes(walk, nlist)
    if sizes.max(initial=0) > count or int(sizes.sum()) != count:
        raise walk.wrong(f"has lists that do not hold {count} vectors together, as they should")
    rows = [np.empty(0, np.uint64)]
    for size in sizes[sizes > 0].tolist():
        walk.take(nbytes * size)
        rows.append(walk.numbers(size))
    if not np.array_equal(np.sort(np.concatenate(rows)), np.arange(count, dtype=np.uint64)):
        raise walk.wrong(f"has row numbers in its lists that are not 0 to {count - 1}, each once")


def _sizes(walk: _Walk, nlist: int) -> np.ndarray:
    """Vectors in every list that is told of: all of them, or where most are empty (number, vectors) of the others."""
    form = walk.value("4s")
    if form == b"full":
        walk.expect("Q", nlist, "sizes of lists")
        return walk.numbers(nlist)
    if form != b"sprs":
        raise walk.wrong(f"has {shown(form)} as the form of its lists' sizes, and wants b'full' or b'sprs'")
    told = walk.value("Q")
    if told > 2 * nlist or told % 2:
        raise walk.wrong(f"has {told} sizes of lists, and wants pairs for at most {nlist}")
    numbers, sizes = walk.numbers(told).reshape(-1, 2).T
    if numbers.max(initial=0) >= nlist or (numbers[1:] <= numbers[:-1]).any():
        raise walk.wrong(f"has list numbers that do not ascend from 0 to {nlist - 1} at most, as they should")
    return sizes
