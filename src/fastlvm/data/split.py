"""Splitting windows by article, or by groups of them, so that none is in two splits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlvm.errors import InputError

SPLITS = ("train", "validation", "test")
ALIASES = {"val": "validation"}

_SLACK = 0.02


def check_fractions(split: Any) -> tuple[float, float, float]:
    """Three fractions, scaled to sum to 1 where they do so only nearly. Raises InputError."""
    wants = "three fractions from 0 to 1 that sum to 1: train, validation, test"
    if isinstance(split, str) or not isinstance(split, (Sequence, np.ndarray)) or len(split) != len(SPLITS):
        raise InputError(f"split is {split!r}, and wants {wants}")
    try:
        values = [float(value) for value in split]
    except (TypeError, ValueError) as error:
        raise InputError(f"split is {split!r}, and wants {wants}") from error
    total = math.fsum(values)
    if not all(math.isfinite(value) and value >= 0 for value in values) or abs(total - 1) > _SLACK:
        raise InputError(f"split is {tuple(values)}, which sums to {total:g}, and wants {wants}")
    return values[0] / total, values[1] / total, values[2] / total


def check_split(split: Any) -> str | tuple[float, float, float]:
    """The name of the split that takes every window, or three fractions. Raises InputError."""
    if not isinstance(split, str):
        return check_fractions(split)
    name = ALIASES.get(split, split)
    if name not in SPLITS:
        raise InputError(f"split is {split!r}, and wants fractions or one of {', '.join(SPLITS)}")
    return name


def split_numbers(numbers: np.ndarray, split: str | tuple[float, float, float], seed: int) -> np.ndarray:
    """What `check_split` gave, as the split of each entry of `numbers` [n], articles or groups: uint8 [n]."""
    if isinstance(split, str):
        return np.full(len(numbers), SPLITS.index(split), np.uint8)
    return split_articles(numbers, split, seed)


def split_articles(articles: np.ndarray, fractions: tuple[float, float, float], seed: int) -> np.ndarray:
    """Split of each entry of `articles` [n] by its article: uint8 [n], an index into SPLITS.

    The articles are put in the order of a hash of (seed, article), which no library version changes, and cut there.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise InputError(f"seed is {seed!r}, and wants a whole number")
    unique, inverse = np.unique(articles, return_inverse=True)
    order = sorted(range(len(unique)), key=lambda at: hashlib.sha256(f"{seed}:{unique[at]}".encode()).digest())
    codes = np.empty(len(unique), np.uint8)
    codes[order] = np.repeat(np.arange(len(SPLITS), dtype=np.uint8), article_counts(len(unique), fractions))
    return codes[inverse.reshape(-1)]


def article_counts(articles: int, fractions: tuple[float, float, float]) -> list[int]:
    """How many of `articles` each split gets: by largest remainder, at least one each where possible."""
    exact = [fraction * articles for fraction in fractions]
    counts = [math.floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda at: counts[at] - exact[at])
    for at in by_remainder[: articles - sum(counts)]:
        counts[at] += 1
    wanted = [at for at, fraction in enumerate(fractions) if fraction > 0]
    if articles >= len(wanted):
        for at in wanted:
            if counts[at] == 0:
                counts[max(range(len(counts)), key=lambda other: counts[other])] -= 1
                counts[at] = 1
    return counts
