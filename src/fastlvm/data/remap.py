"""Windows of the predecessor whose targets or keys are wrong, made into rows of a payload where their vectors allow it.

`align_windows` trusts the keys and takes the payload's vectors for targets; `remap_windows` trusts the vectors and
finds the keys. Either is refused where what it trusts is not the payload's.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np

from fastlvm.data.alignment import SAME, random_pair_cosine, window_keys
from fastlvm.data.held import HeldWindows
from fastlvm.data.matching import find_runs, row_cosines
from fastlvm.data.payload import Payload
from fastlvm.data.split import check_split, split_numbers
from fastlvm.data.windows import Windows
from fastlvm.errors import InputError, IntegrityError

_FEW = 0.05
"""Share of windows up to which dropping them is worth a hint."""


@dataclasses.dataclass(frozen=True)
class Cosines:
    """Mean cosine of contexts and of targets with the payload rows of their keys; NaN where it has none of them."""

    context: float
    target: float

    def __str__(self) -> str:
        return ", ".join(
            f"{name} cosine {'-' if math.isnan(value) else f'{value:.4f}'}"
            for name, value in (("target", self.target), ("context", self.context))
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Rekeyed:
    """The windows that were kept of a file's `count`, and how far their vectors were and are the payload's.

    changed: how many of the kept ones got another target (align) or another key (remap). before: over all windows
    of the file, under its keys; None where it has no keys. after: over those kept.
    """

    windows: Windows
    count: int
    changed: int
    before: Cosines | None
    after: Cosines
    random_pair_cosine: float

    @property
    def coverage(self) -> float:
        """Share of the file's windows that were kept."""
        return len(self.windows) / self.count

    def __str__(self) -> str:
        return (
            f"coverage  {len(self.windows)} of {self.count} windows ({100 * self.coverage:.1f} %), "
            f"{self.count - len(self.windows)} dropped, {self.changed} changed\n"
            f"before    {'no keys' if self.before is None else self.before}\n"
            f"after     {self.after}\n"
            f"random pairs of chunks have cosine {self.random_pair_cosine:.4f}"
        )


def align_windows(
    path: str | os.PathLike[str],
    payload: Payload,
    *,
    split: str | Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    allow_missing: float = 0.0,
) -> Rekeyed:
    """Windows of a predecessor's .npz under its own keys, each target replaced by the payload's vector of its key.

    A window counts when its contexts are the payload's at cosine 0.999; of others a share of `allow_missing`, from 0
    to below 1, is dropped. split: fractions as in `Windows.build`, or the name of the split that takes all.
    Raises IntegrityError, with the figures, where more of them do not: their keys are made up, and no target belongs
    there.
    """
    if not 0 <= allow_missing < 1:
        raise InputError(f"allow_missing is {allow_missing}, and wants a share of the windows from 0 to below 1")
    split = check_split(split)
    held = HeldWindows.predecessor(path, payload)
    if held.keys is None:
        raise InputError(f"{path} has no truth_keys to align by: find them with fastlvm windows remap")
    rows = payload.rows_of(window_keys(held.keys, held.context))
    cosines = row_cosines(held, rows, payload)
    kept = np.asarray((rows >= 0).all(axis=1) & (cosines[:, :-1] >= SAME).all(axis=1))
    if (~kept).mean() > allow_missing:
        raise IntegrityError(_not_aligned(held, payload, rows, cosines, kept))
    windows, target = _made(held, payload, rows[kept], split, seed, "targets replaced")
    return Rekeyed(
        windows,
        held.count,
        int(np.count_nonzero(~(cosines[kept, -1] >= SAME))),
        _cosines(cosines, rows),
        Cosines(float(cosines[kept, :-1].mean()), target),
        random_pair_cosine(payload),
    )


