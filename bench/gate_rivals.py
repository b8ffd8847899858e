"""The indexes that ours is compared with: built once, kept below build/, each at its smallest setting of the recall.

An engine searches float32 [n, dim] for the ids int64 [n, k] of a `Vectors`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastlvm.files import atomic_file, read_json, write_json
from fastlvm.retrieval import build as building
from fastlvm.retrieval.blas import faiss
from fastlvm.retrieval.faiss_kinds import centroids
from fastlvm.retrieval.measure import smallest_setting
from fastlvm.retrieval.vectors import Vectors
from gate_cases import ASKED, K, recall

SEEDS_LISTS, SEEDS_PROBED = 2048, 64
FACTORS = (2, 4, 8)  # candidates a result that are scored again
LINKS, EFFORT, MOST = 16, 128, 1024  # usearch: its defaults, and the greatest expansion tried
SEEDS = f"FAISS IVF-Flat, {SEEDS_PROBED} of {SEEDS_LISTS} lists"
FLAT, SQ8, RABITQ = "FAISS IVF-Flat", "FAISS IVF-SQ8", "FAISS IVF-RaBitQ FastScan"
HNSW, USEARCH = "FAISS HNSW", "usearch i8"
RIVALS = (SEEDS, FLAT, SQ8, RABITQ, HNSW, USEARCH)
TIMED = {
    SEEDS: f"IndexIVFFlat, nlist {SEEDS_LISTS}, nprobe {SEEDS_PROBED}, whatever its recall",
    FLAT: "IndexIVFFlat, its lists the number that reads the fewest bytes",
    SQ8: "IndexIVFScalarQuantizer of QT_8bit by residual, its lists chosen likewise",
    RABITQ: "IndexRefine of IndexIVFRaBitQFastScan with an IndexFlat or one of QT_8bit, in as many lists as ours, "
    f"each with a k_factor of {', '.join(map(str, FACTORS))}, whichever is the quickest",
    HNSW: "IndexHNSWFlat as kind hnsw has it",
    USEARCH: f"usearch.index.Index of metric ip and dtype i8, connectivity {LINKS}, expansion_add {EFFORT}",
}


class Faiss:
    """A FAISS index at a setting. On several threads a single query may be shared out by lists: `shared` says so."""

    def __init__(self, index: Any, options: dict[str, Any]) -> None:
        self.index, self.options = index, options
        self._lists = faiss.downcast_index(index.base_index) if isinstance(index, faiss.IndexRefine) else index
        self.shared = False
        if "k_factor" in options:
            index.k_factor = options["k_factor"]
        self.setting = options.get("setting", 1)

    @property
    def setting(self) -> int:
        return self.options["setting"]

    @setting.setter
    def setting(self, value: int) -> None:
        self.options["setting"] = value
        if hasattr(self._lists, "hnsw"):
            self._lists.hnsw.efSearch = value
        else:
            self._lists.nprobe = value

    @property
    def bounds(self) -> tuple[int, int]:
        return (K, 4096) if hasattr(self._lists, "hnsw") else (1, self._lists.nlist)

    def search(self, queries: np.ndarray, threads: int) -> np.ndarray:
        faiss.omp_set_num_threads(threads)
        if isinstance(self._lists, (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer)):
            self._lists.parallel_mode = int(self.shared and len(queries) == 1)
        return self.index.search(queries, K)[1]

    def save(self, path: Path) -> None:
        faiss.write_index(self.index, str(path))

    @classmethod
    def open(cls, path: Path, options: dict[str, Any]) -> Faiss:
        return cls(faiss.read_index(str(path)), options)


class Usearch:
    """A graph over one byte a component. It searches for one query on one thread."""

    shared = False

    def __init__(self, index: Any, options: dict[str, Any]) -> None:
        self.index, self.options = index, options
        self.setting = options.get("setting", K)

    @property
    def setting(self) -> int:
        return self.options["setting"]

    @setting.setter
    def setting(self, value: int) -> None:
        self.options["setting"] = self.index.expansion_search = value

    @property
    def bounds(self) -> tuple[int, int]:
        return K, MOST

    def search(self, queries: np.ndarray, threads: int) -> np.ndarray:
        found = self.index.search(queries if len(queries) > 1 else queries[0], K, threads=threads)
        return np.asarray(found.keys).reshape(len(queries), -1).astype(np.int64)

    def save(self, path: Path) -> None:
        self.index.save(str(path))

    @classmethod
    def open(cls, path: Path, options: dict[str, Any]) -> Usearch:
        from usearch.index import Index

        return cls(Index.restore(str(path)), options)


Engine = Faiss | Usearch


class Builder:
    """Makes an engine by its name. queries [q, dim] with the truth [q, m] are what settings are chosen on."""

    def __init__(self, vectors: Vectors, queries: np.ndarray, truth: np.ndarray, lists: int, threads: int) -> None:
        self.vectors, self.queries, self.truth = vectors, queries, truth
        self.lists, self.threads = min(lists, len(vectors)), threads
        self._choice = building._Choice(vectors, ASKED, queries, 0)  # one, whose centroids all kinds share

    def engine(self, name: str) -> Engine:
        """At its smallest setting of ASKED; only the seeds' has theirs. Raises ImportError where a package lacks."""
        faiss.omp_set_num_threads(self.threads)
        if name == SEEDS:
            return self._seeds()
        if name == RABITQ:
            return min((self._refined(flat) for flat in (False, True)), key=self._rank)
        if name == USEARCH:
            return self.set(self._usearch())
        kind = {FLAT: "ivf_flat", SQ8: "ivf_sq8", HNSW: "hnsw"}[name]
        searcher: Any = self._choice.of(kind).searcher
        index = searcher._index
        lists = {} if name == HNSW else {"nlist": index.nlist}
        return Faiss(index, {**lists, "setting": searcher.setting})

    def recall(self, engine: Engine) -> float:
        return recall(engine.search(self.queries, self.threads), self.truth)

    def set(self, engine: Engine) -> Engine:
        def at(setting: int) -> float:
            engine.setting = setting
            return self.recall(engine)

        engine.setting = smallest_setting(engine.bounds, at, ASKED)
        return engine

    def milliseconds(self, engine: Engine, threads: int | None = None, calls: int = 100) -> float:
        """Median of a single query."""
        times = []
        for i in range(calls):
            query = self.queries[i % len(self.queries)][None]
            start = time.perf_counter()
            engine.search(query, threads or self.threads)
            times.append(time.perf_counter() - start)
        return 1e3 * float(np.median(times))

    def _rank(self, engine: Engine) -> tuple[bool, float]:
        """First what reaches the recall, then the quickest."""
        return self.recall(engine) < ASKED, self.milliseconds(engine)

    def share(self, engine: Engine) -> None:
        """Share a single query out by lists where that is quicker."""
        if self.threads > 1 and isinstance(engine, Faiss):
            times = {}
            for engine.shared in (False, True):
                times[engine.shared] = self.milliseconds(engine)
            engine.shared = times[True] < times[False]

    def _quantizer(self, lists: int) -> Any:
        flat = faiss.IndexFlatIP(self.vectors.dim)
        flat.add(centroids(self.vectors, lists, 0))
        return flat

    def _seeds(self) -> Engine:
        lists = min(SEEDS_LISTS, len(self.vectors) // 16)
        quantizer = self._quantizer(lists)
        index = faiss.IndexIVFFlat(quantizer, self.vectors.dim, lists, faiss.METRIC_INNER_PRODUCT)
        _own(index, quantizer)
        for _, block in self.vectors.blocks():
            index.add(block)
        return Faiss(index, {"nlist": lists, "setting": min(SEEDS_PROBED, lists)})

    def _refined(self, flat: bool) -> Engine:
        """The quickest k_factor of those that reach the recall."""
        dim, metric = self.vectors.dim, faiss.METRIC_INNER_PRODUCT
        quantizer = self._quantizer(self.lists)
        base = faiss.IndexIVFRaBitQFastScan(quantizer, dim, self.lists, metric, 32, True)
        _own(base, quantizer)
        exact: Any = faiss.IndexFlatIP(dim)
        if not flat:
            exact = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, metric)
        sample = self.vectors.sample(39 * self.lists, 0)
        base.train(sample)
        exact.train(sample)
        index = faiss.IndexRefine(base, exact)
        index.own_fields = index.own_refine_index = True
        base.this.disown()
        exact.this.disown()
        for _, block in self.vectors.blocks():
            index.add(block)
        best: tuple[tuple[bool, float], dict[str, Any]] | None = None
        for factor in FACTORS:
            options = {"nlist": self.lists, "refined by": "flat" if flat else "8 bits", "k_factor": factor}
            one = self.set(Faiss(index, options))
            rank = self._rank(one)
            best = (rank, options) if best is None or rank < best[0] else best
        assert best is not None
        return Faiss(index, best[1])

    def _usearch(self) -> Engine:
        from usearch.index import Index

        index = Index(
            ndim=self.vectors.dim, metric="ip", dtype="i8", connectivity=LINKS, expansion_add=EFFORT, expansion_search=K
        )
        for first, block in self.vectors.blocks():
            index.add(np.arange(first, first + len(block)), block, threads=self.threads)
        return Usearch(index, {})


