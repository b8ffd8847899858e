from __future__ import annotations

import numpy as np
import pytest

from fastlvm.errors import InputError
from fastlvm.evaluation.bootstrap import Bootstrap
from fastlvm.evaluation.metrics import METRICS, WITHIN, outcomes
from fastlvm.evaluation.ranks import MISS


def test_metrics_of_known_ranks():
    ranks = np.array([1, 2, 5, 10, 50, 51])
    got = Bootstrap(np.arange(6)).summarise(ranks, np.full(6, 0.5))
    want = {
        "R@1": 1 / 6,
        "R@5": 3 / 6,
        "R@10": 4 / 6,
        "MRR@10": (1 + 1 / 2 + 1 / 5 + 1 / 10) / 6,
        "MRR": (1 + 1 / 2 + 1 / 5 + 1 / 10 + 1 / 50 + 1 / 51) / 6,
        "Contain@20": 4 / 6,
        "Contain@50": 5 / 6,
        "Eff@5": 3 / 5,
        "median_rank": 5,
        "cosine": 0.5,
    }
    assert tuple(got) == METRICS
    for name, value in want.items():
        assert got[name].value == pytest.approx(value), name
        assert got[name].low <= value + 1e-12 and value - 1e-12 <= got[name].high, name


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


def test_a_macro_average_counts_every_article_once():
    ranks, article = np.array([1, 1, 1, 9]), np.array([0, 0, 0, 1])
    got = Bootstrap(article).macro(ranks, np.ones(4), article)
    assert got["R@5"].value == 0.5 and got["R@10"].value == 1
    assert "median_rank" not in got
    alike = Bootstrap(np.zeros(4)).macro(ranks, np.ones(4), article)
    assert alike["R@5"].value == 0.5 and alike["R@5"].low is None


def test_a_macro_average_of_works_resamples_works():
    ranks, article = np.array([1, 9, 9, 9]), np.array([0, 1, 2, 3])
    got = Bootstrap(article // 2).macro(ranks, np.ones(4), article)["R@5"]
    assert (got.value, got.low, got.high) == (0.25, 0.0, 0.5)


def test_within_an_article_a_miss_counts_as_a_miss():
    got = Bootstrap(np.arange(4)).within_article(np.array([1, 4, 8, MISS]))
    assert tuple(got) == WITHIN
    assert [got[name].value for name in WITHIN] == [0.25, 0.5, 0.75]


def test_a_truth_that_cannot_be_retrieved_is_a_miss_in_every_metric():
    assert not outcomes(np.array([MISS]), np.array([1.0]))[0, :-1].any()
    estimate = Bootstrap(np.array([0])).summarise(np.array([MISS]), np.array([1.0]))
    assert estimate["median_rank"].value is None
    assert estimate["Eff@5"].value is None
