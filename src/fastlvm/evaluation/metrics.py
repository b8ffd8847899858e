"""What is made of ranks and cosines: the metrics of every window, by name."""

from __future__ import annotations

import numpy as np

from fastlvm.evaluation.ranks import MISS

MEANS = ("R@1", "R@5", "R@10", "MRR@10", "MRR", "Contain@20", "Contain@50", "cosine")
"""Metrics that are means over windows, in the order of the columns of `outcomes`."""

METRICS = ("R@1", "R@5", "R@10", "MRR@10", "MRR", "Contain@20", "Contain@50", "Eff@5", "median_rank", "cosine")
"""All metrics, in the order they are reported. MRR is the mean reciprocal rank, MRR@10 counts ranks up to 10 alone."""

WITHIN = ("R@1", "R@5", "R@10")
"""Metrics of the rank among the chunks of the truth's own article."""


def outcomes(ranks: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Per-window value of every metric of `MEANS`, float64 [n, 8]. A rank of `MISS` counts as a miss in all of them."""
    rank = np.asarray(ranks)
    reciprocal = np.where(rank == MISS, 0.0, 1.0 / rank)
    return np.stack(
        [
            rank <= 1,
            rank <= 5,
            rank <= 10,
            np.where(rank <= 10, reciprocal, 0.0),
            reciprocal,
            rank <= 20,
            rank <= 50,
            np.asarray(cosine, dtype=np.float64),
        ],
        axis=1,
    ).astype(np.float64)


def within_outcomes(ranks: np.ndarray) -> np.ndarray:
    """Per-window value of every metric of `WITHIN`, float64 [n, 3]."""
    return np.stack([ranks <= 1, ranks <= 5, ranks <= 10], axis=1).astype(np.float64)
