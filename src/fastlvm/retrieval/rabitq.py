"""Inverted lists of RaBitQ codes (Gao and Long, SIGMOD 2024), searched by our own scan.

A vector has one bit a dimension, the signs of its residual to the list's centroid in randomly rotated coordinates, by
which the lists are scanned, and eight bits a dimension, by which the best of the scan are scored. FAISS trains the
centroids and assigns vectors to them. Files, all `.npy`; rows are in the order of the lists:

signs float32 [4, dim] of the rotation; centroids int8 [nlist, dim] and centroid_scales float32 [nlist], of length 1;
level float32 [1], what they are multiplied by before residuals are taken; sizes int64 [nlist]; ids int32 [n]; bits
uint8 [blocks, columns, 32], column b of a row holding dimensions 8b … 8b + 7; factors float32 [n]; codes int8 [n, dim]
and scales float32 [n].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastlvm import _C
from fastlvm.data.npz import map_array
from fastlvm.errors import IntegrityError
from fastlvm.retrieval import faiss_file
from fastlvm.retrieval.faiss_kinds import centroids as trained
from fastlvm.retrieval.searcher import Searcher, Shape
from fastlvm.retrieval.vectors import Vectors

CANDIDATES = 8
"""Rows scored by eight bits for every one that is asked for."""

_SAMPLE = 8192  # rows that the level is chosen by

_PARTS = ("signs", "centroids", "centroid_scales", "level", "sizes", "ids", "bits", "factors", "codes", "scales")


class IvfRabitq(Searcher):
    """Scores are those of the eight bits; centroids have eight bits too."""

    FILES = tuple(f"{part}.npy" for part in _PARTS)
    SETTING = "nprobe"
    LISTS = True

    def __init__(self, parts: dict[str, np.ndarray], nprobe: int) -> None:
        self._parts = parts
        self.setting: int | None = nprobe
        self._native = _C.Searcher(parts)

    @classmethod
    def build(cls, vectors: Vectors, nlist: int | None, seed: int) -> Searcher:
        assert nlist is not None
        rng = np.random.default_rng(seed)
        signs = rng.choice(np.array([-1, 1], np.float32), (_C.ROTATION_ROUNDS, vectors.dim))
        centroids, centroid_scales = quantised(rotated(trained(vectors, nlist, seed), signs))
        lists = _Assigned(
            centroids * centroid_scales[:, None], rotated(vectors.sample(_SAMPLE, seed), signs), len(vectors)
        )
        for first, block in vectors.blocks():
            lists.add(first, rotated(block, signs))
        named = {"signs": signs, "centroids": centroids, "centroid_scales": centroid_scales, **lists.parts()}
        return cls({part: np.ascontiguousarray(named[part]) for part in _PARTS}, 1)

    @classmethod
    def open(cls, folder: Path, shape: Shape) -> Searcher:
        n, dim, nlist = shape.count, shape.dim, shape.nlist or 0

        def read(part: str, dtype: str, size: tuple[int, ...]) -> np.ndarray:
            return np.array(map_array(folder / f"{part}.npy", dtype, size, faiss_file.REMEDY))

        sizes = read("sizes", "int64", (nlist,))
        if sizes.min(initial=0) < 0 or sizes.max(initial=0) > n or int(sizes.sum()) != n:
            raise IntegrityError(
                f"{folder / 'sizes.npy'} holds lists that do not have {n} rows together: {faiss_file.REMEDY}"
            )
        blocks = int(-(-sizes // _C.BLOCK_ROWS).sum())
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {
            "signs": ("float32", (_C.ROTATION_ROUNDS, dim)),
            "centroids": ("int8", (nlist, dim)),
            "centroid_scales": ("float32", (nlist,)),
            "level": ("float32", (1,)),
            "ids": ("int32", (n,)),
            "bits": ("uint8", (blocks, _columns(dim), _C.BLOCK_ROWS)),
            "factors": ("float32", (n,)),
            "codes": ("int8", (n, dim)),
            "scales": ("float32", (n,)),
        }
        parts = {"sizes": sizes, **{part: read(part, *layout) for part, layout in wanted.items()}}
        if not np.array_equal(np.sort(parts["ids"]), np.arange(n, dtype=np.int32)):
            raise IntegrityError(
                f"{folder / 'ids.npy'} has ids that are not 0 to {n - 1}, each once: {faiss_file.REMEDY}"
            )
        positive = ("centroid_scales", "factors", "scales")
        good = {part: np.isfinite(parts[part]) & (parts[part] >= 0) for part in positive}
        good |= {"signs": np.abs(parts["signs"]) == 1, "level": np.isfinite(parts["level"])}
        for part, each in good.items():
            if not each.all():
                raise IntegrityError(
                    f"{folder / part}.npy holds {parts[part][~each][0]}, which no index has: {faiss_file.REMEDY}"
                )
        return cls(parts, shape.setting or 1)

    def save(self, folder: Path) -> None:
        for part in _PARTS:
            np.save(folder / f"{part}.npy", self._parts[part], allow_pickle=False)

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        scores, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        self._native.search(queries, scores, ids, self.setting, CANDIDATES * k, exclude)
        return scores, ids

    def predict(
        self, model: _C.Model, context: np.ndarray, k: int, exclude: np.ndarray | None, threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """In one call without the GIL."""
        n = len(context)
        scores, ids = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
        predicted = np.empty((n, model.out_dim), np.float32)
        self._native.predict(model, context, predicted, scores, ids, self.setting, CANDIDATES * k, exclude, threads)
        return scores, ids

    @property
    def bounds(self) -> tuple[int, int]:
        return 1, len(self._parts["sizes"])

    @property
    def error(self) -> float:
        """Six standard deviations of the score of a vector of length 1, its components rounded to whole steps."""
        return float(6 * self._parts["scales"].max(initial=0) / 12**0.5)

    def reads(self, queries: np.ndarray) -> float:
        sizes, centroids = self._parts["sizes"], self._parts["centroids"]
        near = rotated(queries, self._parts["signs"]) @ (centroids * self._parts["centroid_scales"][:, None]).T
        probed = np.argpartition(-near, (self.setting or 1) - 1, axis=1)[:, : self.setting]
        row = self._parts["bits"].shape[1] + 4
        return float(centroids.nbytes + row * sizes[probed].sum(axis=1).mean())


def rotated(rows: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Rows float32 [n, dim] in the coordinates of the lists, lengths and inner products as they were."""
    moved = np.array(rows, np.float32, order="C")
    _C.rotate(signs, moved)
    return moved


