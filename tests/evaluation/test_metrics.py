from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlvm.errors import InputError
from fastlvm.evaluation import metrics
from fastlvm.evaluation.metrics import METRICS, MISS, Bootstrap, cosines, exact_ranks, outcomes, rank_many


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
        patch.setattr(metrics, "_POOL_BLOCK", pool_block)
        patch.setattr(metrics, "_QUERY_BLOCK", query_block)
        both = rank_many([predictions, predictions], pool, truth, exclude, groups)
        got = exact_ranks(predictions, pool, truth, exclude, groups)
    none = np.full((len(truth), 1), -1)
    ex = none if exclude is None else exclude
    n = range(len(truth))
    want = [naive_rank(predictions[i], pool, truth[i], ex[i], groups) for i in n]
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(both[1].excluded, want)
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
    assert not outcomes(ranks.excluded, np.array([1.0]))[0, :5].any()
    estimate = Bootstrap(np.array([0])).summarise(ranks.excluded, np.array([1.0]))
    assert estimate["median_rank"].value is None
    assert estimate["Eff@5"].value is None


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


def test_metrics_of_known_ranks():
    ranks = np.array([1, 2, 5, 10, 50, 51])
    got = Bootstrap(np.arange(6)).summarise(ranks, np.full(6, 0.5))
    want = {
        "R@1": 1 / 6,
        "R@5": 3 / 6,
        "R@10": 4 / 6,
        "MRR@10": (1 + 1 / 2 + 1 / 5 + 1 / 10) / 6,
        "Contain@50": 5 / 6,
        "Eff@5": 3 / 5,
        "median_rank": 5,
        "cosine": 0.5,
    }
    assert tuple(got) == METRICS
    for name, value in want.items():
        assert got[name].value == pytest.approx(value), name
        assert got[name].low <= value + 1e-12 and value - 1e-12 <= got[name].high, name


def test_cosine_does_not_depend_on_length():
    rng = np.random.default_rng(3)
    pool = 3 * unit(rng, 5, 8)
    np.testing.assert_allclose(cosines(7 * pool[[1, 2]], pool, np.array([1, 2])), 1, atol=1e-6)
    assert cosines(pool[[1]], pool, np.array([2]))[0] == pytest.approx(pool[1] @ pool[2] / 9, abs=1e-6)


def clustered(rng, articles=40, windows=12):
    """Whether each window is a hit: an article's windows share their luck. The expected share is 0.5."""
    luck = rng.beta(1, 1, articles)
    hits = rng.random((articles, windows)) < luck[:, None]
    return np.where(hits.ravel(), 1, 100), np.repeat(np.arange(articles), windows)


def test_intervals_cover_the_truth_because_articles_are_resampled():
    rng = np.random.default_rng(4)
    by_article = by_window = 0
    trials = 100
    for trial in range(trials):
        ranks, article = clustered(rng)
        for unit_of, by in ((article, "article"), (np.arange(len(article)), "window")):
            five = Bootstrap(unit_of, resamples=100, seed=trial).summarise(ranks, np.zeros(len(ranks)))["R@5"]
            covered = five.low <= 0.5 <= five.high
            by_article += covered and by == "article"
            by_window += covered and by == "window"
    assert by_article / trials > 0.88
    assert by_window / trials < 0.75  # what resampling windows would have promised


def test_a_paired_difference_is_tighter_than_two_intervals():
    rng = np.random.default_rng(5)
    ranks, article = clustered(rng, articles=60)
    better = np.where((ranks > 5) & (rng.random(len(ranks)) < 0.1), 5, ranks)
    zero = np.zeros(len(ranks))
    bootstrap = Bootstrap(article)
    five = bootstrap.difference(better, zero, ranks, zero)["R@5"]
    assert five.value == pytest.approx(np.mean(better <= 5) - np.mean(ranks <= 5))
    assert 0 < five.low < five.value < five.high
    one, other = bootstrap.summarise(better, zero)["R@5"], bootstrap.summarise(ranks, zero)["R@5"]
    assert one.low < other.high  # apart, the two intervals overlap
    same = bootstrap.difference(ranks, zero, ranks, zero)
    assert all(figure.value == figure.low == figure.high == 0 for figure in same.values())


def test_the_same_seed_gives_the_same_interval_and_one_article_gives_none():
    ranks, article = clustered(np.random.default_rng(6))
    zero = np.zeros(len(ranks))
    first, again = (Bootstrap(article, seed=3).summarise(ranks, zero) for _ in range(2))
    assert first == again
    assert first != Bootstrap(article, seed=4).summarise(ranks, zero)
    alone = Bootstrap(np.zeros(len(ranks), int)).summarise(ranks, zero)["R@5"]
    assert alone.value is not None and alone.low is None and alone.high is None


def test_unequal_articles_are_weighted_by_their_windows():
    ranks = np.array([1] * 9 + [100])
    five = Bootstrap(np.array([0] * 9 + [1]), resamples=500).summarise(ranks, np.zeros(10))["R@5"]
    assert (five.low, five.value, five.high) == (0.0, 0.9, 1.0)


def test_weighted_median_of_a_resample_is_the_plain_median():
    rng = np.random.default_rng(7)
    ranks, article = rng.integers(1, 100, 60), np.repeat(np.arange(12), 5)
    bootstrap = Bootstrap(article, resamples=101)
    medians = []
    for weights in bootstrap.weights.astype(int):
        drawn = np.sort(np.repeat(ranks, weights[article]))
        medians.append(drawn[(len(drawn) - 1) // 2])
    estimate = bootstrap.summarise(ranks, np.zeros(60))["median_rank"]
    medians.sort()
    assert (estimate.low, estimate.high) == (medians[2], medians[98])


@pytest.mark.parametrize(
    "arguments", [{"clusters": []}, {"clusters": [1], "resamples": 0}, {"clusters": [1], "level": 1}]
)
def test_a_bootstrap_of_nothing_is_refused(arguments):
    clusters = np.array(arguments.pop("clusters"))
    with pytest.raises(InputError):
        Bootstrap(clusters, **arguments)
