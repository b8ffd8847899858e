"""How vectors that are not in a payload are related to the rows that they should be."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastlvm.data.alignment import cosine
from fastlvm.data.rows import normalised

INEXACT = 0.9
"""Mean cosine to the rows from which vectors are those rows, rounded or encoded again, and not in other coordinates."""

ROTATED = 0.005
"""Mean difference of two Gram matrices up to which they are one: an orthogonal map keeps it, and rounding to float16
moves a cosine by under 0.001."""

RELATED = 0.3
"""Correlation of Gram matrices from which two encoders looked at the same texts. Those of unrelated texts have none."""

LEAST_ROWS = 12
"""Rows below which Gram matrices are not compared: a correlation of so few pairs is chance."""

_MOST_ROWS = 1000


class Relation(NamedTuple):
    """kind: "inexact", "rotated", "encoder" or "unrelated"; the mean cosine of each vector with its row; of the two
    Gram matrices' pairs the mean difference and the correlation, None where there are too few.
    """

    kind: str
    cosine: float
    gram_difference: float | None
    gram_correlation: float | None


def relation(held: np.ndarray, rows: np.ndarray) -> Relation:
    """Compare vectors float32 [n, dim] with the rows [n, dim] that they should be, n ≥ 1."""
    held, rows = held[:_MOST_ROWS], rows[:_MOST_ROWS]
    same = float(cosine(held, rows).mean())
    difference: float | None = None
    correlation: float | None = None
    if len(held) >= LEAST_ROWS:
        pairs = np.triu_indices(len(held), 1)
        ours, theirs = (vectors @ vectors.T for vectors in (normalised(held), normalised(rows)))
        a, b = ours[pairs].astype(np.float64), theirs[pairs].astype(np.float64)
        difference = float(np.abs(a - b).mean())
        spread = a.std() * b.std()
        correlation = float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 0 else 0.0
    if same >= INEXACT:
        kind = "inexact"
    elif difference is not None and difference <= ROTATED:
        kind = "rotated"
    elif correlation is not None and correlation >= RELATED:
        kind = "encoder"
    else:
        kind = "unrelated"
    return Relation(kind, same, difference, correlation)
