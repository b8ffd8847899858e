"""Finding windows in a payload by their vectors alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastlvm.data import rows as table
from fastlvm.data.alignment import SAME, cosine, random_pair_cosine
from fastlvm.data.payload import Payload
from fastlvm.errors import IntegrityError

_POOL = 16384


def match(pieces: Iterator[np.ndarray], count: int, context: int, payload: Payload, path: str) -> np.ndarray:
    """Payload rows of `count` windows: int64 [count, context + 1].

    pieces: float32 [n, context + 1, dim]. Every row whose vector is the target's is a candidate; the first one that
    ends a run of the context's own vectors is taken. Raises IntegrityError with the count of windows without one.
    """
    last = np.full(count, -1, np.int64)
    best = np.zeros(count, np.float32)
    first = 0
    for piece in pieces:
        part = slice(first, first + len(piece))
        last[part], best[part] = _match_block(table.normalised(piece), context, payload)
        first += len(piece)
    missing = last < 0
    if missing.any():
        raise IntegrityError(
            f"{path} does not come from payload {payload.path}: {np.count_nonzero(missing)} of {count} windows have no "
            f"run of chunks there with their vectors (first: window {int(np.argmax(missing))}); the nearest row to "
            f"their target has cosine {np.nan_to_num(best[missing]).mean():.4f} on average (random pairs "
            f"{random_pair_cosine(payload):.4f}), wants ≥ {SAME}: take the payload they were made from"
        )
    return last[:, None] + np.arange(-context, 1)


def _match_block(windows: np.ndarray, context: int, payload: Payload) -> tuple[np.ndarray, np.ndarray]:
    """Row of the target and its best cosine in the payload, for unit vectors [n, context + 1, dim]."""
    found = np.full(len(windows), -1, np.int64)
    best = np.full(len(windows), -1, np.float32)
    for start in range(0, len(payload), _POOL):
        pool = table.normalised(payload.take(np.arange(start, min(start + _POOL, len(payload)))))
        scores = windows[:, -1] @ pool.T  # [n, pool]
        best = np.maximum(best, scores.max(axis=1))
        at, row = np.nonzero(scores >= SAME)
        row = row + start
        whole = (row >= context) & (found[at] < 0)
        at, row = at[whole], row[whole]
        keys = payload.keys
        run = (keys[row - context, 0] == keys[row, 0]) & (keys[row, 1] - keys[row - context, 1] == context)
        at, row = at[run], row[run]
        for part in table.blocks(len(at), (context + 1) * payload.dim):
            held = payload.take(row[part][:, None] + np.arange(-context, 1))
            same = (cosine(windows[at[part]], held) >= SAME).all(axis=1)
            # Backwards, so that of a window's candidates the first stays.
            unmatched = found[at[part][same]] < 0
            hits, rows = at[part][same][unmatched][::-1], row[part][same][unmatched][::-1]
            found[hits] = rows
    return found, best
