"""Training with mlx: torch's loss, gradients and steps, a run folder everyone reads, and an exact resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

from mlx.nn import value_and_grad  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

import fastlvm  # noqa: E402
from fastlvm.cli import app  # noqa: E402
from fastlvm.data import Windows  # noqa: E402
from fastlvm.errors import InputError, IntegrityError  # noqa: E402
from fastlvm.evaluation.ranks import exact_ranks  # noqa: E402
from fastlvm.models import create, weight_file  # noqa: E402
from fastlvm.models import mlx as twins  # noqa: E402
from fastlvm.training import TrainOptions, curve, load_run, predict_with  # noqa: E402
from fastlvm.training import train as torch_train  # noqa: E402
from fastlvm.training.learned import Learned  # noqa: E402
from fastlvm.training.mlx import train  # noqa: E402
from fastlvm.training.mlx.objective import Objective  # noqa: E402
from fastlvm.training.mlx.optimizer import Optimizer  # noqa: E402
from fastlvm.training.mlx.trainer import TORCHS, Trainer  # noqa: E402
from fastlvm.training.negatives import Batch, Negatives  # noqa: E402
from fastlvm.training.objective import Objective as TorchObjective  # noqa: E402

from .conftest import TINY, build_payload  # noqa: E402

SETTINGS = {**TINY, "context_dropout": 0.0, "span_corruption": 0.0}
MEASURED = ("time", "windows_per_s", "loading")


@pytest.fixture(autouse=True)
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def undrawn(monkeypatch):
    """No history.png, which takes longer than the epoch it is of."""
    monkeypatch.setattr(curve, "draw", lambda history, folder: None)


def go(payload, windows, out, name="mamba-s", **settings):
    return train(name, payload, windows, out, **{**SETTINGS, **settings})


def content(run: Path):
    """Everything a run leaves, without the times."""
    tensors, meta = weight_file.load(run / "last.safetensors")
    history = json.loads((run / "history.json").read_text())
    for entry in (*history, *meta["state"]["history"]):
        for measured in MEASURED:
            entry.pop(measured)
    bits = {name: array.tobytes() for name, array in tensors.items()}
    return bits, meta, history, (run / "best.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(payload, windows, tmp_path_factory):
    """The run nobody interrupts."""
    out = tmp_path_factory.mktemp("mlx") / "run"
    calls = []
    summary = go(payload, windows, out, progress=lambda **event: calls.append(event))
    return out, summary, calls


# The mathematics.


def both(name="mamba-s", seed=0, **overrides):
    """A model of torch and one of mlx of the same weights, as if trained."""
    torch.manual_seed(seed)
    model = create(name, **{"vector_dim": 12, "d_model": 16, "n_layers": 2, "d_state": 4, "dropout": 0.0, **overrides})
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    own = twins.create(model.config)
    twins.load_weights(own, {key: tensor.numpy() for key, tensor in model.state_dict().items()}, Path("weights"))
    return model, own


def objectives(**settings):
    """Both objectives over 90 rows, some of them of one group, and 12 windows."""
    rng = np.random.default_rng(0)
    vectors = F.normalize(torch.from_numpy(rng.standard_normal((90, 12)).astype(np.float32)), dim=-1)
    articles, groups, pool = np.arange(90) // 9, np.arange(90), np.arange(60)
    groups[[30, 71]] = 5
    options = TrainOptions(**settings)
    negatives = Negatives(options, *(torch.from_numpy(array) for array in (articles, groups, pool)))
    own = Objective(options, vectors.numpy(), articles, groups, pool)
    return TorchObjective(options, vectors, negatives), own, rng.integers(0, 84, 12)[:, None] + np.arange(6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"negatives": "payload:20"},
        {"negatives": "batch"},
        {"negatives": "batch", "false_negatives": "article"},
        {"false_negatives": "article", "temperature": 0.2, "infonce_weight": 0.4},
        {"objective": "infonce"},
        {"objective": "ar"},
    ],
)
@pytest.mark.parametrize("name", ["mamba-s", "amn"])
def test_loss_and_gradients_are_torchs(settings, name):
    model, own = both(name)
    theirs, objective, windows = objectives(**settings)
    batch = Batch(torch.from_numpy(windows))
    wanted = theirs(model(theirs.vectors[batch.context]), batch)
    wanted.total.backward()
    task = objective.task(windows)
    context = mx.array(objective.vectors[windows[:, :-1]])
    (loss, infonce, cosine), found = value_and_grad(own, lambda x: objective(own(x), task))(context)
    assert float(loss) == pytest.approx(wanted.total.item(), rel=1e-5)
    assert float(infonce) == pytest.approx(0.0 if wanted.infonce is None else wanted.infonce.item(), rel=1e-5)
    assert float(cosine) == pytest.approx(wanted.cosine.item(), rel=1e-5)
    assert task.negatives == pytest.approx(wanted.negatives)
    gradients = tree_flatten(found, destination={})
    learned = {key: weight.grad.numpy() for key, weight in model.named_parameters() if weight.requires_grad}
    assert set(gradients) == set(learned)
    for key, gradient in learned.items():
        bound = 1e-5 * max(1.0, np.abs(gradient).max())
        np.testing.assert_allclose(np.array(gradients[key]), gradient, rtol=0, atol=bound, err_msg=key)


def test_a_part_of_the_payload_is_another_one_in_every_step():
    _, objective, windows = objectives(negatives="payload:20")
    first, again, other = (objective.task(windows, np.random.default_rng(seed)).keys for seed in (1, 1, 2))
    assert first.shape == (12 + 20, 12) and mx.array_equal(first, again) and not mx.array_equal(first[12:], other[12:])


def test_numpy_holds_one_mask_of_the_candidates():
    """At 1,024 windows and all rows of a large payload it is 600 MB."""
    vectors = np.eye(4000, 8, dtype=np.float32)
    objective = Objective(TrainOptions(negatives="payload"), vectors, np.arange(4000), np.arange(4000), np.arange(4000))
    windows = np.arange(512)[:, None] + np.arange(6)
    tracemalloc.start()
    try:
        task = objective.task(windows)
        assert task.mask is not None and tracemalloc.get_traced_memory()[1] < 1.5 * task.mask.nbytes
    finally:
        tracemalloc.stop()


def test_steps_of_the_optimizer_are_torchs():
    """Decay of matrices alone, the head's own rate, clipping, and both moments, over three steps."""
    model, own = both("mamba-gr", hidden=8)
    options = TrainOptions(lr=0.02, head_lr=0.1, weight_decay=0.5, clip=0.7)
    learned = Learned(model, None, None, options)
    theirs, optimizer = torch.optim.AdamW(learned.groups(), lr=options.lr), Optimizer(own, options)
    for step in range(3):
        lr = options.lr / (step + 1)
        gradients = {key: torch.randn_like(weight) for key, weight in model.named_parameters()}
        for key, weight in model.named_parameters():
            weight.grad = gradients[key].clone()
        for group in theirs.param_groups:
            group["lr"] = lr * group["share"]
        nn.utils.clip_grad_norm_(list(learned.names), options.clip)
        theirs.step()
        optimizer(tree_unflatten([(key, mx.array(array.numpy())) for key, array in gradients.items()]), lr)
    for key, wanted in model.state_dict().items():
        np.testing.assert_allclose(twins.weights(own)[key], wanted.numpy(), rtol=1e-5, atol=1e-6, err_msg=key)


