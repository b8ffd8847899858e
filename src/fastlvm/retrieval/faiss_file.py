"""FAISS's files of the two kinds that we write, checked before FAISS reads them: it allocates whatever a file claims.

flat: kind, header, number of floats, floats. ivf_flat: kind, header, lists and probes, the centroids as a flat index, a
direct map (which we leave empty), and the inverted lists: their number, bytes a vector, sizes, then each one's vectors
and row numbers.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from fastlvm.errors import IntegrityError, shown

REMEDY = "it is damaged or the folder holds files of different indexes, build the index again"
_INNER_PRODUCT = 0  # faiss.METRIC_INNER_PRODUCT


def read(file: Path, dim: int, count: int, nlist: int | None, nprobe: int | None) -> Any:
    """The FAISS index of a file that passes `check`."""
    check(file, dim, count, nlist, nprobe)
    import faiss

    try:
        return faiss.read_index(str(file))
    except RuntimeError as error:
        raise IntegrityError(f"{file} cannot be read by FAISS ({shown(str(error))}): {REMEDY}") from error


def check(file: Path, dim: int, count: int, nlist: int | None, nprobe: int | None) -> None:
    """Raises IntegrityError unless the file holds vectors 0 to count - 1 of `dim` floats, in `nlist` lists or flat."""
    walk = _Walk(file)
    if nlist is None:
        _flat(walk, dim, count)
    else:
        _header(walk, b"IwFl", dim, count)
        walk.expect("Q", nlist, "lists")
        walk.expect("Q", nprobe, "probes")
        _flat(walk, dim, nlist)
        walk.expect("B", 0, "as the kind of its direct map")
        walk.expect("Q", 0, "rows in its direct map")
        _inverted_lists(walk, dim, count, nlist)
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

    def numbers(self, count: int) -> np.ndarray:
        """The next `count` whole numbers, uint64."""
        return np.frombuffer(self.take(8 * count).tobytes(), "<u8")

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


def _flat(walk: _Walk, dim: int, count: int) -> None:
    _header(walk, b"IxFI", dim, count)
    walk.expect("Q", count * dim, "floats")
    walk.take(4 * count * dim)


def _inverted_lists(walk: _Walk, dim: int, count: int, nlist: int) -> None:
    walk.expect("4s", b"ilar", "as the kind of its lists")
    walk.expect("Q", nlist, "inverted lists")
    walk.expect("Q", 4 * dim, "bytes a vector")
    sizes = _sizes(walk, nlist)
    if sizes.max(initial=0) > count or int(sizes.sum()) != count:
        raise walk.wrong(f"has lists that do not hold {count} vectors together, as they should")
    rows = [np.empty(0, np.uint64)]
    for size in sizes[sizes > 0].tolist():
        walk.take(4 * dim * size)
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
