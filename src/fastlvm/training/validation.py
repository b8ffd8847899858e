"""How well predictions find the targets of validation windows: exact search, the context left out."""

from __future__ import annotations

import numpy as np

from fastlvm.evaluation.bootstrap import Bootstrap
from fastlvm.evaluation.ranks import exact_ranks


def key(metric: str) -> str:
    """What the history calls a metric of a report."""
    return f"val_{metric.lower()}"


class Validation:
    """The metrics of a report over all rows of the payload, and R@5 over those of articles that are not trained on.

    The latter does not rise where training merely pushes rows down that it knows.

    groups      int64 [N], duplicate groups.
    rows        int64 [n, L + 1], payload rows of the windows, the target last.
    trained     bool [N], whether a row's article is trained on.
    """

    def __init__(self, groups: np.ndarray, rows: np.ndarray, trained: np.ndarray) -> None:
        self.rows, self._groups = rows, groups
        self._unseen = np.flatnonzero(~trained)
        place = np.full(len(groups), -1)
        place[self._unseen] = np.arange(len(self._unseen))
        self._places = place[self.rows]
        # The smallest row of a group among these.
        _, first, group = np.unique(groups[self._unseen], return_index=True, return_inverse=True)
        self._unseen_groups = first[group].astype(np.int64)

    def figures(self, predicted: np.ndarray, vectors: np.ndarray) -> dict[str, float | None]:
        """predicted float32 [n, dim], of `rows`; vectors float32 [N, dim], the payload. All but the cosine."""
        found = exact_ranks(predicted, vectors, self.rows[:, -1], self.rows[:, :-1], self._groups)
        rest = _Rows(vectors, self._unseen)
        unseen = exact_ranks(predicted, rest, self._places[:, -1], self._places[:, :-1], self._unseen_groups)
        nothing = np.zeros(len(found))
        metrics = Bootstrap(nothing, resamples=1).summarise(found, cosine=nothing)  # one article, so no intervals
        figures = {key(name): one.value for name, one in metrics.items() if name != "cosine"}
        return {**figures, "val_r@5_unseen": float(np.mean(unseen <= 5))}


class _Rows:
    """Some rows of an array, read where they are asked for."""

    def __init__(self, vectors: np.ndarray, rows: np.ndarray) -> None:
        self._vectors, self.rows = vectors, rows
        self.shape = len(rows), vectors.shape[1]

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        return self._vectors[self.rows[index]]
