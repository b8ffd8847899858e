from __future__ import annotations

import numpy as np
import pytest

from fastlvm.data import Payload, Space, Windows
from fastlvm.evaluation import baselines
from fastlvm.evaluation.ranker import Pool, Pools, predict_all
from fastlvm.evaluation.ranks import exact_ranks

ORACLES = ["target as query", "next by key"]
NAMES = [
    "random",
    "global mean",
    "copy-last",
    "mean",
    "recency mixture",
    "ridge",
    "whitened copy-last",
    "whitened mixture",
    "whitened ridge",
    *ORACLES,
]


@pytest.fixture(scope="module")
def space(payload, windows):
    return Space.fit_articles(payload, windows.articles("train"))


@pytest.fixture(scope="module")
def fitted(payload, windows, space):
    return {ranker.name: ranker for ranker in baselines.fit_baselines(payload, windows, space)}


@pytest.fixture(scope="module")
def context(payload, windows):
    return payload.take(windows.rows("test")[:, :5])


def test_all_are_there_each_in_its_space(fitted, space):
    assert list(fitted) == NAMES
    for name, ranker in fitted.items():
        assert ranker.kind == ("oracle" if name in ORACLES else "baseline")
        assert ranker.keys == (name == "next by key")
        assert (ranker.space is space) == name.startswith("whitened"), name
        assert (ranker.space is None) == (not name.startswith("whitened")), name


def test_each_predicts_what_its_name_says(fitted, context, payload, windows, space):
    np.testing.assert_allclose(fitted["copy-last"].predict(context), context[:, -1], atol=1e-6)
    np.testing.assert_allclose(fitted["mean"].predict(context), context.mean(axis=1), atol=1e-6)
    white = space.apply(context)
    np.testing.assert_allclose(fitted["whitened copy-last"].predict(context), white[:, -1], atol=1e-6)
    train = np.isin(payload.keys[:, 0], windows.articles("train"))
    mean = payload.take(np.flatnonzero(train)).mean(axis=0)
    np.testing.assert_allclose(fitted["global mean"].predict(context), np.tile(mean, (len(context), 1)), atol=1e-6)
    decay = float(fitted["whitened mixture"].note.split()[1].rstrip(","))
    weights = decay ** np.arange(4, -1, -1) / np.sum(decay ** np.arange(5))
    want = (white * weights[None, :, None]).sum(axis=1)
    np.testing.assert_allclose(fitted["whitened mixture"].predict(context), want, atol=1e-5)


def test_random_draws_payload_rows_and_repeats_with_the_seed(payload, windows):
    rows = windows.rows("test")
    one, two, three = (baselines.random_rows(payload, seed=s).predict(rows) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, three)
    everything = payload.take(np.arange(len(payload)))
    assert all((everything == row).all(axis=1).any() for row in one)


def test_the_decay_is_the_best_of_those_tried(payload, windows, monkeypatch):
    train = windows.rows("train")
    pool, groups = payload.take(np.arange(len(payload))), np.asarray(payload.groups)
    log_ranks = []
    for decay in baselines.DECAYS:
        predictions = baselines.mixture(decay, name="m").predict(payload.take(train[:, :5]))
        log_ranks.append(np.mean(np.log(exact_ranks(predictions, pool, train[:, -1], train[:, :-1], groups))))
    best = baselines.DECAYS[int(np.argmin(log_ranks))]
    assert baselines.fit_decay(payload, train) == best
    chosen = baselines.fitted_mixture(Pools(payload), train, None, seed=0)
    assert chosen.note.startswith(f"decay {best:g}, chosen on {len(train)} training")


def test_ridge_is_the_closed_form(payload, windows, monkeypatch):
    train = windows.rows("train")
    monkeypatch.setattr(baselines, "PENALTIES", (0.3,))
    monkeypatch.setattr(baselines, "_FIT_BLOCK", 17)
    ridge = baselines.fitted_ridge(Pools(payload), train, windows.rows("validation"), None, seed=0)
    x = payload.take(train[:, :5]).reshape(len(train), -1).astype(np.float64)
    y = payload.take(train[:, 5]).astype(np.float64)
    mean = x.mean(axis=0)
    xx = (x - mean).T @ (x - mean)
    xx += 0.3 * np.trace(xx) / len(xx) * np.eye(len(xx))
    weights = np.linalg.inv(xx) @ (x - mean).T @ (y - y.mean(axis=0))
    context = payload.take(windows.rows("test")[:, :5])
    np.testing.assert_allclose(ridge.predict(context), (context.reshape(len(context), -1) - mean) @ weights, atol=2e-4)
    assert ridge.note == f"λ 0.3, chosen on {len(windows.rows('validation'))} validation windows"


def test_ridge_finds_a_linear_law(tmp_path):
    """Every chunk is the one before, turned: copying fails, the linear map is exact."""
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    chain = [rng.standard_normal((30, 12))]
    for _ in range(9):
        chain.append(chain[-1] @ turn)
    vectors = np.stack(chain, axis=1).reshape(-1, 12)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    keys = np.stack([np.repeat(np.arange(30), 10), np.tile(np.arange(10), 30)], axis=1).astype(np.int32)
    payload = Payload.build(tmp_path / "p", vectors, keys, encoder="test")
    windows = Windows.build(payload, split=(0.6, 0.2, 0.2))
    test = windows.rows("test")
    recall = {}
    for ranker in baselines.fit_baselines(payload, windows):
        predictions = predict_all(ranker, payload, test)
        recall[ranker.name] = np.mean(
            exact_ranks(predictions, Pool(payload, ranker.space), test[:, -1], test[:, :-1]) <= 1
        )
    assert recall["ridge"] > 0.9 > 0.5 > recall["copy-last"]