# The run.


def test_the_run_folder_is_as_torch_makes_it(whole, payload, windows, tmp_path):
    out, summary, _ = whole
    torch_train("mamba-s", payload, windows, tmp_path / "torch", **{**SETTINGS, "epochs": 1})
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "torch").iterdir()}
    history, theirs = (json.loads((run / "history.json").read_text()) for run in (out, tmp_path / "torch"))
    assert [list(entry) for entry in history[:2]] == [list(entry) for entry in theirs]
    for key, wanted in theirs[0].items():  # the untrained model is the same one
        if key not in MEASURED:
            assert history[0][key] == (wanted if wanted is None else pytest.approx(wanted, rel=1e-5)), key
    configs = [json.loads((run / "config.json").read_text()) for run in (out, tmp_path / "torch")]
    assert [config.pop("framework") for config in configs] == ["mlx", "torch"]
    assert configs[0].pop("training") == {**configs[1].pop("training"), "epochs": 3} and configs[0] == configs[1]
    assert history == summary.history and summary.stopped == "epochs"
    assert history[-1]["lr"] == pytest.approx(0.01 * TINY["lr"]) and history[-1]["negatives"] > 50


def test_progress_is_told_every_step_and_epoch(whole, windows):
    _, summary, calls = whole
    steps = -(-len(windows.rows("train")) // TINY["batch_size"])
    told = [(c["epoch"], c["step"]) for c in calls if c["entry"] is None]
    assert told == [(epoch, step) for epoch in (1, 2, 3) for step in range(1, steps + 1)]
    assert [c["entry"] for c in calls if c["entry"] is not None] == summary.history


def test_the_best_model_is_torchs_to_load(whole, payload, windows):
    out, summary, _ = whole
    model, config, space = load_run(out)
    rows = windows.rows("validation")
    contexts = space.apply(payload.take(rows[:, :-1]))
    predicted = predict_with(model)(contexts)
    np.testing.assert_allclose(np.array(twins.load(out)(mx.array(contexts))), predicted, rtol=0, atol=1e-5)
    pool = space.apply(payload.take(np.arange(len(payload))))
    ranks = exact_ranks(predicted, pool, rows[:, -1], rows[:, :-1], payload.groups)
    assert summary.best_r5 == pytest.approx(np.mean(ranks <= 5)) == summary.history[summary.best_epoch]["val_r@5"]
    assert config["framework"] == "mlx" and summary.parameters == sum(w.numel() for w in model.parameters())


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "name, settings",
    [
        ("mamba-s", {}),
        ("mamba-s", {"negatives": "batch"}),
        ("mamba-h", {"negatives": "payload:64"}),
        ("mamba-sandwich", {"objective": "infonce"}),
        ("mamba-gr", {"false_negatives": "article"}),
        ("mamba-xl", {"space": "none", "reverse": True}),
        ("amn", {"objective": "ar"}),
    ],
)
def test_the_loss_falls_and_the_training_windows_are_learned_by_heart(payload, windows, tmp_path, name, settings):
    small = {"n_layers": 2, "heads": 2, "hidden": 16, "d_ff": 32, "d_state": 4, "expand": 2, "d_model": 32}
    quiet = {"dropout": 0.0, "epochs": 12, "lr": 1e-2, "head_lr": 0.3, "weight_decay": 0.0}
    summary = go(payload, windows, tmp_path / "run", name, **{**small, **quiet, **settings})
    losses = [entry["train_loss"] for entry in summary.history[1:]]
    assert losses[-1] < (0.9 if settings.get("objective") == "ar" else 0.8) * losses[0]
    if settings.get("objective") == "ar":
        assert summary.history[-1]["train_ar_cosine"] < summary.history[1]["train_ar_cosine"]
        return
    space = fastlvm.Space.load(tmp_path / "run" / "space.safetensors")
    pool, rows = space.apply(payload.take(np.arange(len(payload)))), windows.rows("train")
    rows = rows[:, ::-1] if settings.get("reverse") else rows
    trained, meta = weight_file.load(tmp_path / "run" / "last.safetensors")
    model = twins.create(fastlvm.models.ModelConfig.from_dict(meta["config"]["model"])).eval()
    found = []
    for weights in (None, weight_file.pick(trained, "model")):
        if weights is not None:
            twins.load_weights(model, weights, tmp_path)
        predicted = np.array(model(mx.array(pool[rows[:, :-1]])))
        found.append(np.mean(exact_ranks(predicted, pool, rows[:, -1], rows[:, :-1], payload.groups) <= 5))
    assert found[1] > found[0] + 0.1


