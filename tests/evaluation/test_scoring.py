"""Every ranker's every query is scored once, whether it is a vector of its own, one of another's, or a sum of rows."""

from __future__ import annotations

import numpy as np
import pytest

from fastlvm.evaluation import scoring
from fastlvm.evaluation.scoring import Combined, Scorer


@pytest.fixture
def pool():
    return np.random.default_rng(0).standard_normal((90, 6)).astype(np.float32)


def combined(pool, rows, weights):
    weights = np.asarray(weights, np.float32)
    return Combined(np.einsum("nmd,m->nd", pool[rows], weights), np.asarray(rows), weights)


def collected(queries, pool, block):
    """Scores [rankers, n, block] and how many rows of scores were made."""
    n = len(queries[0].vectors if isinstance(queries[0], Combined) else queries[0])
    scores = np.full((len(queries), n, len(block)), np.nan, np.float32)
    made = 0
    for found in Scorer(queries, pool, len(block) + 3).score(block):
        assert np.isnan(scores[found.ranker, found.query]).all(), "scored twice"
        scores[found.ranker, found.query] = found.scores[found.row]
        made += len(found.scores)
    return scores, made


def cases(pool):
    rng = np.random.default_rng(1)
    near = np.arange(40)[:, None] + np.arange(3)
    own = rng.standard_normal((40, 6)).astype(np.float32)
    far = rng.integers(0, 90, (40, 3))
    return {
        "vectors": [own],
        "the same vectors in another order": [own, own[::-1]],
        "neighbours": [combined(pool, near, [0.2, 0.3, 0.5])],
        "neighbours in another order": [combined(pool, near[rng.permutation(40)], [0.2, 0.3, 0.5])],
        "a row twice in a sum": [combined(pool, near[:, [0, 0, 2]], [0.2, 0.3, 0.5])],
        "rows far apart": [combined(pool, far, [0.2, 0.3, 0.5])],
        "single rows": [combined(pool, far[:, :1], [1])],
        "single rows, weighted": [combined(pool, far[:, :1], [-2])],
        "all together": [
            own,
            combined(pool, near, [1, 1, -1]),
            combined(pool, far[:, 1:2], [1]),
            own[:1].repeat(40, 0),
        ],
    }


@pytest.mark.parametrize("sizes", [(2048, 32, 128), (7, 3, 4), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", cases(np.zeros((90, 6), np.float32)))
def test_scores_are_those_of_the_vectors(monkeypatch, pool, name, sizes):
    for constant, size in zip(("_QUERY_BLOCK", "_TOGETHER", "_SPREAD"), sizes, strict=True):
        monkeypatch.setattr(scoring, constant, size)
    queries = cases(pool)[name]
    dense = np.stack([one.vectors if isinstance(one, Combined) else one for one in queries])
    for block in (pool[:50], pool[50:], pool[:1]):
        scores, _ = collected(queries, pool, block)
        np.testing.assert_allclose(scores, dense @ block.T, rtol=1e-4, atol=1e-4)


def test_what_several_ask_for_is_scored_once(pool):
    own = cases(pool)["vectors"][0]
    assert collected([own, own[::-1], own[:5].repeat(8, 0)], pool, pool[:20])[1] == 40


def test_nothing_is_asked_for(pool):
    for queries in ([], [np.empty((0, 6), np.float32)]):
        assert list(Scorer(queries, pool, 20).score(pool[:20])) == []
