"""The kinds that FAISS searches. Exclusions are fetched beside what is asked for, and dropped."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastlvm.retrieval import faiss_file
from fastlvm.retrieval.searcher import Searcher, Shape
from fastlvm.retrieval.vectors import Vectors

ROWS_PER_LIST = 39  # FAISS's own minimum of training rows per centroid
_FILE = "index.faiss"


class _Faiss(Searcher):
    """What the FAISS kinds share; they differ in how the index is built and in its setting."""

    FILES = (_FILE,)
    SETTING: ClassVar[str | None] = None
    LISTS: ClassVar[bool] = False

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def open(cls, folder: Path, shape: Shape) -> Searcher:
        return cls(faiss_file.read(folder / _FILE, shape.dim, shape.count, shape.nlist, shape.setting))

    def save(self, folder: Path) -> None:
        import faiss

        try:
            faiss.write_index(self._index, str(folder / _FILE))
        except RuntimeError as error:  # which is how FAISS says that the disk is full
            raise OSError(errno.EIO, "FAISS could not write its index") from error

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        if exclude is None or exclude.size == 0:
            return self._index.search(queries, k)
        scores, ids = self._index.search(queries, min(k + _most_distinct(exclude), self._index.ntotal))
        dropped = ids < 0
        for column in exclude.T:
            dropped |= ids == column[:, None]
        order = np.argsort(dropped, axis=1, kind="stable")[:, :k]
        kept = ~np.take_along_axis(dropped, order, axis=1)
        return np.take_along_axis(scores, order, axis=1), np.where(kept, np.take_along_axis(ids, order, axis=1), -1)

    @property
    def setting(self) -> int | None:  # type: ignore[override]
        return None

    @property
    def bounds(self) -> tuple[int, int]:
        return 1, 1

    @property
    def error(self) -> float:
        return 0.0

    def reads(self, queries: np.ndarray) -> float:
        return 4.0 * self._index.d * self._index.ntotal


class Flat(_Faiss):
    """Exact."""

    @classmethod
    def build(cls, vectors: Vectors, nlist: int | None, seed: int) -> Searcher:
        import faiss

        index = faiss.IndexFlatIP(vectors.dim)
        for _, block in vectors.blocks():
            index.add(block)
        return cls(index)


class IvfFlat(_Faiss):
    """Inverted lists of float32 vectors; the centroids are trained on a seeded sample of 39 rows a list."""

    SETTING = "nprobe"
    LISTS = True

    @classmethod
    def build(cls, vectors: Vectors, nlist: int | None, seed: int) -> Searcher:
        import faiss

        assert nlist is not None
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(vectors.dim), vectors.dim, nlist, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = seed % (1 << 31)
        index.cp.min_points_per_centroid = 1  # small indexes are asked for by name; FAISS would warn on stderr
        index.train(vectors.sample(ROWS_PER_LIST * nlist, seed))
        for _, block in vectors.blocks():
            index.add(block)
        return cls(index)

    @property
    def setting(self) -> int | None:
        return int(self._index.nprobe)

    @setting.setter
    def setting(self, value: int | None) -> None:
        self._index.nprobe = value

    @property
    def bounds(self) -> tuple[int, int]:
        return 1, int(self._index.nlist)

    def reads(self, queries: np.ndarray) -> float:
        index = self._index
        _, probed = index.quantizer.search(queries, index.nprobe)
        sizes = np.array([index.invlists.list_size(number) for number in range(index.nlist)])
        rows = np.where(probed >= 0, sizes[probed], 0).sum(axis=1).mean()
        return float(4 * index.d * index.nlist + index.code_size * rows)


def _most_distinct(excluded: np.ndarray) -> int:
    """The largest number of distinct ids excluded for one query."""
    ordered = np.sort(excluded, axis=1)
    fresh = np.diff(ordered, axis=1, prepend=-1) > 0
    return int(fresh.sum(axis=1).max(initial=0))
