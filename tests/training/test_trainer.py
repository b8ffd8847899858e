from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from fastlvm.data import Windows
from fastlvm.errors import InputError, IntegrityError
from fastlvm.evaluation.ranks import exact_ranks
from fastlvm.models import ModelConfig, create
from fastlvm.models.tower import Tower
from fastlvm.training import checkpoint, load_run, train
from fastlvm.training.learned import Learned
from fastlvm.training.negatives import Batch, Negatives
from fastlvm.training.objective import Objective
from fastlvm.training.options import TrainOptions
from fastlvm.training.validation import Validation

from .conftest import TINY, build_payload


def go(payload, windows, out, **settings):
    return train("mamba-s", payload, windows, out, **{**TINY, **settings})


@pytest.fixture(scope="module")
def run(payload, windows, tmp_path_factory):
    """One finished run, shared by the tests that only read it."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "run"
    calls = []
    summary = go(payload, windows, out, progress=lambda **event: calls.append(event))
    return out, summary, calls


def test_files_and_history(run):
    out, summary, _ = run
    names = {"best.safetensors", "config.json", "history.json", "history.png", "last.safetensors", "space.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    history = json.loads((out / "history.json").read_text())
    assert history == summary.history and [entry["epoch"] for entry in history] == [0, 1, 2, 3]
    wanted = [
        "epoch",
        "train_loss",
        "train_infonce",
        "train_ar_cosine",
        "val_loss",
        "val_cosine",
        *(f"val_{name}" for name in ("r@1", "r@5", "r@10", "mrr@10", "mrr", "contain@20", "contain@50", "eff@5")),
        "val_median_rank",
        "val_r@5_unseen",
        "negatives",
        "lr",
        "time",
        "windows_per_s",
        "loading",
    ]
    assert all(list(entry) == wanted for entry in history)
    assert history[0]["train_loss"] is None and history[1]["train_infonce"] > 0
    assert history[-1]["lr"] == pytest.approx(0.01 * TINY["lr"])
    assert summary.stopped == "epochs" and summary.epochs == 3


def test_epoch_0_is_the_recency_mixture(run, payload, windows):
    out, summary, _ = run
    _, config, space = load_run(out)
    assert config["decay_fitted"] and config["model"]["decay"] == summary.decay
    pool = space.apply(payload.take(np.arange(len(payload))))
    rows = windows.rows("validation")
    mixed = np.einsum("nld,l->nd", pool[rows[:, :-1]], summary.decay ** np.arange(4.0, -1.0, -1.0))
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    ranks = exact_ranks(mixed.astype(np.float32), pool, rows[:, -1], rows[:, :-1], payload.groups)
    assert summary.start_r5 == pytest.approx(np.mean(ranks <= 5))
    cosine = (mixed * pool[rows[:, -1]]).sum(1).mean()
    assert summary.history[0]["val_cosine"] == pytest.approx(cosine, abs=1e-5)


def test_best_is_kept_and_loaded(run, payload, windows):
    out, summary, _ = run
    model, _, space = load_run(out)
    assert not model.training
    pool = space.apply(payload.take(np.arange(len(payload))))
    rows = windows.rows("validation")
    with torch.no_grad():
        predicted = model(torch.from_numpy(pool[rows[:, :-1]])).numpy()
    ranks = exact_ranks(predicted, pool, rows[:, -1], rows[:, :-1], payload.groups)
    assert summary.best_r5 == pytest.approx(np.mean(ranks <= 5))
    scores = [entry["val_r@5"] for entry in summary.history]
    assert summary.best_r5 == max(scores) and summary.best_epoch == scores.index(max(scores))


def test_progress_is_told_every_step_and_epoch(run, windows):
    _, summary, calls = run
    steps = -(-len(windows.rows("train")) // TINY["batch_size"])
    assert [(c["epoch"], c["step"]) for c in calls if c["entry"] is None] == [
        (epoch, step) for epoch in (1, 2, 3) for step in range(1, steps + 1)
    ]
    assert [c["entry"] for c in calls if c["entry"] is not None] == summary.history
    assert all(c["steps"] == steps and c["epochs"] == 3 for c in calls)


def test_the_history_tells_the_mean_over_windows_and_dropout_is_off_in_validation(run, payload, windows):
    out, summary, calls = run
    n = len(windows.rows("train"))
    last = [c for c in calls if c["epoch"] == 3 and c["entry"] is None]
    sizes = [min(TINY["batch_size"], n - i) for i in range(0, n, TINY["batch_size"])]
    mean = sum(c["loss"] * size for c, size in zip(last, sizes, strict=True)) / n
    assert summary.history[3]["train_loss"] == pytest.approx(mean)
    model, _, space = load_run(out)
    model.load_state_dict(checkpoint.pick(checkpoint.load(out / "last.safetensors")[0], "model"))
    rows = windows.rows("validation")
    vectors = torch.from_numpy(space.apply(payload.take(rows)))
    with torch.no_grad():
        cosine = (model(vectors[:, :-1]) * vectors[:, -1]).sum(-1).mean().item()
    assert summary.history[3]["val_cosine"] == pytest.approx(cosine, abs=1e-5)


def test_nothing_is_printed_and_the_callers_randomness_is_left(payload, windows, tmp_path, capfd):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    go(payload, windows, tmp_path / "run", epochs=1)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert capfd.readouterr() == ("", "")


def test_the_seed_decides_everything(run, payload, windows, tmp_path):
    out, _, _ = run
    go(payload, windows, tmp_path / "again")
    go(payload, windows, tmp_path / "other", seed=4)
    assert (tmp_path / "again/best.safetensors").read_bytes() == (out / "best.safetensors").read_bytes()
    assert (tmp_path / "other/last.safetensors").read_bytes() != (out / "last.safetensors").read_bytes()


def judge(monkeypatch, given):
    """Make the validation R@5 of each epoch the next one of `given`."""
    figures = lambda *_: {"val_r@5": next(given), "val_r@5_unseen": 0.0}  # noqa: E731
    monkeypatch.setattr(Validation, "figures", figures)


@pytest.mark.parametrize("scores, best", [([0.5, 0.5, 0.4], 0), ([0.5, 0.6, 0.6], 1)])
def test_only_a_strictly_better_epoch_is_kept(payload, windows, tmp_path, monkeypatch, scores, best):
    given = iter([*scores, 0.1])
    judge(monkeypatch, given)
    summary = go(payload, windows, tmp_path / "run", decay=0.3)
    assert (summary.best_epoch, summary.best_r5) == (best, scores[best])
    model, config, _ = load_run(tmp_path / "run")
    untouched = not bool(model.head.weight.detach().any())
    assert untouched == (best == 0) and config["model"]["decay"] == 0.3


def test_patience(payload, windows, tmp_path, monkeypatch):
    given = iter([0.3, 0.5, 0.4, 0.5, 0.9])
    judge(monkeypatch, given)
    summary = go(payload, windows, tmp_path / "run", decay=0.3, patience=2, epochs=9)
    assert (summary.stopped, summary.epochs, summary.best_epoch) == ("patience", 3, 1)


QUIET = {"dropout": 0.0, "context_dropout": 0.0, "span_corruption": 0.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "ar"},
        {"projection": "mlp", "negatives": "batch"},
        {"negatives": "batch", "false_negatives": "group", "ema": 0.9},
        {"space": "none", "residual": False},
        {"objective": "infonce", "negatives": "batch", "false_negatives": "group", "queue": 4},
        {"negatives": "batch", "hard_negatives": "same-article:2"},
        {"hard_negatives": "index:3", "false_negatives": "article"},
        {"precision": "bf16"},
        {"micro_batch": 10, "negatives": "batch", "false_negatives": "group"},
        {"reverse": True, "deterministic": True},
    ],
)
def test_variants_train(payload, windows, tmp_path, settings):
    summary = go(payload, windows, tmp_path / "run", epochs=2, lr=1e-2, **{**QUIET, **settings})
    assert summary.history[2]["train_loss"] < summary.history[1]["train_loss"]
    assert (summary.history[1]["train_infonce"] is None) == (settings.get("objective") == "ar")
    load_run(tmp_path / "run")


def test_a_small_model_overfits_64_windows():
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(64 + 5, 32), dim=-1)
    batch = Batch(torch.arange(64)[:, None] + torch.arange(6))
    groups = torch.arange(69)
    options = TrainOptions(negatives="payload", false_negatives="group", infonce_weight=1.0)
    objective = Objective(options, vectors, Negatives(options, torch.arange(69), groups, groups))
    model = create("mamba-s", vector_dim=32, d_model=64, n_layers=2, d_state=8, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = objective(model(vectors[batch.context]), batch).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted = model(vectors[batch.context]).detach().numpy()
    rows = batch.rows.numpy()
    assert (exact_ranks(predicted, vectors.numpy(), rows[:, -1], rows[:, :-1], groups.numpy()) == 1).all()


def test_weight_decay_spares_norms_biases_states_and_the_mixture():
    model = create("mamba-s", vector_dim=8, d_model=16, n_layers=1, d_state=4)
    learned = Learned(model, None, None, TrainOptions(weight_decay=0.5))
    names, groups = learned.names, learned.groups()
    assert {names[p] for group in groups if group["weight_decay"] == 0.5 for p in group["params"]} == {
        f"model.{name}.weight"
        for name in (
            "embed",
            "blocks.0.in_proj",
            "blocks.0.conv",
            "blocks.0.x_proj",
            "blocks.0.dt_proj",
            "blocks.0.out_proj",
            "head",
        )
    }
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
    assert sorted(names[p] for group in groups for p in group["params"]) == sorted(names.values())


def test_the_head_has_a_learning_rate_of_its_own():
    options = TrainOptions(lr=0.5, head_lr=0.1)
    learned = Learned(create("mlp", vector_dim=8, d_ff=16), None, Tower(8, 4, 0.0), options)
    for group in learned.groups():
        for p in group["params"]:
            slow = learned.names[p].startswith(("model.head", "tower.down"))
            assert group["lr"] == pytest.approx(0.05 if slow else 0.5)


def test_a_folder_in_use_is_refused(run, payload, windows):
    out, _, _ = run
    with pytest.raises(InputError, match="already holds something"):
        go(payload, windows, out)


def test_bad_settings_write_nothing(payload, windows, tmp_path):
    out = tmp_path / "run"
    for settings, message in (
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"context": 4}, "context is 4"),
        ({"vector_dim": 9}, "vector_dim is 9"),
        ({"epochs": 0}, "epochs"),
    ):
        with pytest.raises(InputError, match=message):
            go(payload, windows, out, **settings)
    assert not out.exists()


def test_windows_of_another_payload_are_refused(payload, tmp_path):
    other = build_payload(tmp_path / "other", seed=1)
    with pytest.raises(IntegrityError, match=other.id):
        go(payload, Windows.build(other), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_windows_that_fail_the_gate_are_refused(payload, windows, tmp_path, monkeypatch):
    def refuse(self, payload):
        raise IntegrityError("not from this payload")

    monkeypatch.setattr(Windows, "verify", refuse)
    with pytest.raises(IntegrityError, match="not from this payload"):
        go(payload, windows, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_split_without_windows_is_refused(payload, tmp_path):
    with pytest.raises(InputError, match="validation split"):
        go(payload, Windows.build(payload, split=(0.8, 0.0, 0.2)), tmp_path / "run")


def test_a_config_and_its_decay_are_taken_as_given(payload, windows, tmp_path):
    config = ModelConfig.preset("mamba-s", vector_dim=12, d_model=16, n_layers=1, d_state=4, decay=0.9)
    options = {name: value for name, value in TINY.items() if name in TrainOptions.__dataclass_fields__}
    summary = train(config, payload, windows, tmp_path / "run", **{**options, "epochs": 1})
    assert summary.decay == 0.9


def test_decay_is_fitted_on_training_windows(tmp_path):
    """Every chunk is the mixture of the five before it, with decay 0.6, and some noise."""
    from fastlvm.data import Payload, Space
    from fastlvm.evaluation.baselines import fit_decay

    rng = np.random.default_rng(0)
    vectors, keys = [], []
    for article in range(12):
        chunks = list(rng.normal(size=(5, 64)))
        for _ in range(25):
            mixed = sum(0.6**age * chunks[-1 - age] / np.linalg.norm(chunks[-1 - age]) for age in range(5))
            chunks.append(mixed / np.linalg.norm(mixed) + 0.16 * rng.normal(size=64))
        vectors += [v / np.linalg.norm(v) for v in chunks]
        keys += [(article, chunk) for chunk in range(30)]
    payload = Payload.build(
        tmp_path / "p", np.array(vectors, np.float32), np.array(keys, np.int32), encoder="synthetic"
    )
    windows = Windows.build(payload, split=(0.8, 0.1, 0.1))
    assert 0.4 <= fit_decay(payload, windows.rows("train"), Space.identity(64)) <= 0.8


def test_a_run_moves_the_head_at_its_own_rate(payload, windows, tmp_path):
    """AdamW's first steps are as long as the learning rate, whatever the gradient."""
    moved = {}
    for share in (1.0, 0.01):
        go(payload, windows, tmp_path / str(share), epochs=1, head_lr=share, clip=1e9)
        head = load_file(tmp_path / str(share) / "last.safetensors")["model.head.weight"]
        moved[share] = float(head.abs().mean())  # it starts at zero
    assert 0 < moved[0.01] < 0.05 * moved[1.0]
