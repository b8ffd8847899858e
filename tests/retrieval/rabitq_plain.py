"""What the tests of inverted lists of RaBitQ codes share: drawn vectors, built searchers, and numpy in float64."""

from __future__ import annotations

import functools

import numpy as np

from fastlvm import _C
from fastlvm.retrieval.coding import factors_of, rotated
from fastlvm.retrieval.rabitq import IvfRabitq
from fastlvm.retrieval.vectors import Vectors

EPS = float(np.finfo(np.float32).eps)
SIZES = (0, 1, 1500, 33, 0, 31, 64, 5)  # rows around each centroid; a scan takes 1024 at once, in blocks of 32
FULL = (40, 1, 1100, 33, 90, 31, 64, 5)


class Given(Vectors):
    """Vectors that are no payload's."""

    def __init__(self, vectors):
        self.rows, self.dim, self.centroids = np.arange(len(vectors)), vectors.shape[1], {}
        self._vectors = vectors

    def take(self, ids):
        return self._vectors[ids]


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def crowds(dim, sizes=SIZES, seed=0):
    """Vectors, and the centroids that as many of them as `sizes` says lie around, in no order."""
    centroids = normal(len(sizes), dim, seed=seed)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    owners = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    return centroids[owners] + np.float32(0.3 / dim**0.5) * normal(len(owners), dim, seed=seed + 1), centroids


def around(rows, centroids):
    """A searcher of rows in lists of these centroids."""
    vectors = Given(rows)
    vectors.centroids[len(centroids), 0] = centroids
    return IvfRabitq.build(vectors, len(centroids), 0)


@functools.cache
def built(dim, sizes=SIZES):
    """The searcher of `crowds`, the same in every test."""
    return around(*crowds(dim, sizes))


@functools.cache
def plainly(dim, sizes=SIZES):
    return Plain(built(dim, sizes))


def search(searcher, queries, k, nprobe, candidates, excluded=None, threads=0):
    scores, ids = np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)
    state = searcher._state
    state.native.search(queries, scores, ids, nprobe, candidates, excluded, threads, state.filled)
    return scores, ids


def same(got, wanted):
    """To the last bit."""
    return all(one.tobytes() == other.tobytes() for one, other in zip(got, wanted, strict=True))


class Plain:
    """What the lists of a searcher say, in float64: rows in the order of their ids, without those that were removed."""

    def __init__(self, searcher):
        parts = searcher._parts
        self.signs, sizes = parts["signs"], parts["sizes"]
        self.dim, self.nlist, self.n = self.signs.shape[1], len(sizes), int(sizes.sum())
        blocks = -(-sizes // _C.BLOCK_ROWS)
        begins = np.cumsum(blocks) - blocks
        places = np.concatenate([_C.BLOCK_ROWS * b + np.arange(size) for b, size in zip(begins, sizes, strict=True)])
        columns = parts["blocks"][:, :-4].transpose(0, 2, 1).reshape(-1, parts["blocks"].shape[1] - 4)[places]
        factors = factors_of(parts["blocks"]).reshape(-1)[places]
        order = np.argsort(parts["ids"])
        order = order[~np.isnan(factors[order])]
        self.ids = parts["ids"][order]
        self.list = np.repeat(np.arange(self.nlist), sizes)[order]
        self.bits = (2.0 * np.unpackbits(columns, axis=1, bitorder="little")[:, : self.dim] - 1)[order]
        self.factors = factors.astype(np.float64)[order]
        self.decoded = (parts["codes"] * parts["scales"][:, None])[order]
        self.centroids = parts["centroids"] * parts["centroid_scales"].astype(np.float64)[:, None]
        self.level = float(parts["level"][0])

    def moved(self, queries):
        return rotated(queries, self.signs)

    def scores(self, queries):
        """[q, n], and how far float32 may be from them: a rounding of every product and sum, twice that for FAISS."""
        moved, rows = self.moved(queries).astype(np.float64), self.decoded.astype(np.float64)
        return moved @ rows.T, (self.dim + 2) * EPS * (np.abs(moved) @ np.abs(rows).T)

    def near(self, queries):
        """<q, centroid> [q, nlist], and how far float32 may be from them."""
        moved = self.moved(queries).astype(np.float64)
        return moved @ self.centroids.T, (self.dim + 2) * EPS * (np.abs(moved) @ np.abs(self.centroids).T)

    def near_estimates(self, queries):
        """What centroids are ranked by before the best are scored, and how far it may be: as if rows of one list."""
        moved = self.moved(queries).astype(np.float64)
        mean = self.centroids.mean(axis=0)
        residual = self.centroids - mean
        sizes = np.abs(residual).sum(axis=1)
        factors = np.divide(np.square(residual).sum(axis=1), sizes, out=np.zeros(self.nlist), where=sizes > 0)
        most, size = np.abs(self.centroids).max(), np.abs(moved).sum(axis=1, keepdims=True)
        either = np.abs(residual) <= 2 * self.nlist * EPS * most  # signs that rounding decides
        off = self.table(moved)[:, None] + 2 * np.abs(moved) @ either.T + 2 * self.dim * EPS * size
        found = (moved @ mean)[:, None] + factors * (moved @ np.sign(residual).T)
        return found, factors * off + (self.dim + self.nlist) * EPS * most * size

    def estimates(self, queries):
        """factor <q, sign r> [q, n], and how far the scan's may be."""
        moved = self.moved(queries).astype(np.float64)
        return self.factors * (moved @ self.bits.T), self.factors * self.table(moved)[:, None]

    def table(self, moved):
        """How far <q, sign r> may be, for any signs.

        An entry of the table is a whole number of steps, 63 of them (fewer where 16 bits would not hold all) for the
        sum of sizes of the four coordinates where that is largest; it counts twice. So each is off by half a step.
        """
        pairs = -(-self.dim // 16)
        fours = np.abs(np.pad(moved, ((0, 0), (0, 16 * pairs - self.dim)))).reshape(len(moved), -1, 4).sum(axis=2)
        step = 2 * fours.max(axis=1) / min(63, 65535 // (4 * pairs))
        off = (
            -(-self.dim // 4) * (0.5 + 64 * 8 * EPS) * step
        )  # 8 roundings of numbers up to 64 before an entry is whole
        return off + (self.dim + 8) * EPS * fours.sum(axis=1)

    def codes(self, rows):
        """Hold that vectors [n, dim], in the order of the ids, have the nearest lists and their residuals' codes."""
        moved = self.moved(rows).astype(np.float64)
        near = moved @ self.centroids.T
        rounding = (self.dim + 2) * EPS * np.abs(moved).max(axis=1) * np.abs(self.centroids).sum(axis=1).max()
        assert (near[np.arange(len(rows)), self.list] >= near.max(axis=1) - 2 * rounding).all()
        centroids = self.level * self.centroids[self.list]
        residual, off = moved - centroids, 2 * EPS * (np.abs(moved) + np.abs(centroids)).max()
        assert ((np.sign(residual) == self.bits) | (np.abs(residual) <= off)).all()
        size, square = np.abs(residual).sum(axis=1), np.square(residual).sum(axis=1)
        known = size > 4 * self.dim * off  # else it is all rounding
        assert known.any()
        factors, size, square = self.factors[known], size[known], square[known]
        wanted = square / size
        allowed = (2 + self.dim * square / size**2) * off / (1 - self.dim * off / size) + (self.dim + 4) * EPS * wanted
        assert (np.abs(factors - wanted) <= allowed).all()