def _own(index: Any, quantizer: Any) -> None:
    index.own_fields = True
    quantizer.this.disown()


def load(name: str, folder: Path, builder: Callable[[], Builder]) -> tuple[Engine, dict[str, Any]]:
    """An engine and what is known of it, from the folder or built there first: options, recall, build_s, bytes."""
    slug = "-".join(word for word in "".join(c if c.isalnum() else " " for c in name.lower()).split())
    path, said = folder / f"{slug}.index", folder / f"{slug}.json"
    if not said.exists():
        start = time.perf_counter()
        engine = builder().engine(name)
        took = time.perf_counter() - start
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            engine.save(temporary)
        about = {"options": engine.options, "recall": builder().recall(engine), "build_s": took}
        write_json(said, about | {"bytes": path.stat().st_size})
        del engine
    about = read_json(said)
    kind = Usearch if name == USEARCH else Faiss
    return kind.open(path, dict(about["options"])), about


def kept(name: str, folder: Path) -> bool:
    """Whether `load` has it already."""
    slug = "-".join(word for word in "".join(c if c.isalnum() else " " for c in name.lower()).split())
    return (folder / f"{slug}.json").exists()


def turns(queries: np.ndarray) -> Iterator[np.ndarray]:
    """Each of queries [n, …] by itself, [1, …], again and again."""
    while True:
        for number in range(len(queries)):
            yield queries[number : number + 1]


def caller(call: Callable[[np.ndarray], Any], given: np.ndarray) -> Callable[[], Any]:
    """A call with the next of `given` [n, …]."""
    return functools.partial(lambda one, turn: one(next(turn)), call, turns(given))
