"""Do windows come from a payload? Cosines of what their rows hold against what their keys stand for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from fastlvm.data import rows as table
from fastlvm.errors import InputError, IntegrityError

if TYPE_CHECKING:
    from fastlvm.data.payload import Payload
    from fastlvm.data.windows import Windows

SAME = 0.999
"""Cosine from which two vectors count as the same one."""


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Figures of the integrity gate; windows: how many were compared. The random pairs are of different articles.

    article_overlap, group_overlap: how many are in more than one split; the latter is None where there are no groups.
    """

    context_cosine_min: float
    context_cosine_mean: float
    target_cosine_min: float
    target_cosine_mean: float
    random_pair_cosine: float
    article_overlap: int
    windows: int
    group_overlap: int | None = None

    def __str__(self) -> str:
        groups = "" if self.group_overlap is None else f"groups in two splits {self.group_overlap}, "
        return (
            f"context cosine {self.context_cosine_mean:.4f} (min {self.context_cosine_min:.4f}), "
            f"target cosine {self.target_cosine_mean:.4f} (min {self.target_cosine_min:.4f}), "
            f"random pairs {self.random_pair_cosine:.4f}, "
            f"articles in two splits {self.article_overlap}, {groups}{self.windows} windows compared"
        )


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of rows [..., dim]; 0 where one is zero."""
    return np.einsum("...d,...d->...", table.normalised(a), table.normalised(b))


def random_pair_cosine(payload: Payload, seed: int = 0, pairs: int = 2000) -> float:
    """Mean cosine of random pairs of rows of different articles (of any two rows where there is one article)."""
    rng = np.random.default_rng(seed)
    left, right = rng.integers(0, len(payload), (2, pairs))
    articles = payload.keys[:, 0]
    apart = articles[left] != articles[right]
    if not apart.any():
        apart = left != right
    if not apart.any():
        return float("nan")
    return float(cosine(payload.take(left[apart]), payload.take(right[apart])).mean())


def window_keys(keys: np.ndarray, context: int) -> np.ndarray:
    """Keys of every chunk of windows with target keys [n, 2]: int64 [n, context + 1, 2]."""
    wide = np.repeat(keys[:, None, :].astype(np.int64), context + 1, axis=1)
    wide[..., 1] += np.arange(-context, 1)
    return wide


def check_alignment(
    windows: Windows, payload: Payload, rows: np.ndarray, keys: np.ndarray, *, sample: int | None, seed: int
) -> Alignment:
    """See `Windows.verify`. rows int64 [n, context + 1], keys int32 [n, 2], of all splits."""
    if sample is not None and sample < 1:
        raise InputError(f"sample is {sample}, and wants a number of windows from 1, or None for all")
    name = "the windows" if windows.path is None else f"windows {windows.path}"
    remedy = "rebuild them with fastlvm windows build"
    if not len(rows):
        raise InputError(f"{name} hold no window: {remedy}")
    by_key = payload.rows_of(window_keys(keys, windows.context))  # [n, context + 1]
    wrong = (by_key != rows).any(axis=1)

    checked = _sample(wrong, sample, seed)
    alignment = _figures(windows, payload, rows[checked], by_key[checked], seed)
    why = _verdict(windows, payload, alignment, np.flatnonzero(wrong), keys, by_key)
    if why is not None:
        raise IntegrityError(
            f"{name} do not come from payload {payload.path}: {why}; target cosine {alignment.target_cosine_mean:.4f}, "
            f"context cosine {alignment.context_cosine_mean:.4f} (random pairs {alignment.random_pair_cosine:.4f}), "
            f"wants ≥ {SAME}: {remedy}"
        )
    if alignment.article_overlap:
        raise IntegrityError(
            f"{name} have {alignment.article_overlap} articles in more than one split, and want 0: {remedy}"
        )
    if alignment.group_overlap:
        raise IntegrityError(
            f"{name} have {alignment.group_overlap} groups ({windows.group_by}) in more than one split, and want 0: "
            f"{remedy}"
        )
    return alignment


def _sample(wrong: np.ndarray, sample: int | None, seed: int) -> np.ndarray:
    """Windows to compare: those whose rows are not their keys' first, then a draw of the others."""
    if sample is None or sample >= len(wrong):
        return np.arange(len(wrong))
    order = np.random.default_rng(seed).permutation(len(wrong))
    return np.sort(order[np.argsort(~wrong[order], kind="stable")][:sample])


def _figures(windows: Windows, payload: Payload, rows: np.ndarray, by_key: np.ndarray, seed: int) -> Alignment:
    cosines = np.zeros(rows.shape)
    for part in table.blocks(len(rows), rows.shape[1] * payload.dim):
        held, meant = rows[part], by_key[part]
        there = (held >= 0) & (held < len(payload)) & (meant >= 0)
        cosines[part][there] = cosine(payload.take(held[there]), payload.take(meant[there]))
    context, target = cosines[:, :-1], cosines[:, -1]
    return Alignment(
        context_cosine_min=float(context.min()),
        context_cosine_mean=float(context.mean()),
        target_cosine_min=float(target.min()),
        target_cosine_mean=float(target.mean()),
        random_pair_cosine=random_pair_cosine(payload, seed),
        article_overlap=windows.article_overlap(),
        windows=len(rows),
        group_overlap=windows.group_overlap(),
    )


def _verdict(
    windows: Windows, payload: Payload, figures: Alignment, wrong: np.ndarray, keys: np.ndarray, by_key: np.ndarray
) -> str | None:
    """Why the windows are refused, or None."""
    if windows.payload_id != payload.id:
        return f"they carry payload id {windows.payload_id}, and this one is {payload.id}"
    if len(wrong):
        first = int(wrong[0])
        article, chunk = keys[first]
        missing = "some are not in the payload" if (by_key[first] < 0).any() else "the payload has them in other rows"
        return (
            f"{len(wrong)} of {len(keys)} windows hold other rows than their keys stand for "
            f"(first: window {first}, target ({article}, {chunk}); {missing})"
        )
    if not min(figures.context_cosine_min, figures.target_cosine_min) >= SAME:
        return f"of {figures.windows} windows compared, some hold other vectors than their keys stand for"
    return None
