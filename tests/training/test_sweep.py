"""A sweep trains every cell of its grid, goes on where it stopped, and sums up over seeds."""

from __future__ import annotations

import json

import pytest

from fastlvm.errors import FastlvmError, InputError
from fastlvm.training import sweep as module
from fastlvm.training import train
from fastlvm.training.sweep import averages, sweep

from .conftest import TINY

SETTINGS = {name: value for name, value in TINY.items() if name != "seed"} | {"epochs": 1}


def test_every_cell_is_trained_and_summed_up(payload, windows, tmp_path):
    started = []

    def progress(cell):
        started.append(cell.name)

    results = sweep(
        ["mamba-s", "gru"], payload, windows, tmp_path, seeds=[0, 1], grid={"lr": [1e-3, 1e-2]}, progress=progress,
        **{name: value for name, value in SETTINGS.items() if name != "lr"},
    )  # fmt: skip
    names = [f"{model}-lr={lr}-seed{seed}" for model in ("mamba-s", "gru") for lr in (1e-3, 1e-2) for seed in (0, 1)]
    assert [result.cell.name for result in results] == started == names
    assert {path.name for path in tmp_path.iterdir()} == {*names, "sweep.json"}
    kept = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["r5"] for row in kept] == [result.r5 for result in results]
    own = train(
        "gru", payload, windows, tmp_path / "gru-lr=0.01-seed1", resume=True, **{**SETTINGS, "lr": 1e-2, "seed": 1}
    )
    assert (results[-1].r5, results[-1].best_epoch, results[-1].parameters) == (
        own.best_r5, own.best_epoch, own.parameters
    )  # fmt: skip
    means = averages(results)
    assert [(name, count) for name, count, _, _ in means] == [
        (f"{model}-lr={lr}", 2) for model in ("mamba-s", "gru") for lr in (1e-3, 1e-2)
    ]
    assert means[0][2] == pytest.approx((results[0].r5 + results[1].r5) / 2)


def test_runs_beside_each_other_are_the_same_runs(payload, windows, tmp_path):
    one = sweep(["mixture", "amn"], payload, windows, tmp_path / "one", **SETTINGS)
    two = sweep(["mixture", "amn"], payload, windows, tmp_path / "two", jobs=2, **SETTINGS)
    for alone, beside in zip(one, two, strict=True):
        assert (alone.cell, alone.r5) == (beside.cell, beside.r5)
    assert not [path for path in (tmp_path / "two").iterdir() if path.name.startswith(".")]


def test_a_sweep_that_was_stopped_goes_on(payload, windows, tmp_path, monkeypatch):
    given = {"seeds": [0, 1], **SETTINGS}
    trained = []

    def stops(model, payload, windows, out, **settings):
        if trained:
            raise KeyboardInterrupt
        trained.append(out)
        return train(model, payload, windows, out, **settings)

    monkeypatch.setattr(module, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        sweep(["mixture"], payload, windows, tmp_path, **given)
    monkeypatch.undo()
    before = (tmp_path / "mixture-seed0/last.safetensors").stat().st_mtime_ns
    assert len(sweep(["mixture"], payload, windows, tmp_path, **given)) == 2
    assert (tmp_path / "mixture-seed0/last.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("models", "given", "reason"),
    [
        ([], {}, "models or seeds is empty"),
        (["gru"], {"seeds": []}, "models or seeds is empty"),
        (["gru", "gru"], {}, "gru-seed0 is asked for twice"),
        (["gru"], {"jobs": 0}, "jobs is 0"),
        (["rwkv"], {}, "'rwkv' is not known"),
        (["gru"], {"grid": {"lr": [1e-3, -1]}}, "lr is -1"),
        (["gru"], {"grid": {"learning": [1]}}, "'learning' is no field"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_run(payload, windows, tmp_path, models, given, reason):
    with pytest.raises(InputError, match=reason):
        sweep(models, payload, windows, tmp_path / "out", **{**SETTINGS, **given})
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_in_its_process_is_named(payload, windows, tmp_path):
    (tmp_path / "amn-seed0").mkdir()
    (tmp_path / "amn-seed0/config.json").write_text("{}")
    with pytest.raises(FastlvmError, match=r"amn-seed0 ended with exit code 1: .*config\.json"):
        sweep(["amn"], payload, windows, tmp_path, jobs=2, **SETTINGS)