@pytest.mark.usefixtures("undrawn")
def test_the_seed_decides_everything_and_the_callers_generator_is_left(whole, payload, windows, tmp_path, capfd):
    out, _, _ = whole
    mx.random.seed(1)
    expected = mx.random.uniform(shape=(3,)).tolist()
    mx.random.seed(1)
    go(payload, windows, tmp_path / "again")
    assert mx.random.uniform(shape=(3,)).tolist() == expected and capfd.readouterr() == ("", "")
    go(payload, windows, tmp_path / "other", seed=4)
    assert content(tmp_path / "again") == content(out)
    assert content(tmp_path / "other")[0] != content(out)[0]


@pytest.mark.usefixtures("undrawn")
def test_dropout_is_another_one_in_every_step(payload, windows, tmp_path, monkeypatch):
    """With a rate of almost 0 the weights stay, and the same windows have another loss in every epoch."""
    monkeypatch.setattr(Trainer, "_order", lambda self, epoch: np.arange(len(self.rows)))
    one = {"batch_size": 1000, "lr": 1e-12, "dropout": 0.5, "residual": False}
    losses = [entry["train_loss"] for entry in go(payload, windows, tmp_path / "run", **one).history[1:]]
    assert len({round(loss, 6) for loss in losses}) == 3
    losses = [entry["train_loss"] for entry in go(payload, windows, tmp_path / "no", **{**one, "dropout": 0}).history]
    assert max(losses[1:]) - min(losses[1:]) < 1e-5


