"""Inner-product search over a payload in a space, by a searcher of one of several kinds.

On disk an index is a folder: the searcher's files, `keys.npy`, `groups.npy`, `space.safetensors` where a space was
given, and `index.json` with what it was built from and the SHA-256 of every other file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastlvm import _C
from fastlvm.data import Payload, Space
from fastlvm.data.npz import map_array
from fastlvm.errors import InputError, IntegrityError
from fastlvm.files import atomic_folder, check_files
from fastlvm.retrieval import build as building
from fastlvm.retrieval import record
from fastlvm.retrieval.faiss_file import REMEDY
from fastlvm.retrieval.kinds import KINDS
from fastlvm.retrieval.measure import Point
from fastlvm.retrieval.record import Meta
from fastlvm.retrieval.searcher import SETTINGS, Searcher
from fastlvm.retrieval.vectors import Vectors, representatives

MOST_THREADS = 1024

_SPACE = record.SPACE


class SearchResult(NamedTuple):
    """Best first: ids int64 [n, k] are payload rows, scores float32 [n, k], keys int32 [n, k, 2].

    Where fewer than k rows remain: id -1, score -inf, key (-1, -1).
    """

    ids: np.ndarray
    scores: np.ndarray
    keys: np.ndarray


class Index:
    """Use `Index.build` or `Index.open`. `len(index)` is the number of payload rows it covers.

    Only the smallest row of each duplicate group is in the searcher: a result lists a group once, and excluding any of
    its rows excludes all of them.
    """

    def __init__(
        self, searcher: Searcher, keys: np.ndarray, groups: np.ndarray, space: Space, meta: Meta, own_space: bool
    ):
        self._searcher = searcher
        self._keys = keys
        self._groups = groups
        self._rows = representatives(groups)  # the searcher's id → payload row
        self._meta = meta
        self._own_space = own_space
        self.space = space

    @classmethod
    def build(
        cls,
        payload: Payload,
        kind: str = "auto",
        *,
        space: Space | None = None,
        nlist: int | None = None,
        nprobe: int | None = None,
        recall: float = building.RECALL,
        queries: np.ndarray | None = None,
        seed: int = 0,
        threads: int | None = None,
    ) -> Index:
        """Index a payload's vectors after `space.apply` (None: as they are).

        kind: "flat" (exact), "ivf_flat" (inverted lists), "ivf_sq8" (lists of one byte a component, whose scores are
        rounded, see `score_error`), "hnsw" (a graph of neighbours), or "auto": flat below 10,000 vectors, else the kind
        whose single query is the quickest at the wanted recall.

        recall: recall@50 against exact search, the mean over `queries` float [q, dim] in the space, for example
        predictions of validation windows; of more than 512 a seeded draw is taken. None: recency-weighted means of five
        consecutive chunks. nprobe or ef_search is the smallest that reaches it; nlist, a power of two around 4 to
        16·√N, the one whose search reads the fewest bytes then. Kinds and lists are compared on at most 50,000 rows of
        whole articles, and all that was measured is the index's `curve`. The same payload, space, options and seed give
        the same index, but for the kind that auto takes, which depends on time.

        threads, if given, sets FAISS's thread count for the whole process.
        """
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            raise InputError(f"seed is {seed!r}, and an integer ≥ 0 is wanted")
        if kind != "auto" and kind not in KINDS:
            raise InputError(f"kind is {kind!r}, and one of auto, {', '.join(KINDS)} is wanted")
        own_space = space is not None
        space = Space.identity(payload.dim) if space is None else space
        if space.dim != payload.dim:
            raise InputError(f"space has {space.dim} dimensions and the payload {payload.dim}: fit it on this payload")
        set_threads(threads)
        groups = np.array(payload.groups, dtype=np.int64)
        vectors = Vectors(payload, space, representatives(groups))
        built = building.build(
            vectors,
            kind,
            nlist=nlist,
            nprobe=nprobe,
            wanted=_checked_recall(recall),
            queries=None if queries is None else _checked_given(queries, payload.dim),
            seed=int(seed),
        )
        setting = {name: built.searcher.setting if name == built.searcher.SETTING else None for name in SETTINGS}
        meta = Meta(
            payload_id=payload.id,
            space_id=space.id,
            kind=built.kind,
            rows=len(payload),
            dim=payload.dim,
            nlist=built.nlist,
            **setting,
            recall_at_50=None if built.searcher.SETTING is None else built.recall,
            seed=int(seed),
            curve=tuple(built.curve),
        )
        return cls(built.searcher, np.array(payload.keys, dtype=np.int32), groups, space, meta, own_space)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the index as a new folder, whole or not at all."""
        with atomic_folder(folder) as path:
            self._searcher.save(path)
            np.save(path / "keys.npy", self._keys, allow_pickle=False)
            np.save(path / "groups.npy", self._groups, allow_pickle=False)
            if self._own_space:
                self.space.save(path / _SPACE)
            record.write(path, self._meta)

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], payload: Payload | None = None, *, threads: int | None = None
    ) -> Index:
        """Read an index after checking every file against index.json.

        payload: if given, it has to be the one the index was built from. threads, if given, sets FAISS's thread count
        for the whole process. Raises InputError where there is no index, IntegrityError where it is damaged or not
        the one of that payload.
        """
        path = Path(folder)
        meta, files = record.read(path)
        if payload is not None and payload.id != meta.payload_id:
            raise IntegrityError(
                f"{path} was built from payload {meta.payload_id}, and this one is {payload.id}: build an index from it"
            )
        check_files(path, files, record.REMEDY)
        set_threads(threads)
        keys = np.array(map_array(path / "keys.npy", "int32", (meta.rows, 2), REMEDY))
        groups = np.array(map_array(path / "groups.npy", "int64", (meta.rows,), REMEDY))
        _check_groups(path / "groups.npy", groups)
        searcher = KINDS[meta.kind].open(path, meta.shape(len(representatives(groups))))
        own_space = _SPACE in files
        space = Space.load(path / _SPACE) if own_space else Space.identity(meta.dim)
        if (space.dim, space.id) != (meta.dim, meta.space_id):
            raise IntegrityError(
                f"{path / _SPACE if own_space else path} has space {space.id} of {space.dim} dimensions, "
                f"and {meta.space_id} of {meta.dim} is wanted: {REMEDY}"
            )
        return cls(searcher, keys, groups, space, meta, own_space)

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> SearchResult:
        """The k rows of highest inner product with each query.

        queries float [n, dim], or [dim] for n = 1, in the index's space; their length only scales the scores. exclude:
        integer payload rows [n, m], or [m] for all queries, -1 = none; the whole duplicate group of each is left out.
        The result is what filtering an unlimited search of the same lists would leave, for kind ivf_rabitq among the
        candidates that it scores.
        """
        queries = _checked_queries(queries, self.dim)
        k = _checked_k(k)
        excluded = self._checked_exclude(exclude, len(queries))
        scores, found = self._searcher.search(queries, min(k, len(self._rows)), excluded)
        return self._pack(scores, found, k)

    def predict(
        self, model: _C.Model, context: np.ndarray, k: int, exclude: np.ndarray | None = None, threads: int = 0
    ) -> SearchResult:
        """`search` for what a native model makes of contexts; in one call without the GIL where the kind can.

        context: float32 [n, positions, dim], as the model takes it. threads: of the model and of our own scan, 0 = as
        many as all kernels use; FAISS has its own number.
        """
        k = _checked_k(k)
        excluded = self._checked_exclude(exclude, len(context))
        return self._pack(*self._searcher.predict(model, context, min(k, len(self._rows)), excluded, threads), k)

    def _pack(self, scores: np.ndarray, found: np.ndarray, k: int) -> SearchResult:
        """The searcher's result over payload rows, padded to k."""
        n, width = found.shape
        ids = np.full((n, k), -1, np.int64)
        values = np.full((n, k), -np.inf, np.float32)
        ids[:, :width] = np.where(found >= 0, self._rows[found], -1)
        values[:, :width] = np.where(found >= 0, scores, -np.inf)
        keys = np.where((ids >= 0)[..., None], self._keys[ids], np.int32(-1))
        return SearchResult(ids, values, keys)

    def _checked_exclude(self, exclude: Any, n: int) -> np.ndarray | None:
        """The searcher's ids of the groups to leave out, int64 [n, m]; -1 = none."""
        if exclude is None:
            return None
        array = np.asarray(exclude)
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"exclude is {array.dtype}, and integer payload rows are wanted")
        if array.ndim not in (1, 2) or (array.ndim == 2 and len(array) != n):
            raise InputError(f"exclude has shape {list(array.shape)}, and [{n}, m] or [m] is wanted")
        array = array.astype(np.int64)
        if array.size and (array.min() < -1 or array.max() >= len(self)):
            raise InputError(f"exclude spans {array.min()} to {array.max()}: wanted are rows -1 to {len(self) - 1}")
        if array.shape[-1] == 0:
            return None
        ids = np.where(array >= 0, np.searchsorted(self._rows, self._groups[array]), -1)
        return np.ascontiguousarray(np.broadcast_to(ids, (n, array.shape[-1])))

    def __len__(self) -> int:
        return self._meta.rows

    def __repr__(self) -> str:
        options = f", {self.options}" if self.options else ""
        return f"Index({self.kind}, {len(self)} × {self.dim}{options}, payload {self.payload_id})"

    @property
    def id(self) -> str:
        """16 hex digits over payload, space, kind and options: what the index was built from and how."""
        return self._meta.id

    @property
    def payload_id(self) -> str:
        return self._meta.payload_id

    @property
    def kind(self) -> str:
        return self._meta.kind

    @property
    def dim(self) -> int:
        return self._meta.dim

    @property
    def options(self) -> str:
        """What the kind has of nlist, nprobe and ef_search, such as "nlist 1024, nprobe 16"; "" where it is exact."""
        given = {"nlist": self.nlist, "nprobe": self.nprobe, "ef_search": self.ef_search}
        return ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)

    @property
    def nlist(self) -> int | None:
        """Inverted lists; None for a kind without."""
        return self._meta.nlist

    @property
    def nprobe(self) -> int | None:
        """Lists searched per query; None for a kind without."""
        return self._meta.nprobe

    @property
    def ef_search(self) -> int | None:
        """Candidates of a search in the graph; None for a kind without."""
        return self._meta.ef_search

    @property
    def curve(self) -> tuple[Point, ...]:
        """What was measured when the index was built: kind, rows, options, recall@50 and ms of a single query."""
        return self._meta.curve

    @property
    def score_error(self) -> float:
        """How far scores of vectors of length 1 may be from inner products, beyond float32's rounding."""
        return self._searcher.error

    @property
    def recall_at_50(self) -> float | None:
        """Recall@50 against exact search, measured when the index was built; None for a flat index, which is exact."""
        return self._meta.recall_at_50


