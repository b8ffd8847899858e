"""What a kind of index has to be: a class of this shape, to which `kinds.KINDS` gives a name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from fastlvm import _C
from fastlvm.retrieval.vectors import Vectors

NEIGHBOURS = 50
"""How many neighbours recall is measured over."""

SETTINGS = ("nprobe", "ef_search")
"""Names that the setting of a kind may have."""


@dataclass(frozen=True)
class Shape:
    """What is known of a searcher: `count` vectors of `dim` floats, in `nlist` lists, and its setting.

    gone: how many of them were removed, which it may have or not.
    """

    dim: int
    count: int
    nlist: int | None
    setting: int | None
    gone: int = 0


OWN_ROWS = 8
"""Rows that one vector of a context may be, at most."""


class Own(NamedTuple):
    """What tells the rows that a context's own vectors are from others.

    into_space moves a vector of the context into the space; a row is one if it scores at least `score` with it, and no
    less than its best but for `tie`, the searcher's error apart.
    """

    into_space: _C.Model
    score: float
    tie: float


class Searcher(Protocol):
    """Vectors 0 to count - 1, and a search for those of highest inner product.

    One thread at a time changes it, while others search: what they find is what it was at some time of the search.

    FILES: plain names of the files that `save` writes, always all of them. SETTING: the name of what trades recall for
    time, "nprobe" or "ef_search"; None for an exact kind. LISTS: whether it has inverted lists, whose number is nlist.
    MAPS: whether its large files can stay on disk.
    """

    FILES: ClassVar[tuple[str, ...]]
    SETTING: ClassVar[str | None]
    LISTS: ClassVar[bool]
    MAPS: ClassVar[bool] = False

    setting: int | None

    @classmethod
    def build(cls, vectors: Vectors, nlist: int | None, seed: int) -> Searcher:
        """A searcher of `vectors`, the same for the same arguments. nlist: None for a kind without lists."""
        ...

    @classmethod
    def open(cls, folder: Path, shape: Shape, mapped: bool = False) -> Searcher:
        """What `save` wrote. Raises IntegrityError where a file does not fit `shape`, before anything is allocated.

        mapped: leave the large files on disk; for a kind that MAPS.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write FILES into a folder, with what was removed or without. Raises OSError where that cannot be."""
        ...

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 [n, k] and ids int64 [n, k], best first; where fewer are found, id -1 and any score.

        queries: float32 [n, dim], C-contiguous, finite. 1 ≤ k ≤ count. exclude: ids int64 [n, m] that are not to be
        found, in any order, perhaps repeated, -1 = none.
        """
        ...

    def add(self, vectors: np.ndarray) -> None:
        """Add vectors float32 [m, dim], C-contiguous, finite and in the space: they are count to count + m - 1."""
        ...

    def remove(self, ids: np.ndarray) -> None:
        """Never find ids int64 [m] again, of which none was removed before; their numbers stay taken."""
        ...

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """Vectors float32 [m, dim] of ids int64 [m] as they are held, rounded perhaps; zeros for one that is not there.

        One that was removed may be there or not.
        """
        ...

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
        """`search` for what a model makes of contexts float32 [n, positions, dim]; threads: of what is our own.

        predicted: float32 [n, dim] that the model's predictions are written to. own: leave out what a context's
        vectors are, instead of `exclude`.
        """
        if own is not None:
            exclude = self._own_rows(own, context, threads)
        model.run(context, predicted, threads)
        return self.search(predicted, k, exclude)

    def _own_rows(self, own: Own, context: np.ndarray, threads: int) -> np.ndarray:
        """ids int64 [n, m], -1 = none"""
        n, positions, dim = context.shape
        moved = np.empty((n * positions, own.into_space.out_dim), np.float32)
        own.into_space.run(context.reshape(-1, 1, dim), moved, threads)
        scores, ids = self.search(moved, OWN_ROWS)
        same = (scores >= own.score - self.error) & (scores >= scores[:, :1] - own.tie - 2 * self.error)
        return np.where(same, ids, -1).reshape(n, positions * OWN_ROWS)

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the greatest setting worth trying; (1, 1) for an exact kind."""
        ...

    @property
    def error(self) -> float:
        """How far the score of a vector of length 1 may be from its inner product, beyond rounding; 0 if they agree."""
        ...

    def reads(self, queries: np.ndarray) -> float:
        """Bytes that a search for one of `queries` [n, dim] goes through, in the mean: nlist is chosen by it."""
        ...
