"""Which candidates are no negatives of a window, as arrays of numpy: no framework needs another one."""

from __future__ import annotations

import numpy as np


def false_negatives(
    windows: np.ndarray, candidates: np.ndarray, articles: np.ndarray, groups: np.ndarray, rule: str
) -> np.ndarray:
    """bool [B, M]: candidates (payload rows [M]) that are no negatives of a window (rows [B, L + 1], the target last).

    Always the rows of the target's duplicate group. "article" adds the rows of its article; "group" adds the window's
    own context and its duplicates, which retrieval excludes as well. articles, groups: int64 [N], of every row.
    """
    if rule == "article":
        target = windows[:, -1:]
        return _among(articles[candidates], articles[target]) | _among(groups[candidates], groups[target])
    return _among(groups[candidates], groups[windows])


def _among(labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """bool [B, M]: which of the labels [M] are among a row of wanted [B, K]; labels are not negative, and few are."""
    found = np.zeros((len(wanted), len(labels)), dtype=bool)
    if wanted.size == 0 or labels.size == 0:
        return found
    asked = np.zeros(max(wanted.max(), labels.max()) + 1, dtype=bool)
    asked[wanted] = True
    near = np.flatnonzero(asked[labels])
    places = np.argsort(labels[near], kind="stable")
    ordered = labels[near][places]
    first = np.searchsorted(ordered, wanted)
    counts = (np.searchsorted(ordered, wanted, side="right") - first).reshape(-1)
    shift = first.reshape(-1) - (counts.cumsum() - counts)  # from a run's place among all found to that in order
    at = np.arange(counts.sum()) + shift.repeat(counts)
    rows = np.arange(len(wanted)).repeat(wanted.shape[1]).repeat(counts)
    found[rows, near[places[at]]] = True
    return found
