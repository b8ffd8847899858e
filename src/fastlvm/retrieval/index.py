"""Inner-product search over a payload in a space, by a searcher of one of several kinds, and rows added to it later.

On disk an index is a folder: the searcher's files, `keys.npy`, `groups.npy`, `space.safetensors` where a space was
given, `removed.npy` where rows were removed, `index.json` with what it was built from and the SHA-256 of every other
file, and `journal.bin` with the changes since they were written, if there are any.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastlvm import _C
from fastlvm.data import Payload, Space
from fastlvm.errors import InputError, IntegrityError
from fastlvm.files import check_files
from fastlvm.retrieval import blas, checks, record
from fastlvm.retrieval import build as building
from fastlvm.retrieval import folder as folders
from fastlvm.retrieval.faiss_file import REMEDY
from fastlvm.retrieval.folder import Verified
from fastlvm.retrieval.growth import Growth
from fastlvm.retrieval.kinds import KINDS
from fastlvm.retrieval.measure import Point
from fastlvm.retrieval.record import Meta
from fastlvm.retrieval.rows import Rows
from fastlvm.retrieval.searcher import SETTINGS, Own, Searcher
from fastlvm.retrieval.vectors import Vectors, representatives

MOST_THREADS = 1024


class SearchResult(NamedTuple):
    """Best first: ids int64 [n, k] are payload rows and, from the payload's size on, rows added later;
    scores float32 [n, k], keys int32 [n, k, 2].

    Where fewer than k rows remain: id -1, score -inf, key (-1, -1).
    """

    ids: np.ndarray
    scores: np.ndarray
    keys: np.ndarray


class Index:
    """Use `Index.build` or `Index.open`. `len(index)` is the number of rows that are there.

    A row's id is its place: payload rows first, then those that `add` added, in their order; none is used twice. Only
    the smallest row of each duplicate group of the payload is in the searcher: a result lists a group once, by its
    smallest row that is there, and excluding any of its rows excludes all of them. An added row is a group of its own.

    An index belongs to the folder that it was opened from or last saved to, and each change is on disk there before
    `add` or `remove` returns. Any number of threads may search while one adds or removes: a search finds what was there
    at some time while it ran, of a large addition perhaps a part.
    """

    def __init__(self, searcher: Searcher, rows: Rows, space: Space, meta: Meta, own_space: bool):
        self._searcher = searcher
        self._rows = rows
        self._meta = meta
        self._own_space = own_space
        self._growth = Growth(searcher, rows, space)
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
            wanted=checks.checked_recall(recall),
            queries=None if queries is None else checks.checked_given(queries, payload.dim),
            seed=int(seed),
        )
        setting: dict[str, Any] = {
            name: built.searcher.setting if name == built.searcher.SETTING else None for name in SETTINGS
        }
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
        rows = Rows(np.array(payload.keys, dtype=np.int32), groups)
        return cls(built.searcher, rows, space, meta, own_space)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the index as a new folder, whole or not at all. It belongs to that folder from then on."""
        with self._growth.still():
            self._belongs(*self._write(folder))

    def save_copy(self, folder: str | os.PathLike[str]) -> None:
        """Write a copy as a new folder, whole or not at all. This index stays with the folder that it belongs to."""
        with self._growth.still():
            self._write(folder)

    def _write(self, folder: str | os.PathLike[str]) -> tuple[Path, str]:
        return folders.write(folder, self._searcher, self._rows, self._meta, self.space if self._own_space else None)

    def _belongs(self, path: Path, checksum: str) -> None:
        self._growth.belongs(folders.journal(path, checksum), lambda: record.read(path).checksum == checksum)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        payload: Payload | None = None,
        *,
        threads: int | None = None,
        mapped: bool = False,
    ) -> Index:
        """Read an index after checking every file against index.json.

        payload: if given, it has to be the one the index was built from. threads, if given, sets FAISS's thread count
        for the whole process. mapped: leave codes on disk and read what searches want, for an index that is larger than
        memory; kind ivf_rabitq alone. Raises InputError where there is no index, IntegrityError where it is damaged or
        not the one of that payload.
        """
        path = Path(folder)
        found = record.read(path)
        meta = found.meta
        if mapped and not KINDS[meta.kind].MAPS:
            raise InputError(f"{path} is of kind {meta.kind}, and mapped is for kind ivf_rabitq: leave it out")
        if payload is not None and payload.id != meta.payload_id:
            raise IntegrityError(
                f"{path} was built from payload {meta.payload_id}, and this one is {payload.id}: build an index from it"
            )
        check_files(path, found.files, record.REMEDY)
        set_threads(threads)
        rows, removed = folders.read_rows(path, meta)
        searcher = KINDS[meta.kind].open(path, replace(meta.shape(rows.count), gone=len(removed)), mapped)
        if len(removed):
            searcher.remove(removed)
        own_space = record.SPACE in found.files
        space = Space.load(path / record.SPACE) if own_space else Space.identity(meta.dim)
        if (space.dim, space.id) != (meta.dim, meta.space_id):
            raise IntegrityError(
                f"{path / record.SPACE if own_space else path} has space {space.id} of {space.dim} dimensions, "
                f"and {meta.space_id} of {meta.dim} is wanted: {REMEDY}"
            )
        index = cls(searcher, rows, space, meta, own_space)
        index._belongs(path.absolute(), found.checksum)
        return index

    @staticmethod
    def verify(folder: str | os.PathLike[str]) -> Verified:
        """Check every byte of an index's folder: index.json, the SHA-256 of every file, every record of the journal.

        Raises InputError where there is no index, IntegrityError naming the file that is damaged.
        """
        return folders.verify(folder)

    def add(self, vectors: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Add rows, which are found from now on; their ids, int64 [m].

        vectors: float [m, dim], as the encoder makes them: one whose length is not 1 is divided by it, with a warning
        once a process. keys: integers [m, 2], article and chunk, that no row of the index has; that of a removed row
        may be used again. Raises InputError for anything else, where another process or object changes the index, and
        where its journal cannot be written; nothing is added then.
        """
        return self._growth.add(vectors, keys)

    def remove(self, keys: np.ndarray) -> int:
        """Remove the rows of integer keys [m, 2]; how many they were. They are not found from now on.

        Raises InputError for a key that no row has, or twice the same, and as `add`; nothing is removed then.
        """
        return self._growth.remove(keys)

    def close(self) -> None:
        """Let another process or object change the index's folder. This one goes on; its next change takes it again."""
        self._growth.close()

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> SearchResult:
        """The k rows of highest inner product with each query.

        queries float [n, dim], or [dim] for n = 1, in the index's space; their length only scales the scores. exclude:
        integer ids of rows [n, m], or [m] for all queries, -1 = none; the whole duplicate group of each is left out.
        The result is what filtering an unlimited search of the same lists would leave, for kind ivf_rabitq among the
        candidates that it scores.
        """
        queries = checks.checked_queries(queries, self.dim)
        k = checks.checked_k(k)
        excluded = self._checked_exclude(exclude, len(queries))
        return self._pack(k, lambda most: self._searcher.search(queries, most, excluded))

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """Vectors of rows in the index's space, float32 [..., dim]; zeros where no such row is there.

        ids: integers [...], as a search finds them, -1 = none. A row's vector is that of its duplicate group, as the
        kind holds it: of one byte a component for ivf_sq8 and ivf_rabitq. Raises InputError for other ids.
        """
        wanted = checks.checked_rows(ids, "ids", self.total)
        there = self._rows.there(wanted)
        found = np.zeros((*wanted.shape, self.dim), np.float32)
        found[there] = self._searcher.vectors(self._rows.numbers(wanted[there]))
        return found

    def predict(
        self,
        model: _C.Model,
        context: np.ndarray,
        k: int,
        exclude: np.ndarray | None = None,
        threads: int = 0,
        own: Own | None = None,
        predicted: np.ndarray | None = None,
    ) -> SearchResult:
        """`search` for what a native model makes of contexts; in one call without the GIL where the kind can.

        context: float32 [n, positions, dim], as the model takes it. threads: of the model and of our own scan, 0 = as
        many as all kernels use; FAISS has its own number. own: leave out a context's own rows, instead of `exclude`.
        predicted: float32 [n, dim], where predictions are to be left.
        """
        k = checks.checked_k(k)
        excluded = self._checked_exclude(exclude, len(context))
        left = np.empty((len(context), model.out_dim), np.float32) if predicted is None else predicted
        return self._pack(k, lambda most: self._searcher.predict(model, context, left, most, excluded, threads, own))

    def _pack(self, k: int, search: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> SearchResult:
        """The searcher's result over rows, padded to k. search: for so many, at most those that the searcher has."""
        count = self._rows.count
        scores, found = search(min(k, count))
        while count < k and count != self._rows.count:  # with more, more might have been found
            count = self._rows.count
            scores, found = search(min(k, count))
        n, width = found.shape
        if width == k and found.min(initial=0) >= 0:  # nothing to pad
            ids = self._rows.of[found]
            return SearchResult(ids, scores, self._rows.keys[ids])
        ids = np.full((n, k), -1, np.int64)
        values = np.full((n, k), -np.inf, np.float32)
        ids[:, :width] = np.where(found >= 0, self._rows.of[found], -1)
        values[:, :width] = np.where(found >= 0, scores, -np.inf)
        keys = np.where((ids >= 0)[..., None], self._rows.keys[ids], np.int32(-1))
        return SearchResult(ids, values, keys)

    def _checked_exclude(self, exclude: Any, n: int) -> np.ndarray | None:
        """The searcher's ids of the groups to leave out, int64 [n, m]; -1 = none."""
        if exclude is None:
            return None
        array = checks.checked_rows(exclude, "exclude", self.total)
        if array.ndim not in (1, 2) or (array.ndim == 2 and len(array) != n):
            raise InputError(f"exclude has shape {list(array.shape)}, and [{n}, m] or [m] is wanted")
        if array.shape[-1] == 0:
            return None
        ids = np.where(array >= 0, self._rows.numbers(np.maximum(array, 0)), -1)
        return np.ascontiguousarray(np.broadcast_to(ids, (n, array.shape[-1])))

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        options = f", {self.options}" if self.options else ""
        return f"Index({self.kind}, {len(self)} × {self.dim}{options}, payload {self.payload_id})"

    @property
    def id(self) -> str:
        """16 hex digits over payload, space, kind and options: what the index was built from and how."""
        return self._meta.id

    @property
    def rows(self) -> np.ndarray:
        """Rows that a search can find, int64, ascending: of a duplicate group one, and what was added and is there."""
        found = self._rows.of[: self._rows.count]
        return np.sort(found[self._rows.there(found)])

    @property
    def keys(self) -> np.ndarray:
        """Keys of all rows that there ever were, int32 [total, 2]."""
        return self._rows.keys

    def stands_for(self, ids: np.ndarray) -> np.ndarray:
        """Of rows int64 [...] the ones that a search finds in their place: of a duplicate group the one in `rows`."""
        return self._rows.of[self._rows.numbers(ids)]

    @property
    def total(self) -> int:
        """Rows that there ever were, those that are gone among them: ids are 0 to total - 1."""
        return self._rows.total

    @property
    def added(self) -> int:
        """Rows that came to the payload's later, those that are gone among them: the last ids."""
        return self._rows.total - self._rows.base

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


def set_threads(threads: int | None) -> None:
    """Set how many threads FAISS uses in this process; None leaves it alone."""
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)) or not 1 <= threads <= MOST_THREADS:
        raise InputError(f"threads is {threads!r}, and an integer from 1 to {MOST_THREADS} is wanted")
    blas.faiss.omp_set_num_threads(int(threads))