def _check_groups(file: Path, groups: np.ndarray) -> None:
    """Raises IntegrityError unless every row's group is the smallest row of one."""
    rows = np.arange(len(groups))
    good = (groups >= 0) & (groups <= rows)
    good &= groups[np.where(good, groups, 0)] == groups
    if not good.all():
        row = int(np.argmin(good))
        raise IntegrityError(
            f"{file} has row {row} in group {groups[row]}, and the smallest row of one is wanted: {record.REMEDY}"
        )


def set_threads(threads: int | None) -> None:
    """Set how many threads FAISS uses in this process; None leaves it alone."""
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)) or not 1 <= threads <= MOST_THREADS:
        raise InputError(f"threads is {threads!r}, and an integer from 1 to {MOST_THREADS} is wanted")
    import faiss

    faiss.omp_set_num_threads(int(threads))


def _checked_queries(queries: Any, dim: int) -> np.ndarray:
    """float32 [n, dim], C-contiguous and finite."""
    array = np.asarray(queries)
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"queries is {array.dtype}, and a float array is wanted")
    if array.ndim not in (1, 2) or array.shape[-1] != dim:
        raise InputError(f"queries has shape {list(array.shape)}, and [n, {dim}] or [{dim}] is wanted")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array.reshape(-1, dim), dtype=np.float32)
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise InputError(f"queries row {row} holds a value that is not finite in float32: mend that query")
    return array


def _checked_k(k: Any) -> int:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise InputError(f"k is {k!r}, and an integer ≥ 1 is wanted")
    return int(k)


def _checked_given(queries: Any, dim: int) -> np.ndarray:
    """Queries to measure with."""
    array = _checked_queries(queries, dim)
    if not len(array):
        raise InputError("queries is empty: leave it out, or give some to measure recall with")
    if not array.any(axis=1).all():
        row = int(np.argmin(array.any(axis=1)))
        raise InputError(f"queries row {row} is all zeros, which is as near to every vector: leave that query out")
    return array


def _checked_recall(recall: Any) -> float:
    number = isinstance(recall, (int, float, np.integer, np.floating)) and not isinstance(recall, bool)
    if not number or not 0 < recall <= 1:
        raise InputError(f"recall is {recall!r}, and a share above 0 and up to 1 is wanted")
    return float(recall)
