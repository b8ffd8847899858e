"""The kinds that FAISS searches. Exclusions are fetched beside what is asked for, and dropped."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastlvm.retrieval import blas, faiss_file
from fastlvm.retrieval.faiss_file import HNSW_EFFORT, HNSW_LINKS, HNSW_MOST
from fastlvm.retrieval.locks import SharedLock
from fastlvm.retrieval.searcher import NEIGHBOURS, Searcher, Shape
from fastlvm.retrieval.vectors import Vectors

_ROWS_PER_LIST = 39  # to train a centroid on, FAISS's own minimum; 72 gained 0.0018 of recall for twice the time
_FEW = 256  # vectors that one thread adds
_FILE = "index.faiss"


class _Without:
    """Ids that are not to be found, as FAISS is told: `count` of them. What is under way keeps its own alive."""

    def __init__(self, ids: np.ndarray, total: int, others: _Without | None) -> None:
        self._bits = np.zeros(-(-total // 8), np.uint8)
        if others is not None:
            self._bits[: len(others._bits)] = others._bits
        np.bitwise_or.at(self._bits, ids >> 3, np.uint8(1) << (ids & 7).astype(np.uint8))
        self.count: int = len(ids) + (0 if others is None else others.count)
        self._removed = blas.faiss.IDSelectorBitmap(self._bits)
        self.selector = blas.faiss.IDSelectorNot(self._removed)  # later ids, which have no bit, are found
        self.parameters: Any = None


class _Faiss(Searcher):
    """What the FAISS kinds share; they differ in how the index is built and in its setting.

    A search shares the lock and an addition has it alone. A removal replaces what is left out, and needs none.
    """

    NAME: ClassVar[str]
    FILES = (_FILE,)
    SETTING: ClassVar[str | None] = None
    LISTS: ClassVar[bool] = False
    AT_ONCE: ClassVar[int] = 1024
    """Vectors that are added at once; between them, searches go on."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self._lock = SharedLock()
        self._without: _Without | None = None

    @classmethod
    def open(cls, folder: Path, shape: Shape, mapped: bool = False) -> Searcher:
        return cls(faiss_file.read(folder / _FILE, cls.NAME, shape))

    def save(self, folder: Path) -> None:
        try:
            blas.faiss.write_index(self._index, str(folder / _FILE))
        except RuntimeError as error:  # which is how FAISS says that the disk is full
            raise OSError(errno.EIO, "FAISS could not write its index") from error

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        with self._lock:
            return self._held(ids)

    def _held(self, ids: np.ndarray) -> np.ndarray:
        found = np.zeros((len(ids), self._index.d), np.float32)
        there = ids < self._index.ntotal
        found[there] = self._index.reconstruct_batch(ids[there])
        return found

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            without = self._without
            if exclude is None or exclude.size == 0:
                return self._found(queries, k, without)
            scores, ids = self._found(queries, min(k + _most_distinct(exclude), self._index.ntotal), without)
        dropped = ids < 0
        for column in exclude.T:
            dropped |= ids == column[:, None]
        order = np.argsort(dropped, axis=1, kind="stable")[:, :k]
        kept = ~np.take_along_axis(dropped, order, axis=1)
        return np.take_along_axis(scores, order, axis=1), np.where(kept, np.take_along_axis(ids, order, axis=1), -1)

    def _found(self, queries: np.ndarray, k: int, without: _Without | None) -> tuple[np.ndarray, np.ndarray]:
        if without is None:
            return self._index.search(queries, k)
        return self._index.search(queries, k, params=without.parameters)

    def add(self, vectors: np.ndarray) -> None:
        for first in range(0, len(vectors), self.AT_ONCE):
            with self._lock.alone():
                self._append(vectors[first : first + self.AT_ONCE])

    def _append(self, vectors: np.ndarray) -> None:
        # FAISS's threads spin while they wait for each other: on busy cores one vector took two 8 ms, and one 0.2.
        with _one_thread() if len(vectors) < _FEW else contextlib.nullcontext():
            self._index.add(vectors)

    def remove(self, ids: np.ndarray) -> None:
        without = _Without(ids, self._index.ntotal, self._without)
        without.parameters = self._parameters(without)
        self._without = without

    def _parameters(self, without: _Without) -> Any:
        """Of a search; what FAISS is given leaves out the index's own setting."""
        return blas.faiss.SearchParameters(sel=without.selector)

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
        index = blas.faiss.IndexFlatIP(vectors.dim)
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
        assert nlist is not None
        flat = blas.faiss.IndexFlatIP(vectors.dim)
        flat.add(centroids(vectors, nlist, seed))
        index = cls.empty(flat, nlist)
        index.train(vectors.sample(_ROWS_PER_LIST * nlist, seed))
        for _, block in vectors.blocks():
            index.add(block)
        return cls(index)

    def save(self, folder: Path) -> None:
        with self._lock.alone():
            self._map(blas.faiss.DirectMap.NoMap)  # a file is the same whether vectors were asked for or not
        super().save(folder)

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        while True:
            with self._lock:
                if self._index.direct_map.type == blas.faiss.DirectMap.Array:  # it knows where each id is
                    return self._held(ids)
            with self._lock.alone():
                self._map(blas.faiss.DirectMap.Array)

    def _map(self, kind: int) -> None:
        if self._index.direct_map.type != kind:
            self._index.set_direct_map_type(kind)

    @property
    def setting(self) -> int | None:
        return int(self._index.nprobe)

    @setting.setter
    def setting(self, value: int | None) -> None:
        self._index.nprobe = value
        if self._without is not None:
            self._without.parameters = self._parameters(self._without)

    def _parameters(self, without: _Without) -> Any:
        return blas.faiss.SearchParametersIVF(sel=without.selector, nprobe=self._index.nprobe)

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
        return blas.faiss.IndexIVFFlat(centroids, centroids.d, nlist, blas.faiss.METRIC_INNER_PRODUCT)


