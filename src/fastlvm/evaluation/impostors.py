"""Impostors: the payload row that wins where the truth should, and whether a row of the context scores higher still."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastlvm.errors import InputError
from fastlvm.evaluation.ranks import (
    _checked_groups,
    _Entries,
    _masked_entries,
    _pool_shape,
    _rows_in_range,
    checked_predictions,
)

_POOL_BLOCK = 4096
_QUERY_BLOCK = 2048


class Impostors(NamedTuple):
    """Of each query: row int64 [n], -1 = none; score float32 [n], -inf where none; truth_score float32 [n];
    context_won bool [n]: an excluded row scores above the truth and above the impostor.
    """

    row: np.ndarray
    score: np.ndarray
    truth_score: np.ndarray
    context_won: np.ndarray

    @property
    def margin(self) -> np.ndarray:
        """Truth's score less the impostor's, float32 [n]: above 0 the truth is ahead; inf where there is none."""
        return self.truth_score - self.score


def best_impostors(
    predictions: np.ndarray,
    pool: Any,
    truth_rows: np.ndarray,
    exclude_rows: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> Impostors:
    """The best-scoring row of each query that is neither of the truth's duplicate group nor of an excluded one.

    Arguments and errors as in `exact_ranks`. A group is named by its smallest row; of equal scores the smallest
    row is taken. Memory: one block of the pool and one block of scores at a time.
    """
    rows, dim = _pool_shape(pool)
    truth = _rows_in_range("truth_rows", truth_rows, rows, lowest=0)
    if truth.ndim != 1:
        raise InputError(f"truth_rows has shape {truth.shape}, and one row per query [n] is wanted")
    queries = checked_predictions(predictions, (len(truth), dim), "predictions")
    group = _checked_groups(groups, rows)
    masked, _ = _masked_entries(truth, exclude_rows, group)
    truth_score = np.einsum("nd,nd->n", queries, np.asarray(pool[truth], dtype=np.float32))

    row = np.full(len(truth), -1, np.int64)
    score = np.full(len(truth), -np.inf, np.float32)
    excluded = np.full(len(truth), -np.inf, np.float32)
    for start in range(0, rows, _POOL_BLOCK):
        stop = min(start + _POOL_BLOCK, rows)
        block = np.asarray(pool[start:stop], dtype=np.float32)
        silent = np.flatnonzero(group[start:stop] != np.arange(start, stop))  # not the smallest row of their group
        entries = masked.within(start, stop)
        for first in range(0, len(queries), _QUERY_BLOCK):
            part = slice(first, min(first + _QUERY_BLOCK, len(queries)))
            scores = queries[part] @ block.T  # [q, b]
            scores[:, silent] = -np.inf
            _take_out(scores, entries, part, excluded)
            best = scores.argmax(axis=1)
            value = scores[np.arange(len(scores)), best]
            higher = value > score[part]
            row[part][higher] = start + best[higher]
            score[part][higher] = value[higher]
    return Impostors(row, score, truth_score, (excluded > truth_score) & (excluded > score))


def _take_out(scores: np.ndarray, entries: _Entries, part: slice, excluded: np.ndarray) -> None:
    """Mask the truths and the excluded in scores [q, b] of queries `part`; keep the best score of the excluded."""
    here = (entries.query >= part.start) & (entries.query < part.stop)
    query, column, other = entries.query[here], entries.row[here], ~entries.own[here]
    np.maximum.at(excluded, query[other], scores[query[other] - part.start, column[other]])
    scores[query - part.start, column] = -np.inf
