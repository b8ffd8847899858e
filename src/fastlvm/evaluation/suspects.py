"""Predictions that are too good or too simple to come from a model: the truth, the last row, one vector for all."""

from __future__ import annotations

import numpy as np

from fastlvm.data.alignment import cosine
from fastlvm.data.rows import normalised
from fastlvm.errors import InputError
from fastlvm.evaluation.findings import FAULT, WARNING, Finding
from fastlvm.evaluation.ranks import checked_predictions

EQUAL = 0.999
"""Mean cosine from which predictions are what they are compared with; weights of one byte stay above it."""

CLOSER = 0.02
"""Part of the distance between last row and truth that predictions may keep from what they are said to equal. Where
neighbours are nearly equal, everything has cosine 0.999 to everything, and that says nothing."""

LEAST_WINDOWS = 8
"""Windows below which nothing is said: so few may be alike by chance."""


def model_findings(
    name: str, predictions: np.ndarray, last: np.ndarray, truth: np.ndarray, *, unseen: bool
) -> list[Finding]:
    """Whether predictions [n, d] are the truth, copy-last or constant; the last context vectors and the target vectors
    [n, d] are in the same space.

    unseen: the windows are of articles that the model was not trained on; to know the truth of others by heart is a
    warning only. Windows whose target repeats the last row are left out. Empty where nothing is wrong, and where there
    are fewer than `LEAST_WINDOWS` windows to tell from.

    Raises InputError, naming the model, for predictions that are NaN, infinite or zero.
    """
    last, truth = np.asarray(last, dtype=np.float32), np.asarray(truth, dtype=np.float32)
    if last.ndim != 2 or last.shape != truth.shape:
        raise InputError(f"last is {list(last.shape)} and truth {list(truth.shape)}, and [n, d] is wanted of both")
    predicted = checked_predictions(predictions, (len(truth), truth.shape[1]), f"prediction of {name}")
    told = cosine(last, truth) < EQUAL
    if np.count_nonzero(told) < LEAST_WINDOWS:
        return []
    predicted, last, truth = predicted[told], last[told], truth[told]

    step = 1 - float(cosine(last, truth).mean())
    to_truth, to_last = float(cosine(predicted, truth).mean()), float(cosine(predicted, last).mean())
    mutual, mutual_truth = mutual_cosine(predicted), mutual_cosine(truth)
    figures = {
        "windows": len(predicted),
        "cosine_to_target": to_truth,
        "cosine_to_last": to_last,
        "mutual_cosine": mutual,
        "mutual_cosine_of_targets": mutual_truth,
        "cosine_of_last_to_target": 1 - step,
    }
    found = []
    if _equal(to_truth, step):
        what = "articles it has not seen" if unseen else "its training articles"
        why = "it is given the truth" if unseen else "it knows them by heart or is given the truth"
        found.append(
            Finding(
                "model-returns-truth",
                FAULT if unseen else WARNING,
                f"{name} returns the truth: cosine {to_truth:.4f} to the target on {what} "
                f"({len(predicted)} windows): {why}",
                figures,
            )
        )
    if _equal(to_last, step):
        found.append(
            Finding(
                "model-copies-last",
                FAULT,
                f"{name} equals copy-last: cosine {to_last:.4f} to the last context vector: it predicts nothing",
                figures,
            )
        )
    if _equal(mutual, 1 - mutual_truth):
        found.append(
            Finding(
                "model-constant",
                FAULT,
                f"{name} gives the same vector for every context: its predictions have cosine {mutual:.4f} to each "
                f"other, the targets {mutual_truth:.4f}",
                figures,
            )
        )
    return found


def _equal(found: float, spread: float) -> bool:
    return found >= EQUAL and 1 - found <= CLOSER * spread


def mutual_cosine(vectors: np.ndarray) -> float:
    """Mean cosine of all pairs of rows [n, d], n ≥ 2."""
    n = len(vectors)
    total = normalised(vectors).sum(axis=0, dtype=np.float64)
    return float((total @ total - n) / (n * (n - 1)))
