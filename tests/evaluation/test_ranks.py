from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlvm.errors import InputError
from fastlvm.evaluation import ranks as ranking
from fastlvm.evaluation import scoring
from fastlvm.evaluation.ranks import MISS, cosines, exact_ranks, rank_many, ranks_within


def naive_rank(prediction, pool, truth, excluded, groups):
    """The definition, one group at a time."""
    excluded_groups = {int(groups[row]) for row in excluded if row >= 0}
    own = int(groups[truth])
    if own in excluded_groups:
        return MISS
    own_score = float(prediction @ pool[truth])
    rank = 1
    for group in {int(g) for g in groups}:
        if group == own or group in excluded_groups:
            continue
        rank += float(prediction @ pool[group]) > own_score
    return rank


@st.composite
def cases(draw):
    """Small integer vectors: every product is exact, so ties are ties; few distinct ones, so duplicates abound."""
    rows, dim, queries, width = draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 5)), 3
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pool = rng.integers(-1, 2, (rows, dim)).astype(np.float32)
    _, first, inverse = np.unique(pool, axis=0, return_index=True, return_inverse=True)
    groups = first[np.ravel(inverse)] if draw(st.booleans()) else np.arange(rows)
    predictions = rng.integers(-2, 3, (queries, dim)).astype(np.float32)
    predictions[~predictions.any(axis=1)] = 1
    truth = rng.integers(0, rows, queries)
    exclude = rng.integers(-1, rows, (queries, width)) if draw(st.booleans()) else None
    return predictions, pool, truth, exclude, groups


@given(cases(), st.integers(1, 5), st.integers(1, 3))
@settings(deadline=None, max_examples=300)
def test_ranks_are_those_of_the_definition(case, pool_block, query_block):
    predictions, pool, truth, exclude, groups = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_POOL_BLOCK", pool_block)
        patch.setattr(scoring, "_QUERY_BLOCK", query_block)
        both = rank_many([predictions, predictions[::-1], predictions], pool, truth, exclude, groups)
        got = exact_ranks(predictions, pool, truth, exclude, groups)
    none = np.full((len(truth), 1), -1)
    ex = none if exclude is None else exclude
    n = range(len(truth))
    want = [naive_rank(predictions[i], pool, truth[i], ex[i], groups) for i in n]
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(both[2].excluded, want)
    turned = [naive_rank(predictions[::-1][i], pool, truth[i], ex[i], groups) for i in n]
    np.testing.assert_array_equal(both[1].excluded, turned)
    included = [naive_rank(predictions[i], pool, truth[i], none[i], groups) for i in n]
    np.testing.assert_array_equal(both[0].included, included)


def unit(rng, *shape):
    vectors = rng.standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def test_predicting_the_truth_ranks_it_first_and_its_opposite_last():
    rng = np.random.default_rng(0)
    pool = unit(rng, 300, 16)
    truth = rng.integers(0, 300, 40)
    assert (exact_ranks(pool[truth], pool, truth) == 1).all()
    assert (exact_ranks(-pool[truth], pool, truth) == 300).all()


def test_a_truth_is_never_outranked_by_its_own_group():
    """Not by rounding either: its score is summed in another order than the block's."""
    rng = np.random.default_rng(8)
    pool, truth = unit(rng, 8, 768), rng.integers(0, 8, 400)
    ranks = rank_many([unit(rng, 400, 768)], pool, truth, None, np.zeros(8, int))[0]
    assert (ranks.excluded == 1).all() and (ranks.included == 1).all()


def test_a_context_row_that_wins_counts_unless_it_is_excluded():
    rng = np.random.default_rng(1)
    pool = unit(rng, 100, 256)
    truth, context = np.array([7, 8]), np.array([[3, 4], [5, 6]])
    last = pool[context[:, -1]] + 0.7 * pool[truth]
    assert (exact_ranks(last, pool, truth) == 2).all()
    assert (exact_ranks(last, pool, truth, context) == 1).all()


def test_ties_do_not_push_the_truth_down():
    pool = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    assert exact_ranks(np.array([[1, 0]], np.float32), pool, np.array([1])).tolist() == [1]


def test_a_duplicate_group_votes_once_and_is_excluded_whole():
    pool = np.array([[1, 0], [1, 0], [1, 0], [0.6, 0.8], [0.8, 0.6]], np.float32)
    groups = np.array([0, 0, 0, 3, 4])
    query, truth = np.array([[1, 0]], np.float32), np.array([3])
    assert exact_ranks(query, pool, truth, None, groups).tolist() == [3]
    assert exact_ranks(query, pool, truth, np.array([[2]]), groups).tolist() == [2]
    assert exact_ranks(query, pool, truth).tolist() == [5]


