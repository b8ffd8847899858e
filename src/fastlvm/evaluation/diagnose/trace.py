"""Where windows come from: looked up by their keys, and those that are not there, by their vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastlvm.data import Payload
from fastlvm.data.alignment import SAME, cosine, window_keys
from fastlvm.evaluation.diagnose.drawn import Drawn, nearest

TRACED = 500
"""Most windows that are looked for by their vectors, which is an exact search for each of their vectors."""


@dataclass(frozen=True)
class Traced:
    """Windows that are not what their keys stand for, or have none: where their vectors are in the payload.

    at int64 [t]: which of the drawn ones. start int64 [t]: the row of the context's oldest chunk where the context is a
    run of rows, forward or backward, -1 where it is neither. backward bool [t]: the rows fall. nearest int64
    [t, L + 1]: the payload's nearest row to each vector; near float32 [t, L + 1]: its cosine.
    """

    at: np.ndarray
    start: np.ndarray
    backward: np.ndarray
    nearest: np.ndarray
    near: np.ndarray


def keyed_rows(drawn: Drawn, payload: Payload) -> np.ndarray | None:
    """Payload rows of the keys of every chunk of the windows: int64 [m, L + 1], -1 = none; None without keys."""
    if drawn.keys is None:
        return None
    return payload.rows_of(window_keys(drawn.keys, drawn.vectors.shape[1] - 1))


def cosines_to(vectors: np.ndarray, rows: np.ndarray, payload: Payload) -> np.ndarray:
    """Cosine of vectors [..., dim] of length 1 with payload rows [...]: float64, NaN where the row is -1."""
    found = np.full(rows.shape, np.nan)
    there = (rows >= 0) & (rows < len(payload))
    for part in np.array_split(np.flatnonzero(there), max(1, there.sum() // 4096)):
        found.flat[part] = cosine(vectors.reshape(-1, vectors.shape[-1])[part], payload.take(rows.flat[part]))
    return found


def trace(drawn: Drawn, at: np.ndarray, keyed: np.ndarray | None, payload: Payload) -> Traced:
    """Look for the drawn windows `at` in the payload by their vectors."""
    vectors = drawn.vectors[at]  # [t, L + 1, dim]
    t, length, dim = vectors.shape
    context = length - 1
    row, near = (part.reshape(t, length) for part in nearest(vectors.reshape(-1, dim), payload))
    places = np.arange(length)
    starts = row - places
    if keyed is not None:
        starts = np.concatenate([keyed[at, :1], starts], axis=1)
    ahead, found_ahead = _best_run(vectors, starts, np.arange(length), payload)
    falling = np.concatenate([row + places, row[:, -1:] - 1], axis=1)
    back, found_back = _best_run(vectors, falling, -np.arange(length), payload)
    run, run_back = found_ahead == context, (found_back == context) & (context > 1)
    start = np.where(run, ahead, np.where(run_back, back, -1))
    return Traced(at, start, run_back & ~run, row, near)


def _best_run(
    vectors: np.ndarray, starts: np.ndarray, steps: np.ndarray, payload: Payload
) -> tuple[np.ndarray, np.ndarray]:
    """Of candidate rows [t, c] for the oldest chunk the best one, and how many of the context's chunks it has right.

    steps [L + 1]: from the oldest chunk's row to each one's. Among candidates that have as many right, one whose target
    is right too is taken.
    """
    best, most, found = starts[:, 0].copy(), np.full(len(starts), -1), np.zeros(len(starts), np.int64)
    for start in starts.T:
        rows = start[:, None] + steps
        rows[(rows >= len(payload)) | (start[:, None] < 0)] = -1
        right = cosines_to(vectors, rows, payload) >= SAME
        count = right[:, :-1].sum(axis=1)
        value = 2 * count + right[:, -1]
        better = value > most
        best[better], most[better], found[better] = start[better], value[better], count[better]
    return best, found