@pytest.mark.parametrize("repeated", [False, True])
def test_moments_of_runs_are_those_of_the_windows_one_by_one(repeated):
    rng = np.random.default_rng(3)
    vectors = (rng.standard_normal((400, 6)) + 0.7).astype(np.float32)
    runs = [(0, 40), (41, 42), (60, 200), (150, 220) if repeated else (230, 240), (300, 395)]
    windows = np.concatenate([np.arange(first, last)[:, None] + np.arange(6) for first, last in runs])
    mean, xx, xy = baselines._moments(vectors, rng.permutation(windows))
    x = vectors[windows[:, :-1]].reshape(len(windows), -1).astype(np.float64)
    y = vectors[windows[:, -1]].astype(np.float64)
    np.testing.assert_allclose(mean, x.mean(axis=0), atol=1e-6)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    np.testing.assert_allclose(xx, x.T @ x, atol=2e-6 * len(x))
    np.testing.assert_allclose(xy, x.T @ y, atol=2e-6 * len(x))


def test_the_oracles_predict_the_target_and_what_the_key_says_is_next(fitted, payload, windows):
    rows = windows.rows("test")
    np.testing.assert_array_equal(fitted["target as query"].predict(rows), payload.take(rows[:, -1]))
    np.testing.assert_array_equal(fitted["next by key"].predict(rows), payload.take(rows[:, -1]))
    at_the_end = np.array([[0, len(payload) - 1, 0]])
    np.testing.assert_array_equal(fitted["next by key"].predict(at_the_end), payload.take(at_the_end[:, 1]))


def test_nothing_is_fitted_on_test_articles(payload, windows, space, tmp_path):
    """Scrambling the test articles changes no fitted weight."""
    vectors = payload.take(np.arange(len(payload)))
    test = np.isin(payload.keys[:, 0], windows.articles("test"))
    rng = np.random.default_rng(9)
    vectors[test] = rng.standard_normal((test.sum(), payload.dim))
    other = Payload.build(tmp_path / "other", vectors, np.array(payload.keys), encoder="test")
    context = rng.standard_normal((4, 5, payload.dim)).astype(np.float32)
    one = baselines._moments(Pool(payload), windows.rows("train"))
    two = baselines._moments(Pool(other), windows.rows("train"))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    means = [baselines.global_mean(p, windows).predict(context) for p in (payload, other)]
    np.testing.assert_allclose(*means, atol=1e-6)


def test_without_training_windows_only_what_needs_none_is_left(payload):
    everything = Windows.build(payload, split=(0.0, 0.0, 1.0))
    found = [r.name for r in baselines.fit_baselines(payload, everything)]
    assert found == ["random", "copy-last", "mean", *ORACLES]


def test_a_pool_gives_the_same_kept_or_not(payload, space):
    kept, read = Pool(payload, space), Pool(payload, space, cache_bytes=0)
    for rows in (slice(3, 40), np.array([5, 1]), np.array([[1, 2], [3, 4]])):
        np.testing.assert_allclose(kept[rows], read[rows], atol=1e-6)
    assert kept.shape == read.shape == (len(payload), payload.dim)
    assert kept._vectors is not None and read._vectors is None


SAMPLES = [(6_000, 4000), (24_815, 4000), (76_050, 3155), (584_545, 800), (9 << 30, 800)]


@pytest.mark.parametrize(("pool", "count"), SAMPLES)
def test_a_candidate_is_judged_on_enough_windows_of_a_large_payload(pool, count):
    rows = np.arange(60_000).reshape(10_000, 6)
    found = baselines._sample(rows, pool, 0, most=4000)
    assert len(found) == count and len(np.unique(found[:, 0])) == count
    assert len(baselines._sample(rows[:150], pool, 0, most=4000)) == 150


def test_what_a_ranker_combines_is_what_it_predicts(fitted, payload, windows, space):
    rows = windows.rows("test")
    combining = {name: ranker for name, ranker in fitted.items() if ranker.combine is not None}
    assert set(combining) == set(NAMES) - {"global mean", "ridge", "whitened ridge"}
    for name, ranker in combining.items():
        of, weights = ranker.combine(rows)
        vectors = payload.take(of) if ranker.space is None else space.apply(payload.take(of))
        np.testing.assert_allclose(
            predict_all(ranker, payload, rows), np.einsum("nmd,m->nd", vectors, weights), atol=1e-6, err_msg=name
        )


def test_on_a_large_payload_a_candidate_is_judged_among_a_draw_of_it(payload, windows, monkeypatch):
    whole = [baselines.fit_decay(payload, windows.rows("train"), seed=seed) for seed in range(3)]
    monkeypatch.setattr(baselines, "_WHOLE", 200)
    seen = []
    rank = baselines.rank_windows
    monkeypatch.setattr(
        baselines, "rank_windows", lambda p, pool, *rest: (seen.append(len(pool)), rank(p, pool, *rest))[1]
    )
    drawn = [baselines.fit_decay(payload, windows.rows("train")[:40], seed=seed) for seed in range(3)]
    assert all(200 <= rows < len(payload) for rows in seen) and len(seen) == 3
    assert np.abs(np.subtract(whole, drawn)).max() <= 0.2