def test_a_truth_that_repeats_a_context_row_is_a_miss():
    pool = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    query, truth, context = pool[:1], np.array([1]), np.array([[0, 2]])
    ranks = rank_many([query], pool, truth, context, np.array([0, 0, 2]))[0]
    assert ranks.excluded.tolist() == [MISS]
    assert ranks.included.tolist() == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": np.zeros((2, 4), np.float32)}, "row 0 is zero"),
        ({"predictions": np.array([[1, 0, 0, 0], [np.nan, 0, 0, 0]], np.float32)}, "row 1 holds NaN"),
        ({"predictions": np.full((2, 4), 1e300)}, "infinite"),
        ({"predictions": np.ones((2, 3), np.float32)}, r"\[2, 4\] are wanted"),
        ({"predictions": np.ones((2, 4), np.int64)}, "int64"),
        ({"truth_rows": np.array([0, 9])}, "rows 0 to 8"),
        ({"truth_rows": np.array([0, -1])}, "rows 0 to 8"),
        ({"truth_rows": np.array([0.0, 1.0])}, "integer"),
        ({"exclude_rows": np.array([[9], [0]])}, "rows -1 to 8"),
        ({"exclude_rows": np.array([0, 1])}, r"\[n, m\]"),
        ({"groups": np.arange(9)[::-1]}, "smallest row"),
        ({"groups": np.arange(8)}, "smallest row"),
    ],
)
def test_bad_input_is_named(change, message):
    rng = np.random.default_rng(2)
    call = {"predictions": unit(rng, 2, 4), "pool": unit(rng, 9, 4), "truth_rows": np.array([0, 1])} | change
    with pytest.raises(InputError, match=message):
        exact_ranks(**call)


def test_cosine_does_not_depend_on_length():
    rng = np.random.default_rng(3)
    pool = 3 * unit(rng, 5, 8)
    np.testing.assert_allclose(cosines(7 * pool[[1, 2]], pool, np.array([1, 2])), 1, atol=1e-6)
    assert cosines(pool[[1]], pool, np.array([2]))[0] == pytest.approx(pool[1] @ pool[2] / 9, abs=1e-6)


def test_a_rank_within_an_article_counts_its_rows_alone():
    rng = np.random.default_rng(4)
    pool = unit(rng, 30, 8)
    pool[12] = pool[11]
    groups = np.arange(30)
    groups[12] = 11
    spans = np.array([[0, 10], [10, 30]])[[0, 1, 1, 1]]
    windows = np.array([[1, 2, 3], [13, 14, 15], [10, 11, 25], [28, 29, 12]])
    predictions = unit(rng, 4, 8)
    got, same = ranks_within([predictions, predictions], pool, windows, spans, groups)
    for i, (first, last) in enumerate(spans):
        own = np.arange(first, last)
        context = windows[i, :-1]
        article_groups = np.where(groups[own] < first, own, groups[own]) - first
        assert got[i] == naive_rank(predictions[i], pool[own], windows[i, -1] - first, context - first, article_groups)
    np.testing.assert_array_equal(got, same)


@pytest.mark.parametrize("together", [1, 3, 32])
@pytest.mark.parametrize("spread", [4, 128])
def test_sums_of_the_pools_rows_rank_like_the_vectors_they_make(monkeypatch, together, spread):
    monkeypatch.setattr(scoring, "_TOGETHER", together)
    monkeypatch.setattr(scoring, "_SPREAD", spread)
    monkeypatch.setattr(scoring, "_QUERY_BLOCK", 7)
    monkeypatch.setattr(ranking, "_POOL_BLOCK", 16)
    rng = np.random.default_rng(5)
    pool = unit(rng, 60, 8)
    pool[40] = pool[12]
    groups = np.arange(60)
    groups[40] = 12
    windows = rng.permutation(np.concatenate([np.arange(20), np.arange(30, 55)]))[:, None] + np.arange(4)
    weights = np.array([0.1, 0.3, 0.6], np.float32)
    three = scoring.Combined(np.einsum("nld,l->nd", pool[windows[:, :3]], weights), windows[:, :3], weights)
    one = scoring.Combined(pool[windows[:, 3]], windows[:, 3:], np.ones(1, np.float32))
    other = unit(rng, len(windows), 8)
    queries = [three, other, one]
    got = rank_many(queries, pool, windows[:, 3], windows[:, :3], groups)
    dense = [query if isinstance(query, np.ndarray) else query.vectors for query in queries]
    for mine, plain in zip(got, rank_many(dense, pool, windows[:, 3], windows[:, :3], groups), strict=True):
        np.testing.assert_array_equal(mine.excluded, plain.excluded)
        np.testing.assert_array_equal(mine.included, plain.included)