def quantised(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [n, dim] and the float32 [n] that a step of 1 is worth: the largest component becomes 127."""
    most = np.abs(rows).max(axis=1, initial=0)
    scales = np.where(most > 1e-30, most / np.float32(127), 0).astype(np.float32)
    inverse = np.where(scales > 0, 1 / np.where(scales > 0, scales, 1), 0).astype(np.float32)
    return np.rint(rows * inverse[:, None]).clip(-127, 127).astype(np.int8), scales


def _columns(dim: int) -> int:
    """Bytes of a row's bits, even."""
    return -(-dim // 16) * 2


class _Assigned:
    """Rows coded and put into lists as they come, in their order."""

    def __init__(self, centroids: np.ndarray, sample: np.ndarray, rows: int) -> None:
        """centroids float32 [nlist, dim]; sample: some of the rows, by which the level is chosen."""
        import faiss

        dim = centroids.shape[1]
        self._index = faiss.IndexFlatIP(dim)
        self._index.add(centroids)
        # Least squares: centroids have length 1, and their lists' means are shorter.
        near = self._index.search(sample, 1)[0]
        square = np.square(centroids).sum(axis=1).mean()
        self._level = np.float32(near.mean() / square if square > 0 else 0)
        self._centroids = centroids * self._level
        self._list = np.empty(rows, np.int64)
        self._bits = np.empty((rows, _columns(dim)), np.uint8)
        self._codes = np.empty((rows, dim), np.int8)
        self._factors, self._scales = np.empty(rows, np.float32), np.empty(rows, np.float32)

    def add(self, first: int, rows: np.ndarray) -> None:
        """Rotated rows float32 [n, dim], with ids from `first` on."""
        at = slice(first, first + len(rows))
        self._list[at] = self._index.search(rows, 1)[1][:, 0]
        residual = rows - self._centroids[self._list[at]]
        size = np.abs(residual).sum(axis=1)
        self._factors[at] = np.where(size > 0, np.square(residual).sum(axis=1) / np.where(size > 0, size, 1), 0)
        bits = np.packbits(residual > 0, axis=1, bitorder="little")
        self._bits[at, : bits.shape[1]], self._bits[at, bits.shape[1] :] = bits, 0
        self._codes[at], self._scales[at] = quantised(rows)

    def parts(self) -> dict[str, np.ndarray]:
        order = np.argsort(self._list, kind="stable")
        sizes = np.bincount(self._list, minlength=len(self._centroids))
        blocks = -(-sizes // _C.BLOCK_ROWS)
        # A row's place among the blocks: those of the lists before its own, then its place in the list.
        starts = np.repeat(_C.BLOCK_ROWS * (np.cumsum(blocks) - blocks) - (np.cumsum(sizes) - sizes), sizes)
        padded = np.zeros((int(blocks.sum()) * _C.BLOCK_ROWS, self._bits.shape[1]), np.uint8)
        padded[starts + np.arange(len(order))] = self._bits[order]
        bits = padded.reshape(-1, _C.BLOCK_ROWS, padded.shape[1]).transpose(0, 2, 1)
        return {
            "level": np.array([self._level]),
            "sizes": sizes.astype(np.int64),
            "ids": order.astype(np.int32),
            "bits": np.ascontiguousarray(bits),
            "factors": self._factors[order],
            "codes": self._codes[order],
            "scales": self._scales[order],
        }
