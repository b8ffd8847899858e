from __future__ import annotations

import numpy as np
import pytest

from fastlvm.errors import InputError
from fastlvm.evaluation.suspects import model_findings, mutual_cosine


def case(n=60, dim=16, step=0.7, seed=0):
    """Last context vectors and targets that wander from them, float32 [n, dim]."""
    rng = np.random.default_rng(seed)
    last = rng.standard_normal((n, dim)).astype(np.float32)
    return last, (last + step * rng.standard_normal((n, dim))).astype(np.float32)


def codes(predictions, last, truth, unseen=True):
    found = model_findings("gru", predictions, last, truth, unseen=unseen)
    assert all(finding.sentence.startswith("gru ") for finding in found)
    return [(finding.code, finding.level) for finding in found]


def noisy(vectors, by):
    return vectors + by * np.random.default_rng(5).standard_normal(vectors.shape).astype(np.float32)


def test_the_truth_is_flagged_on_unseen_articles_and_warned_of_on_others():
    last, truth = case()
    assert codes(noisy(3 * truth, 0.01), last, truth) == [("model-returns-truth", "fault")]
    assert codes(truth, last, truth, unseen=False) == [("model-returns-truth", "warning")]
    (finding,) = model_findings("gru", truth, last, truth, unseen=True)
    assert "returns the truth: cosine 1.0000 to the target" in finding.sentence
    assert finding.figures["cosine_to_target"] == pytest.approx(1)


def test_the_last_row_is_flagged():
    last, truth = case()
    assert codes(noisy(last, 0.01), last, truth) == [("model-copies-last", "fault")]


@pytest.mark.parametrize("noise", [0, 0.01])
def test_constant_output_is_flagged(noise):
    last, truth = case()
    assert codes(noisy(np.ones_like(last), noise), last, truth) == [("model-constant", "fault")]


def test_a_model_is_not_flagged():
    last, truth = case()
    for predictions in (last + truth, last + 0.1 * np.roll(last, 1, 0), noisy(truth, 0.1), noisy(last, 0.1)):
        assert codes(predictions, last, truth) == []


def test_where_neighbours_are_nearly_equal_everything_is_near_everything():
    last, truth = case(step=0.01)
    assert codes(last + truth, last, truth) == []


def test_one_topic_is_not_constant_output():
    rng = np.random.default_rng(0)
    topic = 40 * rng.standard_normal(16)
    last, truth = (topic + rng.standard_normal((60, 16)) for _ in range(2))
    assert mutual_cosine(truth) > 0.999
    assert codes(0.5 * last + 0.5 * topic + 0.5 * rng.standard_normal((60, 16)), last, truth) == []


def test_windows_whose_target_repeats_the_last_row_say_nothing():
    last, truth = case()
    truth[:40] = last[:40]
    assert codes(last, last, truth) == [("model-copies-last", "fault")]
    truth[:55] = last[:55]
    assert codes(last, last, truth) == []


def test_a_handful_of_windows_says_nothing():
    last, truth = case(n=7)
    assert codes(truth, last, truth) == []


@pytest.mark.parametrize(("value", "said"), [(np.nan, "holds NaN"), (0, "is zero")])
def test_bad_output_names_the_model(value, said):
    last, truth = case()
    with pytest.raises(InputError, match=f"prediction of gru row 0 {said}"):
        model_findings("gru", np.full_like(last, value), last, truth, unseen=True)


def test_shapes_that_differ_are_refused():
    last, truth = case()
    with pytest.raises(InputError, match="is wanted of both"):
        model_findings("gru", last, last[:3], truth, unseen=True)


def test_mutual_cosine_is_that_of_all_pairs():
    vectors, _ = case(n=9)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = (unit @ unit.T)[np.triu_indices(9, 1)]
    assert mutual_cosine(vectors) == pytest.approx(pairs.mean(), abs=1e-6)
