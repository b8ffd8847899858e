"""Lengths of vectors, and the shape of the space they are in."""

from __future__ import annotations

import numpy as np

from fastlvm.data import Payload
from fastlvm.data.alignment import cosine, random_pair_cosine
from fastlvm.data.rows import norms
from fastlvm.evaluation.diagnose.drawn import Drawn
from fastlvm.evaluation.findings import FAULT, OK, Figure, Finding, percent

UNIT = 0.01
"""Distance of a length from 1 that rounding does not explain: float16 leaves 0.001."""

_ROWS = 20_000
"""Payload rows that are looked at."""


def check_vectors(drawn: Drawn, payload: Payload, seed: int) -> list[Finding]:
    """Are held vectors and payload rows finite and of length 1?"""
    findings = []
    if drawn.broken.any():
        share = float(drawn.broken.mean())
        first = int(drawn.index[np.argmax(drawn.broken)])
        sentence = f"{percent(share)} of the windows hold NaN, infinity or a zero vector (first: window {first})"
        findings.append(Finding("windows-not-finite", FAULT, sentence, {"windows": share, "first": first}))
    own = norms(payload.take(_rows(payload, seed)))
    for what, lengths in (("held vectors", drawn.lengths[~drawn.broken]), ("payload rows", own)):
        off = np.abs(lengths - 1) > UNIT
        if off.any():
            share, median = float(off.mean()), float(np.median(lengths))
            sentence = (
                f"vectors are not normalised: {percent(share)} of the {what} have another length than 1 "
                f"(median {median:.3g}), and inner products rank long vectors first"
            )
            figures: dict[str, Figure] = {"share": share, "median_length": median, "of": what}
            findings.append(Finding("not-normalised", FAULT, sentence, figures))
    if not findings:
        sentence = "vectors have length 1, those of the windows and those of the payload"
        findings.append(Finding("normalised", OK, sentence, {"windows": len(drawn.index), "rows": len(own)}))
    return findings


def describe_space(payload: Payload, seed: int) -> list[Finding]:
    """Effective dimension, mean vector, and cosines of neighbours and of random pairs; no fault comes of these."""
    rows = _rows(payload, seed)
    vectors = payload.take(rows)
    mean = vectors.mean(axis=0, dtype=np.float64)
    centred = (vectors - mean).astype(np.float32)
    covariance = (centred.T @ centred).astype(np.float64) / len(rows)
    squares = float((covariance**2).sum())
    dimension = float(np.trace(covariance) ** 2 / squares) if squares > 0 else 0.0
    follows = rows[(rows + 1 < len(payload))]
    follows = follows[(payload.keys[follows + 1].astype(np.int64) - payload.keys[follows] == [0, 1]).all(axis=1)]
    figures: dict[str, Figure] = {
        "effective_dimension": dimension,
        "dimension": payload.dim,
        "mean_vector_norm": float(np.linalg.norm(mean)),
        "random_pair_cosine": random_pair_cosine(payload, seed),
        "adjacent_cosine": None,
        "rows": len(rows),
    }
    neighbours = ""
    if len(follows):
        adjacent = float(cosine(payload.take(follows), payload.take(follows + 1)).mean())
        figures["adjacent_cosine"] = adjacent
        neighbours = f"; adjacent chunks have cosine {adjacent:.3f}, random pairs {figures['random_pair_cosine']:.3f}"
    sentence = (
        f"effective dimension {dimension:.1f} of {payload.dim}, mean vector of length "
        f"{figures['mean_vector_norm']:.3f}{neighbours}"
    )
    return [Finding("space", OK, sentence, figures)]


def _rows(payload: Payload, seed: int) -> np.ndarray:
    """Up to `_ROWS` rows of the payload, a seeded draw, in order."""
    if len(payload) <= _ROWS:
        return np.arange(len(payload))
    return np.sort(np.random.default_rng(seed).choice(len(payload), _ROWS, replace=False))