# Stopping and going on.


def at(epoch, step, act):
    def progress(**event):
        if (event["epoch"], event["step"]) == (epoch, step) and event["entry"] is None:
            act()

    return progress


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise RuntimeError("power is out")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("epoch, step", [(1, 1), (2, 2), (2, None), (3, 1)])
def test_ctrl_c_saves_at_the_step_and_resumes_bit_for_bit(payload, windows, tmp_path, whole, epoch, step):
    steps = -(-len(windows.rows("train")) // TINY["batch_size"])
    step = step or steps
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        go(payload, windows, out, progress=at(epoch, step, interrupt))
    _, meta = weight_file.load(out / "last.safetensors")
    assert meta["state"]["step"] == (epoch - 1) * steps + step
    mx.random.uniform(shape=(7,))  # whatever happens in between
    go(payload, windows, out, resume=True)
    assert content(out) == content(whole[0])


@pytest.mark.usefixtures("undrawn")
def test_a_crash_goes_on_from_the_epoch_before(payload, windows, tmp_path, whole):
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power"):
        go(payload, windows, out, progress=at(2, 2, crash))
    _, meta = weight_file.load(out / "last.safetensors")
    assert meta["state"]["epoch"] == 1
    go(payload, windows, out, resume=True)
    assert content(out) == content(whole[0])
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("undrawn")
def test_every_layout_resumes_bit_for_bit(payload, windows, tmp_path):
    """The optimizer's state of blocks of every kind, some without weights of a kind, and of weights that stay."""
    layout = {"layout": "attention mamba+gate mlp mamba2 gru lstm", "n_layers": 6, "head_dim": 8, "hidden": 8}
    for name, settings in (("mamba-s", layout), ("mixture", {}), ("amn", {"hidden": 8, "d_ff": 8})):
        go(payload, windows, tmp_path / name, name, **{**settings, "epochs": 2})
        with pytest.raises(KeyboardInterrupt):
            again = {**settings, "epochs": 2, "progress": at(1, 3, interrupt)}
            go(payload, windows, tmp_path / f"{name}-cut", name, **again)
        go(payload, windows, tmp_path / f"{name}-cut", name, resume=True, **{**settings, "epochs": 2})
        assert content(tmp_path / f"{name}-cut") == content(tmp_path / name)


@pytest.mark.usefixtures("undrawn")
def test_resuming_a_finished_run_changes_nothing(payload, windows, tmp_path, whole):
    out = tmp_path / "run"
    first = go(payload, windows, out)
    assert go(payload, windows, out, resume=True, progress=at(1, 1, crash)) == first
    assert content(out) == content(whole[0])


# What is refused.


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch": 8},
        {"projection": "mlp"},
        {"tower": 4},
        {"negatives": "batch", "queue": 4},
        {"negatives": "batch", "hard_negatives": "same-article:2"},
        {"context_dropout": 0.1},
        {"span_corruption": 0.1},
        {"precision": "bf16"},
        {"compile": True},
        {"deterministic": True},
        {"ema": 0.9},
    ],
)
def test_settings_of_torch_alone_are_refused(payload, windows, tmp_path, settings):
    name, value = list(settings.items())[-1]
    with pytest.raises(InputError, match=f"^{name} is {value!r}, and mlx trains with .* alone: leave it out or use"):
        go(payload, windows, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_every_training_option_is_either_torchs_or_tried_here():
    tried = {"objective", "space", "negatives", "false_negatives", "reverse", "temperature", "infonce_weight"}
    tried |= {"epochs", "batch_size", "lr", "head_lr", "weight_decay", "clip", "seed", "warmup_steps"}
    shared = {"patience", "gates", "validation_limit"}  # the loop's and the run folder's
    assert set(TORCHS) | tried | shared == set(TrainOptions.__dataclass_fields__)


def test_several_processes_are_refused(payload, windows, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start it without torchrun"):
        go(payload, windows, tmp_path / "run")


def test_a_loss_that_is_no_number_ends_the_run(payload, windows, tmp_path):
    with pytest.raises(InputError, match="train with a smaller lr than 1e"):
        go(payload, windows, tmp_path / "run", lr=1e30, head_lr=1.0, clip=1e30)


def test_wrong_settings_folders_windows_and_models_write_nothing(payload, windows, tmp_path, monkeypatch):
    out = tmp_path / "run"
    for settings, message in (
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"vector_dim": 9}, "vector_dim is 9"),
        ({"epochs": 0}, "epochs"),
        ({"n_layers": 60_000, "d_model": 8192}, "GiB of memory"),
    ):
        with pytest.raises(InputError, match=message):
            go(payload, windows, out, **settings)
    with pytest.raises(InputError, match="'mamba-q' is not known"):
        go(payload, windows, out, "mamba-q")
    with pytest.raises(InputError, match="validation split"):
        go(payload, Windows.build(payload, split=(0.8, 0.0, 0.2)), out)
    other = build_payload(tmp_path / "other", seed=1)
    with pytest.raises(IntegrityError, match=other.id):
        go(payload, Windows.build(other), out)
    assert not out.exists()


