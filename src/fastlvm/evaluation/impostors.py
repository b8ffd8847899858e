"""Impostors: the payload row that wins where the truth should, and whether a row of the context scores higher still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastlvm.evaluation.ranks import Block, Ranks, rank_many

_TOGETHER = 256  # rows of scores that are copied, so that some can be taken out


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


def rank_with_impostors(
    predictions: np.ndarray,
    pool: Any,
    truth_rows: np.ndarray,
    exclude_rows: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Ranks, Impostors]:
    """Ranks of the truths, and the best-scoring row of each query that is of no truth's and no excluded group.

    Arguments and errors as in `rank_many`. A group is named by its smallest row; of equal scores the smallest row is
    taken. One pass over the pool.
    """
    best = _Best(len(np.asarray(truth_rows)))
    ranks = rank_many([predictions], pool, truth_rows, exclude_rows, groups, advance=advance, observe=best.see)[0]
    vectors = np.asarray(pool[np.asarray(truth_rows)], dtype=np.float32)
    truth_score = np.einsum("nd,nd->n", np.asarray(predictions, dtype=np.float32), vectors)
    won = (best.excluded > truth_score) & (best.excluded > best.score)
    return ranks, Impostors(best.row, best.score, truth_score, won)


class _Best:
    """The best row and score of n queries so far, and the best score of an excluded one."""

    def __init__(self, n: int) -> None:
        self.row = np.full(n, -1, np.int64)
        self.score = np.full(n, -np.inf, np.float32)
        self.excluded = np.full(n, -np.inf, np.float32)

    def see(self, block: Block) -> None:
        if not len(block.rows):
            return
        for start in range(0, len(block.found.query), _TOGETHER):
            query = block.found.query[start : start + _TOGETHER]
            scores = block.found.scores[block.found.row[start : start + _TOGETHER]]  # [q, b], a copy
            which, entry = block.entries.of(query)
            column, other = block.entries.row[entry], ~block.entries.own[entry]
            np.maximum.at(self.excluded, query[which[other]], scores[which[other], column[other]])
            scores[which, column] = -np.inf
            best = scores.argmax(axis=1)
            value = scores[np.arange(len(scores)), best]
            higher = value > self.score[query]
            self.row[query[higher]] = block.rows[best[higher]]
            self.score[query[higher]] = value[higher]
