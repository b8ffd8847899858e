"""Gates of a run: judged after their epoch by the validation, and a missed one stops the run, which can go on."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastlvm import gates
from fastlvm.errors import InputError
from fastlvm.training import TrainOptions, checkpoint, load_run, train
from fastlvm.training.run_gates import RunGates
from fastlvm.training.sweep import sweep
from fastlvm.training.validation import Validation, key

from .conftest import TINY

QUIET = ("time", "windows_per_s", "loading", "gates")


def go(payload, windows, out, *, resume=False, **settings):
    return train("mamba-s", payload, windows, out, resume=resume, **{**TINY, **settings})


@pytest.fixture
def gate(tmp_path):
    """Writes a gate file and returns its path."""

    def write(name, *limits, split="test"):
        path = tmp_path / f"{name}.toml"
        tables = "".join(f"[[limit]]\n{limit}\n" for limit in limits)
        path.write_text(f'about = "a test\'s"\nsplit = "{split}"\n{tables}')
        return path

    return write


EASY = 'metric = "R@5"\nat_least = 0.0'
HARD = 'metric = "R@5"\nat_least = 1.0'
TIME = 'latency = "total"\npercentile = "p95"\nat_most = 1'


def content(run):
    """Everything a run leaves but times and verdicts."""
    tensors, meta = checkpoint.load(run / "last.safetensors")
    history = json.loads((run / "history.json").read_text())
    lines = [{name: value for name, value in entry.items() if name not in QUIET} for entry in history]
    bits = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return bits, lines, meta["state"]["stopped"], (run / "best.safetensors").read_bytes()


def test_a_gate_that_is_met_changes_nothing_but_the_history(payload, windows, tmp_path, gate):
    path = gate("easy", EASY, TIME, 'metric = "R@5"\nover = "mean"\nabove = 0')
    summary = go(payload, windows, tmp_path / "run", gates=[f"{path}@2"])
    go(payload, windows, tmp_path / "plain")
    assert content(tmp_path / "run") == content(tmp_path / "plain")
    assert (summary.stopped, summary.missed, summary.epochs) == ("epochs", "", 3)
    assert ["gates" in entry for entry in summary.history] == [False, False, True, False]
    rows = summary.history[2]["gates"]
    assert rows == json.loads((tmp_path / "run/history.json").read_text())[2]["gates"]
    assert [(row["gate"], row["metric"], row["passed"], row["note"]) for row in rows] == [
        ("easy", "R@5", True, ""),
        ("easy", "total_p95_ms", None, "in training"),
        ("easy", "R@5 over mean", None, "in training"),
    ]
    assert rows[0]["value"] == summary.history[2]["val_r@5"]


def test_a_gate_that_is_missed_stops_the_run_and_leaves_it_whole(payload, windows, tmp_path, gate):
    path, out = gate("hard", HARD), tmp_path / "run"
    summary = go(payload, windows, out, gates=[f"{path}@2"])
    assert (summary.stopped, summary.epochs) == ("gate", 2)
    value = summary.history[2]["val_r@5"]
    assert summary.missed == (
        f"after epoch 2, gate hard missed: R@5 is {value:.4f}, and ≥ 1 is wanted; resumed without that gate, the run "
        "goes on"
    )
    assert len(json.loads((out / "history.json").read_text())) == 3 and (out / "last.safetensors").exists()
    load_run(out)


def test_a_run_that_a_gate_stopped_stays_so_until_the_gate_is_left_out(payload, windows, tmp_path, gate):
    path, out = gate("hard", HARD), tmp_path / "run"
    first = go(payload, windows, out, gates=[f"{path}@1", f"{gate('easy', EASY)}@3"])
    before = content(out)
    again = go(payload, windows, out, resume=True, gates=[f"{path}@1", f"{tmp_path / 'easy.toml'}@3"])
    assert (again.stopped, again.missed, again.history) == ("gate", first.missed, first.history)
    assert content(out) == before
    path.unlink()  # nor is its file asked for
    done = go(payload, windows, out, resume=True, gates=[f"{tmp_path / 'easy.toml'}@3"])
    assert (done.stopped, done.missed, done.epochs) == ("epochs", "", 3)
    assert done.history[1]["gates"][0]["passed"] is False and done.history[3]["gates"][0]["passed"] is True
    assert json.loads((out / "config.json").read_text())["training"]["gates"] == [f"{tmp_path / 'easy.toml'}@3"]
    go(payload, windows, tmp_path / "plain")
    assert content(out) == content(tmp_path / "plain")


def test_a_gate_file_that_is_loosened_lets_the_run_go_on(payload, windows, tmp_path, gate):
    out, text = tmp_path / "run", f"{gate('hard', HARD)}@1"
    assert go(payload, windows, out, gates=[text]).stopped == "gate"
    gate("hard", EASY)
    assert go(payload, windows, out, resume=True, gates=[text]).stopped == "epochs"


def test_gates_of_epochs_to_come_bind_a_resumed_run(payload, windows, tmp_path, gate):
    hard, easy, out = gate("hard", HARD), gate("easy", EASY), tmp_path / "run"
    go(payload, windows, out, gates=[f"{hard}@1", f"{easy}@3"])
    for given in ([], [f"{hard}@1"], [f"{easy}@2"], [f"{easy}@3", f"{hard}@2"]):
        with pytest.raises(InputError, match=r"was started with gates \["):
            go(payload, windows, out, resume=True, gates=given)
    with pytest.raises(InputError, match="was started with lr"):
        go(payload, windows, out, resume=True, gates=[f"{easy}@3"], lr=1.0)
    assert json.loads((out / "config.json").read_text())["training"]["gates"] == [f"{hard}@1", f"{easy}@3"]


def test_a_run_of_before_there_were_gates_goes_on(payload, windows, tmp_path, gate):
    out = tmp_path / "run"
    go(payload, windows, out, gates=[f"{gate('hard', HARD)}@1"])
    config = json.loads((out / "config.json").read_text())
    tensors, meta = checkpoint.load(out / "last.safetensors")
    for old in (config, meta["config"]):
        del old["training"]["gates"]
    meta["state"]["stopped"] = ""
    (out / "config.json").write_text(json.dumps(config))
    checkpoint.save(out / "last.safetensors", tensors, meta)
    assert go(payload, windows, out, resume=True).stopped == "epochs"


def stub(monkeypatch, scores):
    given = iter(scores)
    monkeypatch.setattr(Validation, "figures", lambda *_: {"val_r@5": next(given), "val_r@5_unseen": 0.0})


def test_a_run_that_ends_early_is_judged_by_the_gates_it_did_not_reach(payload, windows, tmp_path, monkeypatch, gate):
    path = gate("some", 'metric = "R@5"\nat_least = 0.35')
    for scores, stopped in (([0.5, 0.4, 0.3], "gate"), ([0.5, 0.4, 0.4], "patience")):
        stub(monkeypatch, scores)
        out = tmp_path / stopped
        summary = go(payload, windows, out, decay=0.3, patience=2, gates=[f"{path}@3"])
        assert (summary.stopped, summary.epochs) == (stopped, 2)
        assert bool(summary.missed) == (stopped == "gate") and "goes on" not in summary.missed
        assert go(payload, windows, out, resume=True, decay=0.3, patience=2, gates=[f"{path}@3"]) == summary


def test_a_figure_that_a_validation_lacks_is_missed(payload, windows, tmp_path, monkeypatch, gate):
    stub(monkeypatch, [0.5, 0.5])
    path = gate("ten", 'metric = "R@10"\nat_least = 0.0')
    assert "R@10 is not measured" in go(payload, windows, tmp_path / "run", decay=0.3, gates=[f"{path}@1"]).missed


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("epoch-4@1", "a list is wanted"),
        ({"epoch-4": 1}, "a list is wanted"),
        *(
            ([bad], "name a gate and an epoch from 1 on")
            for bad in ("epoch-4", "@4", "epoch-4@", "epoch-4@x", "a@0", 4)
        ),
        (["epoch-4@4"], "the run ends with epoch 3: name one up to that"),
        (["epoch-4@2", "epoch-4@2"], "'epoch-4@2' twice"),
        (["epoch4@2"], "gate 'epoch4' is not known"),
        (["absent.toml@2"], "absent.toml does not exist"),
        (["ours@2"], "gate ours limits no metric of a validation: leave ours@2 out"),
        (["ours-latency@2"], "gate ours-latency limits no metric of a validation"),
    ],
)
def test_a_gate_that_cannot_be_judged_is_refused_before_the_run(payload, windows, tmp_path, given, reason):
    with pytest.raises(InputError) as caught:
        go(payload, windows, tmp_path / "run", gates=given)
    assert reason in str(caught.value) and not (tmp_path / "run").exists()


def test_options_with_gates_are_json_and_the_same_again():
    options = TrainOptions(gates=["epoch-2@2", "a@b.toml@5"])
    assert options.gates == ("epoch-2@2", "a@b.toml@5")
    assert TrainOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


def test_every_gate_with_a_metric_of_one_report_can_be_a_runs():
    RunGates([f"{name}@1" for name in gates.names() if not name.startswith("ours")])


def test_a_validation_gives_the_metrics_of_a_report():
    from fastlvm.evaluation.metrics import METRICS

    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((90, 8)).astype(np.float32)
    rows = np.arange(30, 80)[:, None] + np.arange(4)
    validation = Validation(np.arange(90), rows, np.arange(90) < 30)
    found = validation.figures(rng.standard_normal((50, 8)).astype(np.float32), vectors)
    assert set(found) == {key(name) for name in METRICS if name != "cosine"} | {"val_r@5_unseen"}
    assert found["val_eff@5"] == found["val_r@5"] / found["val_contain@50"]
    assert found["val_r@1"] <= found["val_r@5"] <= found["val_r@10"] <= found["val_contain@20"]


def test_a_sweep_goes_on_with_the_other_runs(payload, windows, tmp_path, gate):
    path = gate("hard", HARD)
    settings = {name: value for name, value in TINY.items() if name != "seed"}
    settings |= {"epochs": 2, "gates": [f"{path}@1"]}
    for _ in range(2):  # the second time nothing is left to do
        results = sweep(["mamba-s"], payload, windows, tmp_path / "runs", seeds=(0, 1), **settings)
        assert [len(json.loads((one.path / "history.json").read_text())) for one in results] == [2, 2]