def test_a_run_goes_on_with_its_settings_and_its_framework(whole, payload, windows, tmp_path):
    out, _, _ = whole
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match="already holds something"):
        go(payload, windows, out)
    with pytest.raises(InputError, match=r"lr 0\.003, not 0\.0001"):
        go(payload, windows, out, resume=True, lr=1e-4)
    with pytest.raises(InputError, match="framework 'mlx', not 'torch'"):
        torch_train("mamba-s", payload, windows, out, resume=True, **SETTINGS)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    theirs = tmp_path / "torch"
    torch_train("mamba-s", payload, windows, theirs, **{**SETTINGS, "epochs": 1})
    config = json.loads((theirs / "config.json").read_text())
    for older in (False, True):  # which did not write what trained it
        if older:
            config.pop("framework")
            (theirs / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="framework 'torch', not 'mlx'"):
            go(payload, windows, theirs, resume=True, epochs=1)


@pytest.mark.usefixtures("undrawn")
def test_a_torch_run_of_an_older_version_goes_on(payload, windows, tmp_path):
    """It has no framework in its config.json, nor in its checkpoint."""
    settings = {**SETTINGS, "epochs": 2}
    with pytest.raises(KeyboardInterrupt):
        torch_train("mamba-s", payload, windows, tmp_path / "run", progress=at(1, 1, interrupt), **settings)
    config = json.loads((tmp_path / "run/config.json").read_text())
    config.pop("framework")
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    tensors, meta = weight_file.load(tmp_path / "run/last.safetensors")
    meta["config"].pop("framework")
    weight_file.save(tmp_path / "run/last.safetensors", tensors, meta)
    torch_train("mamba-s", payload, windows, tmp_path / "run", resume=True, **settings)
    torch_train("mamba-s", payload, windows, tmp_path / "whole", **settings)
    assert (tmp_path / "run/best.safetensors").read_bytes() == (tmp_path / "whole/best.safetensors").read_bytes()


