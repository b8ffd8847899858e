"""Held windows against the rows of a payload: by their keys, or by their vectors alone."""

from __future__ import annotations

import numpy as np

from fastlvm.data import rows as table
from fastlvm.data.alignment import SAME, cosine, random_pair_cosine
from fastlvm.data.held import HeldWindows
from fastlvm.data.payload import Payload
from fastlvm.errors import IntegrityError

_POOL = 16384


def row_cosines(held: HeldWindows, rows: np.ndarray, payload: Payload) -> np.ndarray:
    """Cosine of every held vector with the payload's row in its place: float32 [count, context + 1].

    rows: int64 [count, context + 1], -1 where the payload has none; the cosine is 0 there.
    """
    cosines = np.zeros(rows.shape, np.float32)
    for part, piece in held.blocks():
        wanted = rows[part]
        there = wanted >= 0
        cosines[part][there] = cosine(piece[there], payload.take(wanted[there]))
    return cosines


def find_runs(held: HeldWindows, payload: Payload) -> tuple[np.ndarray, np.ndarray]:
    """Payload rows of held windows by their vectors: int64 [count, context + 1]; best cosine of a target, float32.

    Every row whose vector is the target's is a candidate; the first one that ends a run of the context's own vectors
    is taken. A window without one has rows of -1.
    """
    last = np.full(held.count, -1, np.int64)
    best = np.zeros(held.count, np.float32)
    for part, piece in held.blocks():
        last[part], best[part] = _match_block(table.normalised(piece), held.context, payload)
    runs = last[:, None] + np.arange(-held.context, 1)
    return np.where(last[:, None] < 0, -1, runs), best


def match(held: HeldWindows, payload: Payload) -> np.ndarray:
    """Payload rows of held windows, int64 [count, context + 1]; IntegrityError where one has no run there."""
    rows, best = find_runs(held, payload)
    missing = rows[:, -1] < 0
    if missing.any():
        raise IntegrityError(
            f"{held.path} does not come from payload {payload.path}: {np.count_nonzero(missing)} of {held.count} "
            f"windows have no run of chunks there with their vectors (first: window {int(np.argmax(missing))}); the "
            f"nearest row to their target has cosine {np.nan_to_num(best[missing]).mean():.4f} on average "
            f"(random pairs {random_pair_cosine(payload):.4f}), wants ≥ {SAME}: take the payload they were made from"
        )
    return rows


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