def _not_aligned(held: HeldWindows, payload: Payload, rows: np.ndarray, cosines: np.ndarray, kept: np.ndarray) -> str:
    wrong = int(np.count_nonzero(~kept))
    few = "; if the payload only lost some rows, drop those windows with --allow-missing"
    return (
        f"{held.path} cannot be aligned to payload {payload.path}: {wrong} of {held.count} windows hold other contexts "
        f"than their keys stand for (first: window {int(np.argmin(kept))}; {np.count_nonzero((rows < 0).any(axis=1))} "
        f"with keys that the payload has not); {_cosines(cosines, rows)} (random pairs "
        f"{random_pair_cosine(payload):.4f}), wants a context cosine ≥ {SAME}: targets pasted in by such keys make a "
        "set that nothing can pass; find the keys of the vectors with fastlvm windows remap"
        + (few if wrong <= _FEW * held.count else "")
    )


def remap_windows(
    path: str | os.PathLike[str],
    payload: Payload,
    *,
    split: str | Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    min_coverage: float = 0.9,
) -> Rekeyed:
    """Windows of a predecessor's .npz under the keys of the payload rows that its vectors are, whatever keys it has.

    A window is kept where contexts and target are a run of consecutive chunks at cosine 0.999; of several such runs
    its own key's is taken, or else the first. split: as in `align_windows`. Raises IntegrityError where less than the
    share `min_coverage`, from 0 to 1, or none has a run.
    """
    if not 0 <= min_coverage <= 1:
        raise InputError(f"min_coverage is {min_coverage}, and wants a share of the windows from 0 to 1")
    split = check_split(split)
    held = HeldWindows.predecessor(path, payload)
    rows, best = find_runs(held, payload)
    before = None
    changed = rows[:, -1] >= 0
    if held.keys is not None:
        own = payload.rows_of(window_keys(held.keys, held.context))
        cosines = row_cosines(held, own, payload)
        before = _cosines(cosines, own)
        right = (cosines >= SAME).all(axis=1)
        rows[right] = own[right]
        changed &= ~right
    kept = np.asarray(rows[:, -1] >= 0)
    if kept.mean() < min_coverage or not kept.any():
        raise IntegrityError(_not_remapped(held, payload, kept, best, min_coverage))
    after = row_cosines(held, rows, payload)
    windows, _ = _made(held, payload, rows[kept], split, seed, "keys found by their vectors")
    return Rekeyed(
        windows,
        held.count,
        int(np.count_nonzero(changed)),
        before,
        _cosines(after, rows),
        random_pair_cosine(payload),
    )


def _not_remapped(held: HeldWindows, payload: Payload, kept: np.ndarray, best: np.ndarray, min_coverage: float) -> str:
    nearest = np.nan_to_num(best[~kept])
    there = int(np.count_nonzero(nearest >= SAME))
    return (
        f"{held.path} cannot be remapped to payload {payload.path}: {np.count_nonzero(kept)} of {held.count} windows "
        f"are runs of its chunks, and a share of {min_coverage:g} is wanted; of the others {there} have a target that "
        f"it holds, but not behind their context, and the row nearest to a target has cosine {nearest.mean():.4f} on "
        f"average (random pairs {random_pair_cosine(payload):.4f}), wants ≥ {SAME}: "
        + (
            "where their keys are right, fastlvm windows align gives them the targets that follow"
            if 2 * there > len(nearest)
            else "take the payload they were made from, or lower --min-coverage"
        )
    )


def _made(
    held: HeldWindows, payload: Payload, rows: np.ndarray, split: str | tuple[float, float, float], seed: int, how: str
) -> tuple[Windows, float]:
    """Windows of these rows, and their target cosine by the integrity gate, which they have to pass."""
    keys = payload.keys[rows[:, -1]]
    windows = Windows(
        payload.id,
        rows,
        keys,
        split_numbers(keys[:, 0], split, seed),
        seed=seed,
        fractions=None if isinstance(split, str) else split,
        source=f"{held.source}, {how}",
    )
    return windows, windows.verify(payload).target_cosine_mean


def _cosines(cosines: np.ndarray, rows: np.ndarray) -> Cosines:
    """Means over the places that have a row; a cosine that is no number counts as 0."""
    means = []
    for part in (np.s_[:, :-1], np.s_[:, -1]):
        there = np.nan_to_num(cosines[part][rows[part] >= 0])
        means.append(float(there.mean()) if there.size else math.nan)
    return Cosines(*means)
