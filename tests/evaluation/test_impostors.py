from __future__ import annotations

import numpy as np
import pytest

from fastlvm.errors import InputError
from fastlvm.evaluation import impostors as module
from fastlvm.evaluation import ranks as ranking
from fastlvm.evaluation import scoring
from fastlvm.evaluation.impostors import rank_with_impostors
from fastlvm.evaluation.ranks import MISS, rank_many


def case(n=60, rows=300, dim=6, seed=0):
    """Queries with duplicates in the pool: predictions, pool, truth rows, excluded rows, groups."""
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal((rows, dim)).astype(np.float32)
    copied = rng.choice(np.arange(1, rows), rows // 4, replace=False)
    source = rng.integers(0, rows, len(copied))
    pool[copied] = pool[source]
    _, first, inverse = np.unique(pool, axis=0, return_index=True, return_inverse=True)
    groups = first[inverse.reshape(-1)]
    truth = rng.integers(0, rows, n)
    exclude = rng.integers(-1, rows, (n, 3))
    exclude[0] = -1
    exclude[1, 0] = truth[1]
    predictions = (pool[truth] + 0.8 * rng.standard_normal((n, dim))).astype(np.float32)
    exclude[::3, 2] = (predictions @ pool.T).argmax(axis=1)[::3]
    return predictions, pool, truth, exclude, groups


def plainly(predictions, pool, truth, exclude, groups):
    """One query at a time, over a list of group heads."""
    found = []
    for p, t, left in zip(predictions, truth, exclude, strict=True):
        scores = pool @ p
        out = {groups[r] for r in left if r >= 0} - {groups[t]}
        candidates = [r for r in range(len(pool)) if groups[r] == r and r != groups[t] and r not in out]
        row = max(candidates, key=lambda r: (scores[r], -r), default=-1)
        best = scores[row] if row >= 0 else -np.inf
        context = max((scores[r] for r in out), default=-np.inf)
        found.append((row, context > scores[t] and context > best))
    return [np.array(column) for column in zip(*found, strict=True)]


@pytest.fixture(params=[(4096, 2048), (7, 5)], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(ranking, "_POOL_BLOCK", request.param[0])
    monkeypatch.setattr(scoring, "_QUERY_BLOCK", request.param[1])
    monkeypatch.setattr(module, "_TOGETHER", request.param[1])


@pytest.mark.parametrize("seed", range(3))
def test_impostors_are_those_of_a_plain_search(blocks, seed):
    given = case(seed=seed)
    predictions, pool, truth, _, _ = given
    row, context_won = plainly(*given)
    found = rank_with_impostors(*given)[1]
    np.testing.assert_array_equal(found.row, row)
    np.testing.assert_array_equal(found.context_won, context_won)
    assert context_won.any() and not context_won.all()
    np.testing.assert_allclose(found.score, np.einsum("nd,nd->n", predictions, pool[row]), rtol=1e-5)
    np.testing.assert_allclose(found.truth_score, np.einsum("nd,nd->n", predictions, pool[truth]), rtol=1e-5)
    assert found.row.dtype == np.int64 and found.score.dtype == found.truth_score.dtype == np.float32


def test_the_margin_is_above_zero_exactly_where_the_rank_is_one(blocks):
    given = case(n=200)
    ranks = rank_many([given[0]], *given[1:])[0].excluded
    known = ranks != MISS
    found = rank_with_impostors(*given)[1]
    np.testing.assert_array_equal(found.margin[known] >= 0, ranks[known] == 1)


def test_a_duplicate_of_the_truth_is_no_impostor():
    pool = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    assert rank_with_impostors(pool[:1], pool, [0], None, np.array([0, 0, 2]))[1].row.tolist() == [2]
    assert rank_with_impostors(pool[:1], pool, [0])[1].row.tolist() == [1]


def test_without_any_other_row_there_is_none():
    pool = np.array([[1, 0], [0.9, 0.1]], np.float32)
    found = rank_with_impostors(np.array([[0.9, 0.2]], np.float32), pool, [0], [[1]])[1]
    assert found.row.tolist() == [-1] and found.score.tolist() == [-np.inf] and found.margin.tolist() == [np.inf]
    assert not found.context_won[0]
    assert rank_with_impostors(np.array([[0.0, 1]], np.float32), pool, [0], [[1]])[1].context_won[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"truth_rows": [[0]]}, "truth_rows has shape"),
        ({"truth_rows": [9]}, "truth_rows spans 9"),
        ({"predictions": np.full((1, 2), np.nan, np.float32)}, "holds NaN"),
        ({"predictions": np.zeros((1, 2), np.float32)}, "is zero"),
        ({"exclude_rows": [0]}, "exclude_rows has shape"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    given = {"predictions": np.ones((1, 2), np.float32), "pool": np.eye(2, dtype=np.float32), "truth_rows": [0]}
    with pytest.raises(InputError, match=said):
        rank_with_impostors(**(given | change))