def test_damaged_files_are_refused(payload, windows, tmp_path):
    out = tmp_path / "run"
    go(payload, windows, out, epochs=1)
    tensors, meta = weight_file.load(out / "last.safetensors")
    name = next(name for name in tensors if name.startswith("optimizer.") and name.endswith(".m"))
    weight_file.save(out / "last.safetensors", {key: a for key, a in tensors.items() if key != name}, meta)
    with pytest.raises(IntegrityError, match="optimizer's state"):
        go(payload, windows, out, epochs=1, resume=True)
    file = (out / "last.safetensors").read_bytes()
    (out / "last.safetensors").write_bytes(file[: len(file) // 2])
    with pytest.raises(IntegrityError, match=r"last\.safetensors"):
        go(payload, windows, out, epochs=1, resume=True)


# The command.

COMMAND = ("--framework", "mlx", "--epochs", "1", "--batch", "16")
SMALL = ("--set", "d_model=16", "--set", "n_layers=1", "--set", "d_state=4")


def command(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def ok(*args):
    result = command(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def saved(windows, tmp_path_factory):
    path = tmp_path_factory.mktemp("windows") / "windows.npz"
    windows.save(path)
    return path


def test_everything_after_training_takes_the_run(payload, saved, tmp_path):
    given = ("--payload", payload.path, "--windows", saved)
    run, index, artifact = (tmp_path / name for name in ("run", "index", "artifact"))
    assert "weights" in ok("train", *given, "--out", run, *COMMAND, *SMALL)
    ok("index", "build", payload.path, "--space", run, "--out", index)
    ok("export", run, "--index", index, "--out", artifact)
    assert "run" in ok("eval", run, *given, "--out", tmp_path / "report")
    predictor = fastlvm.Predictor.load(artifact)
    contexts = payload.take(Windows.open(saved).rows("test")[:, :-1])
    space = fastlvm.Space.load(run / "space.safetensors")
    wanted = np.array(twins.load(run)(mx.array(space.apply(contexts))))
    np.testing.assert_allclose(predictor.predict(contexts), wanted, rtol=0, atol=1e-5)
    assert "--resume" in command("train", *given, "--out", run, *COMMAND, *SMALL).stderr
    ok("train", *given, "--out", run, *COMMAND, *SMALL, "--resume")


@pytest.mark.parametrize(
    "args, message",
    [
        (("--framework", "jax"), "--framework: got 'jax', wants one of torch, mlx"),
        (("--framework", "mlx", "--precision", "bf16"), "precision is 'bf16', and mlx trains with 'fp32' alone"),
        (("--framework", "mlx", "--set", "tower=4"), "tower is 4, and mlx trains with 0 alone"),
        (("--framework", "mlx", "--set", "framework=mlx"), "framework has an option of its own"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(payload, saved, tmp_path, args, message):
    result = command("train", "--payload", payload.path, "--windows", saved, "--out", tmp_path / "run", *args)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and message in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_torchs_and_says_so(payload, saved, tmp_path):
    given = ("--payload", payload.path, "--windows", saved, "--out", tmp_path / "sweep", "--set", "framework=mlx")
    result = command("sweep", *given)
    assert result.exit_code == 2 and "'framework' is no field of a model" in result.stderr
    assert not (tmp_path / "sweep").exists()


def without(module, *args):
    """The command in a process that has no such module."""
    code = f"import sys; sys.modules[{module!r}] = None; from fastlvm.cli import main; main()"
    words = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_needs_no_torch_but_mlx(payload, saved, tmp_path):
    args = ("train", "--payload", payload.path, "--windows", saved, "--out", tmp_path / "run", *COMMAND, *SMALL)
    result = without("mlx", *args)
    assert (result.returncode, result.stderr) == (2, "fastlvm: this needs mlx: pip install 'fastlvm[mlx]'\n")
    assert not (tmp_path / "run").exists()
    result = without("torch", *args)
    assert result.returncode == 0, result.stderr
    assert load_run(tmp_path / "run")[1]["framework"] == "mlx"
