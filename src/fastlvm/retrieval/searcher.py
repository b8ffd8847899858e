"""What a kind of index has to be: a class of this shape, to which `kinds.KINDS` gives a name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from fastlvm import _C
from fastlvm.retrieval.vectors import Vectors

NEIGHBOURS = 50
"""How many neighbours recall is measured over."""

SETTINGS = ("nprobe", "ef_search")
"""Names that the setting of a kind may have."""


@dataclass(frozen=True)
class Shape:
    """What index.json says of a searcher: `count` vectors of `dim` floats, in `nlist` lists, and its setting."""

    dim: int
    count: int
    nlist: int | None
    setting: int | None


class Searcher(Protocol):
    """Vectors 0 to count - 1, and a search for those of highest inner product. Only its setting ever changes.

    FILES: plain names of the files that `save` writes, always all of them. SETTING: the name of what trades recall for
    time, "nprobe" or "ef_search"; None for an exact kind. LISTS: whether it has inverted lists, whose number is nlist.
    """

    FILES: ClassVar[tuple[str, ...]]
    SETTING: ClassVar[str | None]
    LISTS: ClassVar[bool]

    setting: int | None

    @classmethod
    def build(cls, vectors: Vectors, nlist: int | None, seed: int) -> Searcher:
        """A searcher of `vectors`, the same for the same arguments. nlist: None for a kind without lists."""
        ...

    @classmethod
    def open(cls, folder: Path, shape: Shape) -> Searcher:
        """What `save` wrote. Raises IntegrityError where a file does not fit `shape`, before anything is allocated."""
        ...

    def save(self, folder: Path) -> None:
        """Write FILES into a folder that exists. Raises OSError where they cannot be written."""
        ...

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 [n, k] and ids int64 [n, k], best first; where fewer are found, id -1 and any score.

        queries: float32 [n, dim], C-contiguous, finite. 1 ≤ k ≤ count. exclude: ids int64 [n, m] that are not to be
        found, in any order, perhaps repeated, -1 = none.
        """
        ...

    def predict(
        self, model: _C.Model, context: np.ndarray, k: int, exclude: np.ndarray | None, threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """`search` for what a model makes of contexts float32 [n, positions, dim]; threads: of what is our own."""
        predicted = np.empty((len(context), model.out_dim), np.float32)
        model.run(context, predicted, threads)
        return self.search(predicted, k, exclude)

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
