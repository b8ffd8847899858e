"""Inverted lists of RaBitQ codes (Gao and Long, SIGMOD 2024), searched by our own scan.

A vector has one bit a dimension, the signs of its residual to the list's centroid in randomly rotated coordinates, by
which the lists are scanned, and eight bits a dimension, by which the best of the scan are scored. FAISS trains the
centroids and assigns vectors to them. What is added later goes into a tail that every search scores whole; when that is
full, its rows are put into the lists.

Files, all `.npy`; rows are in the order of the lists: signs float32 [4, dim] of the rotation; centroids int8
[nlist, dim] and centroid_scales float32 [nlist], of length 1; level float32 [1], what they are multiplied by before
residuals are taken; sizes int64 [nlist + 1], of the lists and the tail; ids int32 [n]; blocks uint8 [.., layers, 32],
for 32 rows of a list layer b of what dimensions 8b … 8b + 7 are, and 32 factors float32 in the last four, NaN for a row
that was removed; codes int8 [n, dim] and scales float32 [n]; tail float32 [.., dim], rotated.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastlvm import _C
from fastlvm.data.npz import map_array
from fastlvm.errors import IntegrityError
from fastlvm.retrieval import faiss_file
from fastlvm.retrieval.coding import (
    ROWS,
    Coded,
    Coder,
    Places,
    factors_of,
    layers,
    quantised,
    rotated,
    turned_back,
    unpacked,
)
from fastlvm.retrieval.faiss_kinds import centroids as trained
from fastlvm.retrieval.searcher import NEIGHBOURS, Own, Searcher, Shape
from fastlvm.retrieval.vectors import Vectors

CANDIDATES = 8
"""Rows scored by eight bits for every one that is asked for."""

TAIL = 4096
"""Most rows that are scored by eight bits in every search, before they are put into lists."""

_SAMPLE = 8192  # rows that the level is chosen by

_PARTS = ("signs", "centroids", "centroid_scales", "level", "sizes", "ids", "blocks", "codes", "scales")


class _Tail:
    """Rows that came after those in the lists, ids from `first` on: as many of the arrays as were put there."""

    def __init__(self, first: int, dim: int) -> None:
        self.first = first
        self.rows = np.empty((TAIL, dim), np.float32)  # takes memory when it is written
        self.codes, self.scales = np.empty((TAIL, dim), np.int8), np.empty(TAIL, np.float32)

    def put(self, at: int, rows: np.ndarray) -> None:
        places = slice(at, at + len(rows))
        self.rows[places] = rows
        self.codes[places], self.scales[places] = quantised(rows)


class _State(NamedTuple):
    """What a search sees, the same until it ends: lists, and how many rows of a tail."""

    parts: dict[str, np.ndarray]
    tail: _Tail
    filled: int
    native: _C.Searcher

    @classmethod
    def of(cls, parts: dict[str, np.ndarray], first: int) -> _State:
        tail = _Tail(first, parts["codes"].shape[1])
        return cls(parts, tail, 0, _C.Searcher({**parts, "tail_codes": tail.codes, "tail_scales": tail.scales}, first))


class IvfRabitq(Searcher):
    """Scores are those of the eight bits; centroids have eight bits too."""

    FILES = (*(f"{part}.npy" for part in _PARTS), "tail.npy")
    SETTING = "nprobe"
    LISTS = True
    MAPS = True

    def __init__(self, parts: dict[str, np.ndarray], nprobe: int, count: int | None = None) -> None:
        """count: ids given to rows so far; None: there is one for each row."""
        self.setting: int | None = nprobe
        self._state = _State.of(parts, len(parts["ids"]) if count is None else count)
        self._held: tuple[dict[str, np.ndarray], np.ndarray] | None = (
            None  # what `_positions` found, and in which parts
        )

    @property
    def _parts(self) -> dict[str, np.ndarray]:
        return self._state.parts

    @classmethod
    def build(cls, vectors: Vectors, nlist: int | None, seed: int) -> Searcher:
        assert nlist is not None
        rng = np.random.default_rng(seed)
        signs = rng.choice(np.array([-1, 1], np.float32), (_C.ROTATION_ROUNDS, vectors.dim))
        centroids, centroid_scales = quantised(rotated(trained(vectors, nlist, seed), signs))
        sample = rotated(vectors.sample(_SAMPLE, seed), signs)
        coder = Coder(centroids * centroid_scales[:, None], sample=sample)
        coded = Coded.empty(len(vectors), vectors.dim)
        for first, block in vectors.blocks():
            place = slice(first, first + len(block))
            coder.code(rotated(block, signs), first, Coded(*(each[place] for each in coded)))
        named = {"signs": signs, "centroids": centroids, "centroid_scales": centroid_scales}
        return cls(named | {"level": np.array([coder.level])} | coded.packed(nlist), 1)

    @classmethod
    def open(cls, folder: Path, shape: Shape, mapped: bool = False) -> Searcher:
        nlist, dim = shape.nlist or 0, shape.dim
        parts = _read(folder, shape, mapped)
        filled = int(parts["sizes"][-1])
        tail = np.array(map_array(folder / "tail.npy", "float32", (filled, dim), faiss_file.REMEDY))
        if not np.isfinite(tail).all():
            raise IntegrityError(
                f"{folder / 'tail.npy'} holds a value that is not finite, which no index has: {faiss_file.REMEDY}"
            )
        parts["sizes"] = parts["sizes"][:nlist]
        searcher = cls(parts, shape.setting or 1, shape.count - filled)
        searcher._append(tail)
        return searcher

    def save(self, folder: Path) -> None:
        state = self._state
        sizes = np.append(state.parts["sizes"], state.filled)
        tail = state.tail.rows[: state.filled]
        for part, array in {**state.parts, "sizes": sizes, "tail": tail}.items():
            np.save(folder / f"{part}.npy", array, allow_pickle=False)

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        scores, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        state = self._state
        state.native.search(queries, scores, ids, self.setting, CANDIDATES * k, exclude, tail=state.filled)
        return scores, ids

    def predict(
        self,
        model: _C.Model,
        context: np.ndarray,
        predicted: np.ndarray,
        k: int,
        exclude: np.ndarray | None,
        threads: int,
        own: Own | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """In one call without the GIL. Own rows are looked for among the k best, and not in a search of their own."""
        n = len(context)
        scores, ids = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
        state, candidates = self._state, CANDIDATES * k
        state.native.predict(
            model,
            context,
            predicted,
            scores,
            ids,
            self.setting,
            candidates,
            exclude,
            threads,
            state.filled,
            *(own or ()),
        )
        return scores, ids

    def add(self, vectors: np.ndarray) -> None:
        rows = rotated(vectors, self._parts["signs"])
        if self._state.filled + len(rows) > TAIL:
            self._into_lists(rows)
        else:
            self._append(rows)

    def _append(self, rows: np.ndarray) -> None:
        """To the tail; a search that is under way does not see them."""
        state = self._state
        state.tail.put(state.filled, rows)
        self._state = state._replace(filled=state.filled + len(rows))

    def _into_lists(self, rows: np.ndarray) -> None:
        """The tail and these rotated rows after it; what was removed is left behind."""
        state = self._state
        parts = state.parts
        coder = Coder(parts["centroids"] * parts["centroid_scales"][:, None], float(parts["level"][0]))
        fresh = np.concatenate([state.tail.rows[: state.filled], rows])
        coded = Coded.empty(len(fresh), fresh.shape[1])
        coder.code(fresh, state.tail.first, coded)
        there = np.ones(len(fresh), bool)
        there[: state.filled] = ~np.isnan(state.tail.scales[: state.filled])
        both = zip(unpacked(parts), coded.where(there), strict=True)
        packed = Coded(*(np.concatenate(each) for each in both)).packed(len(parts["sizes"]))
        self._state = _State.of({**parts, **packed}, state.tail.first + len(fresh))

    def remove(self, ids: np.ndarray) -> None:
        state = self._state
        late = ids[ids >= state.tail.first] - state.tail.first
        state.tail.scales[late] = np.nan
        positions = self._positions(state)[ids[ids < state.tail.first]]
        slots = Places(state.parts["sizes"]).slots(positions[positions >= 0].astype(np.int64))
        factors_of(state.parts["blocks"])[slots // ROWS, slots % ROWS] = np.nan

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        state = self._state
        found = np.zeros((len(ids), state.parts["codes"].shape[1]), np.float32)
        late = ids - state.tail.first
        positions = self._positions(state)[np.where(late < 0, ids, 0)]
        sources = (
            ((late < 0) & (positions >= 0), positions, state.parts["codes"], state.parts["scales"]),
            ((late >= 0) & (late < state.filled), late, state.tail.codes, state.tail.scales),
        )
        for there, places, codes, scales in sources:
            rows = places[there]
            found[there] = codes[rows] * np.nan_to_num(scales[rows])[:, None]  # NaN where one has just been removed
        return turned_back(found, state.parts["signs"])

    def _positions(self, state: _State) -> np.ndarray:
        """Of rows in lists, int32 by id; -1 for one that was dropped. Made when it is first needed."""
        held = self._held
        if held is None or held[0] is not state.parts:
            held = state.parts, np.full(max(1, state.tail.first), -1, np.int32)
            held[1][state.parts["ids"]] = np.arange(len(state.parts["ids"]))
            self._held = held
        return held[1]

    @property
    def bounds(self) -> tuple[int, int]:
        return 1, len(self._parts["sizes"])

    @property
    def error(self) -> float:
        """Six standard deviations of the score of a vector of length 1, its components rounded to whole steps."""
        state = self._state
        most = max(state.parts["scales"].max(initial=0), np.fmax.reduce(state.tail.scales[: state.filled], initial=0))
        return float(6 * most / 12**0.5)

    def reads(self, queries: np.ndarray) -> float:
        state = self._state
        sizes, centroids = state.parts["sizes"], state.parts["centroids"]
        near = rotated(queries, state.parts["signs"]) @ (centroids * state.parts["centroid_scales"][:, None]).T
        probed = np.argpartition(-near, (self.setting or 1) - 1, axis=1)[:, : self.setting]
        of_row = state.parts["blocks"].shape[1]
        of_lists = of_row * (len(sizes) + sizes[probed].sum(axis=1).mean())
        scored = min(CANDIDATES * NEIGHBOURS, len(state.parts["ids"])) + state.filled + len(probed[0])
        return float(of_lists + scored * centroids.shape[1])


def _read(folder: Path, shape: Shape, mapped: bool) -> dict[str, np.ndarray]:
    """All parts but the tail. Raises IntegrityError."""
    dim, nlist = shape.dim, shape.nlist or 0

    def read(part: str, dtype: str, size: tuple[int, ...], left: bool = False) -> np.ndarray:
        found = map_array(folder / f"{part}.npy", dtype, size, faiss_file.REMEDY, "c" if left else "r")
        return found if left else np.array(found)

    sizes = read("sizes", "int64", (nlist + 1,))
    bounds = sizes.min() >= 0 and sizes.max() <= shape.count and sizes[-1] <= TAIL
    if not bounds or not shape.count - shape.gone <= int(sizes.sum()) <= shape.count:
        raise IntegrityError(
            f"{folder / 'sizes.npy'} holds lists that do not have {shape.count - shape.gone} rows together: "
            f"{faiss_file.REMEDY}"
        )
    n = int(sizes[:-1].sum())
    parts = {
        "signs": read("signs", "float32", (_C.ROTATION_ROUNDS, dim)),
        "centroids": read("centroids", "int8", (nlist, dim)),
        "centroid_scales": read("centroid_scales", "float32", (nlist,)),
        "level": read("level", "float32", (1,)),
        "sizes": sizes,
        "ids": read("ids", "int32", (n,)),
        "blocks": read("blocks", "uint8", (Places(sizes[:-1]).blocks, layers(dim), ROWS), mapped),
        "codes": _scattered(read("codes", "int8", (n, dim), mapped)),
        "scales": read("scales", "float32", (n,)),
    }
    _check(folder, parts, shape.count - int(sizes[-1]))
    return parts


def _scattered(codes: np.ndarray) -> np.ndarray:
    """The same. A mapped row is read alone: what the system would read after it, by itself, is of no use."""
    if isinstance(codes.base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
        codes.base.madvise(mmap.MADV_RANDOM)
    return codes


def _check(folder: Path, parts: dict[str, np.ndarray], count: int) -> None:
    ids = np.sort(parts["ids"])
    if len(ids) and (ids[0] < 0 or ids[-1] >= count or (ids[1:] == ids[:-1]).any()):
        raise IntegrityError(
            f"{folder / 'ids.npy'} has ids that are not 0 to {count - 1}, each once: {faiss_file.REMEDY}"
        )
    positive: Callable[[np.ndarray], np.ndarray] = lambda values: np.isfinite(values) & (values >= 0)  # noqa: E731
    factors = factors_of(parts["blocks"])
    good = {
        "centroid_scales": (parts["centroid_scales"], positive(parts["centroid_scales"])),
        "scales": (parts["scales"], positive(parts["scales"])),
        "signs": (parts["signs"], np.abs(parts["signs"]) == 1),
        "level": (parts["level"], np.isfinite(parts["level"])),
        "blocks": (factors, positive(factors) | np.isnan(factors)),
    }
    for part, (values, each) in good.items():
        if not each.all():
            raise IntegrityError(
                f"{folder / part}.npy holds {values[~each][0]}, which no index has: {faiss_file.REMEDY}"
            )