class IvfSq8(_Lists):
    """Inverted lists of what vectors differ from their centroid by, one byte a component."""

    NAME = "ivf_sq8"

    @staticmethod
    def empty(centroids: Any, nlist: int) -> Any:
        kind, metric = blas.faiss.ScalarQuantizer.QT_8bit, blas.faiss.METRIC_INNER_PRODUCT
        return blas.faiss.IndexIVFScalarQuantizer(centroids, centroids.d, nlist, kind, metric, True)

    @property
    def error(self) -> float:
        return _rounding(self._index.sq)


class Hnsw(_Faiss):
    """A graph of near neighbours over float32 vectors: of one byte a component it was slower, its scores rounded."""

    NAME = "hnsw"
    SETTING = "ef_search"
    AT_ONCE = 16

    @classmethod
    def build(cls, vectors: Vectors, nlist: int | None, seed: int) -> Searcher:
        index = blas.faiss.IndexHNSWFlat(vectors.dim, HNSW_LINKS, blas.faiss.METRIC_INNER_PRODUCT)
        index.hnsw.rng = blas.faiss.RandomGenerator(seed % (1 << 31))
        index.hnsw.efConstruction = HNSW_EFFORT
        with _one_thread():  # several link the vectors in an order that changes from run to run
            for _, block in vectors.blocks():
                index.add(block)
        return cls(index)

    def _append(self, vectors: np.ndarray) -> None:
        # How many levels a vector is on depends on those before it alone, not on when the index was opened.
        self._index.hnsw.rng = blas.faiss.RandomGenerator(self._index.ntotal)
        with _one_thread():
            self._index.add(vectors)

    def _found(self, queries: np.ndarray, k: int, without: _Without | None) -> tuple[np.ndarray, np.ndarray]:
        """Where all candidates near a query were removed, with more of them: what there is is found."""
        scores, ids = super()._found(queries, k, without)
        total = self._index.ntotal
        wanted = 0 if without is None else min(k, total - without.count)
        if without is None or not wanted:
            return scores, ids
        candidates = without.parameters.efSearch
        while candidates < total and (short := ids[:, wanted - 1] < 0).any():
            candidates = min(2 * candidates, total)
            parameters = self._parameters(without, candidates)
            scores[short], ids[short] = self._index.search(queries[short], k, params=parameters)
        return scores, ids

    def _parameters(self, without: _Without, candidates: int = 0) -> Any:
        """As many candidates as leave the wanted number when those that were removed are taken off, in the mean."""
        total = self._index.ntotal
        if not candidates:
            candidates = min(total, -(-self._index.hnsw.efSearch * total // max(1, total - without.count)))
        return blas.faiss.SearchParametersHNSW(sel=without.selector, efSearch=candidates)

    @property
    def setting(self) -> int | None:
        return int(self._index.hnsw.efSearch)

    @setting.setter
    def setting(self, value: int | None) -> None:
        self._index.hnsw.efSearch = value
        if self._without is not None:
            self._without.parameters = self._parameters(self._without)

    @property
    def bounds(self) -> tuple[int, int]:
        """FAISS takes as many candidates as results if that is more, so a smaller setting would say nothing."""
        least = min(NEIGHBOURS, self._index.ntotal)
        return least, max(least, min(HNSW_MOST, self._index.ntotal))


def centroids(vectors: Vectors, nlist: int, seed: int) -> np.ndarray:
    """float32 [nlist, dim], by k-means on a seeded sample of 39 vectors a list; found once for all kinds."""
    if (nlist, seed) not in vectors.centroids:
        index = IvfFlat.empty(blas.faiss.IndexFlatIP(vectors.dim), nlist)
        index.cp.seed = seed % (1 << 31)
        index.cp.min_points_per_centroid = 1  # small indexes are asked for by name; FAISS would warn on stderr
        index.train(vectors.sample(_ROWS_PER_LIST * nlist, seed))
        vectors.centroids[nlist, seed] = index.quantizer.reconstruct_n(0, nlist)
    return vectors.centroids[nlist, seed]


def _rounding(quantizer: Any) -> float:
    """Six standard deviations of the score of a vector of length 1, its components rounded to steps of their own."""
    ranges = blas.faiss.vector_to_array(quantizer.trained)[quantizer.d :].astype(np.float64)
    return float(6 * np.sqrt(np.mean((ranges / 255) ** 2) / 12))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = blas.faiss.omp_get_max_threads()
    blas.faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        blas.faiss.omp_set_num_threads(threads)


def _most_distinct(excluded: np.ndarray) -> int:
    """The largest number of distinct ids excluded for one query."""
    ordered = np.sort(excluded, axis=1)
    fresh = np.diff(ordered, axis=1, prepend=-1) > 0
    return int(fresh.sum(axis=1).max(initial=0))
