"""Two processes have the loss, the gradients and the run of one process with the same batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlvm.training import checkpoint, load_run
from fastlvm.training.ranks import Ranks

from .conftest import TINY

SETTINGS = {**TINY, "model": "mamba-s", "dropout": 0.0, "negatives": "batch", "epochs": 2, "batch_size": 24}
CASES = {
    "batch negatives": {},
    "projection, queue, hard negatives": {"projection": "mlp", "queue": 16, "hard_negatives": "same-article:2"},
    "payload negatives, in parts": {"negatives": "payload", "micro_batch": 5},
    "some of the payload": {"negatives": "payload:20"},
    "two towers": {"tower": 8},
    "autoregressive": {"objective": "ar", "ema": 0.9},
}


@pytest.fixture(scope="module")
def folder(payload, windows, tmp_path_factory):
    path = tmp_path_factory.mktemp("shared")
    (path / "payload").symlink_to(payload.path)
    windows.save(path / "windows.npz")
    return path


def started(folder, out, size, **settings):
    child = [
        str(Path(__file__).with_name("ranks_child.py")),
        str(folder),
        str(out),
        json.dumps({**SETTINGS, **settings}),
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"] if size > 1 else []
    return subprocess.run([sys.executable, *launcher, *child], capture_output=True, text=True, timeout=240, check=False)


def gradients(out, rank=0):
    return torch.load(f"{out}.gradients.{rank}", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, folder, tmp_path):
    for size in (1, 2):
        done = started(folder, tmp_path / str(size), size, **CASES[case])
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = tmp_path / "1", tmp_path / "2"
    wanted = gradients(one)
    for rank in range(2):
        found = gradients(two, rank)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=f"{name}, process {rank}")
    histories = [json.loads((out / "history.json").read_text()) for out in (one, two)]
    for alone, shared in zip(*histories, strict=True):
        for name in ("train_loss", "train_infonce", "train_ar_cosine", "negatives", "val_loss", "val_r@5"):
            assert shared[name] == (None if alone[name] is None else pytest.approx(alone[name], rel=1e-4)), name
    models = [load_run(out)[0].state_dict() for out in (one, two)]
    for name, weight in models[0].items():
        torch.testing.assert_close(models[1][name], weight, atol=1e-4, rtol=1e-3)


def test_a_run_of_two_goes_on_as_two_and_not_as_one(folder, tmp_path):
    out = tmp_path / "run"
    settings = {"dropout": 0.3}
    assert started(folder, out, 2, **settings).returncode == 0
    whole, _ = checkpoint.load(out / "last.safetensors")
    assert {"dropout.0", "dropout.1"} <= whole.keys() and not torch.equal(whole["dropout.0"], whole["dropout.1"])
    done = started(folder, out, 1, resume=True, **settings)
    assert done.returncode and "is of 2 processes, and these are 1: start as many" in done.stderr


@pytest.mark.parametrize(("count", "size"), [(7, 2), (8, 3), (1, 2), (2, 4)])
def test_shares_cover_a_batch_and_weigh_as_much_as_they_hold(count, size):
    ranks = [Ranks(rank, size) for rank in range(size)]
    held = [own.tolist() for one in ranks if one.weight(count) for own in [one.share(count)]]
    assert sorted(window for own in held for window in own) == list(range(count))
    values = torch.arange(float(count)) ** 2
    mean = sum(one.weight(count) * float(values[one.share(count)].mean()) for one in ranks) / size
    assert mean == pytest.approx(float(values.mean()))
