from __future__ import annotations

import math

import pytest

from fastlvm.errors import InputError
from fastlvm.training import TrainOptions, learning_rate


def test_schedule_is_per_step_linear_then_cosine_to_one_percent():
    options = TrainOptions(lr=2.0, warmup_steps=4)
    rates = [learning_rate(step, 15, options) for step in range(15)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[9] == pytest.approx(2 * (0.01 + 0.99 / 2))  # halfway down
    assert rates[14] == pytest.approx(0.02)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_schedule_without_warm_up_or_too_short_for_it():
    assert learning_rate(0, 10, TrainOptions(lr=1.0, warmup_steps=0)) == 1.0
    assert math.isfinite(learning_rate(0, 1, TrainOptions(warmup_steps=0)))


def test_a_short_run_warms_up_for_a_third_of_its_steps():
    rates = [learning_rate(step, 9, TrainOptions(lr=3.0, warmup_steps=100)) for step in range(9)]
    assert rates[:4] == [1.0, 2.0, 3.0, 3.0]
    assert rates[8] == pytest.approx(0.03)
    assert learning_rate(0, 2, TrainOptions(lr=1.0, warmup_steps=100)) == 1.0


@pytest.mark.parametrize(
    "field, value",
    [
        ("objective", "mse"),
        ("space", "pca"),
        ("projection", True),
        ("negatives", "queue"),
        ("negatives", "payload:0"),
        ("negatives", "payload:"),
        ("negatives", "batch:5"),
        ("false_negatives", "none"),
        ("epochs", 0),
        ("epochs", 2.0),
        ("batch_size", True),
        ("warmup_steps", -1),
        ("seed", -1),
        ("lr", 0.0),
        ("lr", float("inf")),
        ("temperature", 0),
        ("weight_decay", -0.1),
        ("infonce_weight", 1.2),
        ("context_dropout", -0.2),
    ],
)
def test_options_out_of_range_are_refused(field, value):
    with pytest.raises(InputError, match=field):
        TrainOptions(**{field: value})


def test_unknown_option_is_refused():
    with pytest.raises(InputError, match="'learning_rate' is no training option"):
        TrainOptions.from_dict({"learning_rate": 1.0})
    assert TrainOptions.from_dict(TrainOptions(epochs=3).to_dict()) == TrainOptions(epochs=3)
