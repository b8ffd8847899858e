"""The kinds that FAISS searches. Exclusions are fetched beside what is asked for, and dropped."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastlvm.retrieval import faiss_file
from fastlvm.retrieval.faiss_file import HNSW_EFFORT, HNSW_LINKS, HNSW_MOST
from fastlvm.retrieval.searcher import NEIGHBOURS, Searcher, Shape
from fastlvm.retrieval.vectors import Vectors

_ROWS_PER_LIST = 39  # to train a centroid on, FAISS's own minimum; 72 gained 0.0018 of recall for twice the time
_FILE = "index.faiss"


class _Faiss(Searcher):
    """What the FAISS kinds share; they differ in how the index is built and in its setting."""

    NAME: ClassVar[str]
    FILES = (_FILE,)
    SETTING: ClassVar[str | None] = None
    LISTS: ClassVar[bool] = False

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def open(cls, folder: Path, shape: Shape) -> Searcher:
        return cls(faiss_file.read(folder / _FILE, cls.NAME, shape))

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

    NAME = "flat"

    @classmethod
    def build(cls, vectors: Vectors, nlist: int | None, seed: int) -> Searcher:
        import faiss

        index = faiss.IndexFlatIP(vectors.dim)
        for _, block in vectors.blocks():
            index.add(block)
        return cls(index)


class _Lists(_Faiss):
    """Inverted lists around centroids that k-means has found."""

    SETTING = "nprobe"
    LISTS = True

    @staticmethod
    def empty(centroids: Any, nlist: int) -> Any:
        """An index without vectors. centroids: a flat index, perhaps empty as well."""
        raise NotImplementedError

    @classmethod
    def build(cls, vectors: Vectors, nlist: int | None, seed: int) -> Searcher:
        import faiss

        assert nlist is not None
        flat = faiss.IndexFlatIP(vectors.dim)
        flat.add(centroids(vectors, nlist, seed))
        index = cls.empty(flat, nlist)
        index.train(vectors.sample(_ROWS_PER_LIST * nlist, seed))
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


class IvfFlat(_Lists):
    """Inverted lists of float32 vectors."""

    NAME = "ivf_flat"

    @staticmethod
    def empty(centroids: Any, nlist: int) -> Any:
        import faiss

        return faiss.IndexIVFFlat(centroids, centroids.d, nlist, faiss.METRIC_INNER_PRODUCT)


class IvfSq8(_Lists):
    """Inverted lists of what vectors differ from their centroid by, one byte a component."""

    NAME = "ivf_sq8"

    @staticmethod
    def empty(centroids: Any, nlist: int) -> Any:
        import faiss

        kind, metric = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        return faiss.IndexIVFScalarQuantizer(centroids, centroids.d, nlist, kind, metric, True)

    @property
    def error(self) -> float:
        return _rounding(self._index.sq)


class Hnsw(_Faiss):
    """A graph of near neighbours over float32 vectors: of one byte a component it was slower, its scores rounded."""

    NAME = "hnsw"
    SETTING = "ef_search"

    @classmethod
    def build(cls, vectors: Vectors, nlist: int | None, seed: int) -> Searcher:
        faiss = _untyped()
        index = faiss.IndexHNSWFlat(vectors.dim, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.rng = faiss.RandomGenerator(seed % (1 << 31))
        index.hnsw.efConstruction = HNSW_EFFORT
        with _one_thread():  # several link the vectors in an order that changes from run to run
            for _, block in vectors.blocks():
                index.add(block)
        return cls(index)

    @property
    def setting(self) -> int | None:
        return int(self._index.hnsw.efSearch)

    @setting.setter
    def setting(self, value: int | None) -> None:
        self._index.hnsw.efSearch = value

    @property
    def bounds(self) -> tuple[int, int]:
        """FAISS takes as many candidates as results if that is more, so a smaller setting would say nothing."""
        least = min(NEIGHBOURS, self._index.ntotal)
        return least, max(least, min(HNSW_MOST, self._index.ntotal))


def _untyped() -> Any:
    """FAISS without its type stubs, which lack much of HNSW."""
    import faiss

    return faiss


def centroids(vectors: Vectors, nlist: int, seed: int) -> np.ndarray:
    """float32 [nlist, dim], by k-means on a seeded sample of 39 vectors a list; found once for all kinds."""
    if (nlist, seed) not in vectors.centroids:
        import faiss

        index = IvfFlat.empty(faiss.IndexFlatIP(vectors.dim), nlist)
        index.cp.seed = seed % (1 << 31)
        index.cp.min_points_per_centroid = 1  # small indexes are asked for by name; FAISS would warn on stderr
        index.train(vectors.sample(_ROWS_PER_LIST * nlist, seed))
        vectors.centroids[nlist, seed] = index.quantizer.reconstruct_n(0, nlist)
    return vectors.centroids[nlist, seed]


def _rounding(quantizer: Any) -> float:
    """Six standard deviations of the score of a vector of length 1, its components rounded to steps of their own."""
    import faiss

    ranges = faiss.vector_to_array(quantizer.trained)[quantizer.d :].astype(np.float64)
    return float(6 * np.sqrt(np.mean((ranges / 255) ** 2) / 12))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def _most_distinct(excluded: np.ndarray) -> int:
    """The largest number of distinct ids excluded for one query."""
    ordered = np.sort(excluded, axis=1)
    fresh = np.diff(ordered, axis=1, prepend=-1) > 0
    return int(fresh.sum(axis=1).max(initial=0))
