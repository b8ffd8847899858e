from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlvm.data import Space, Windows
from fastlvm.errors import InputError, IntegrityError
from fastlvm.models import weight_file
from fastlvm.training import checkpoint, load_run, train

from .conftest import TINY, build_payload

SETTINGS = {**TINY, "projection": "mlp", "ema": 0.9}


def go(payload, windows, out, **settings):
    return train("mamba-s", payload, windows, out, **{**SETTINGS, **settings})


def content(run: Path):
    """Everything a run leaves, without the times."""
    tensors, meta = checkpoint.load(run / "last.safetensors")
    history = json.loads((run / "history.json").read_text())
    for entry in (*history, *meta["state"]["history"]):
        for measured in ("time", "windows_per_s", "loading"):
            entry.pop(measured)
    bits = {
        name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items() if tensor.ndim
    }
    scalars = {name: float(tensor) for name, tensor in tensors.items() if not tensor.ndim}
    return bits, scalars, meta, history, (run / "best.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(payload, windows, tmp_path_factory):
    """The run nobody interrupts."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    go(payload, windows, out)
    return content(out)


def at(epoch, step, act):
    def progress(**event):
        if (event["epoch"], event["step"]) == (epoch, step) and event["entry"] is None:
            act()

    return progress


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("epoch, step", [(1, 1), (2, 2), (2, None), (3, 1)])
def test_ctrl_c_saves_at_the_step_and_resumes_bit_for_bit(payload, windows, tmp_path, whole, epoch, step):
    steps = -(-len(windows.rows("train")) // TINY["batch_size"])
    step = step or steps
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        go(payload, windows, out, progress=at(epoch, step, interrupt))
    assert signal.getsignal(signal.SIGINT) is before
    _, meta = checkpoint.load(out / "last.safetensors")
    assert meta["state"]["step"] == (epoch - 1) * steps + step
    torch.rand(7)  # whatever happens in between
    go(payload, windows, out, resume=True)
    assert content(out) == whole


def test_interrupted_again_and_again(payload, windows, tmp_path, whole):
    out = tmp_path / "run"
    for epoch, step in ((1, 1), (1, 2), (2, 3), (3, 2)):
        with pytest.raises(KeyboardInterrupt):
            go(payload, windows, out, resume=True, progress=at(epoch, step, interrupt))
    go(payload, windows, out, resume=True)
    assert content(out) == whole


def test_a_second_ctrl_c_while_saving_does_not_spoil_it(payload, windows, tmp_path, whole, monkeypatch):
    out = tmp_path / "run"
    written = weight_file.save_file
    armed = []

    def first():
        armed.append(True)
        interrupt()

    def impatient(*args, **kwargs):
        if armed:
            interrupt()
            interrupt()
        written(*args, **kwargs)

    monkeypatch.setattr(weight_file, "save_file", impatient)
    with pytest.raises(KeyboardInterrupt):
        go(payload, windows, out, progress=at(2, 1, first))
    monkeypatch.setattr(weight_file, "save_file", written)
    _, meta = checkpoint.load(out / "last.safetensors")
    assert meta["state"]["step"] == -(-len(windows.rows("train")) // TINY["batch_size"]) + 1
    go(payload, windows, out, resume=True)
    assert content(out) == whole


def test_a_second_ctrl_c_before_the_save_leaves_at_once(payload, windows, tmp_path, whole):
    out = tmp_path / "run"

    def twice():
        interrupt()
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        go(payload, windows, out, progress=at(2, 1, twice))
    _, meta = checkpoint.load(out / "last.safetensors")
    assert meta["state"]["epoch"] == 1
    go(payload, windows, out, resume=True)
    assert content(out) == whole


KILLED = """
import json, os, signal, sys
import torch
from fastlvm.data import Payload, Windows
from fastlvm.models import weight_file
from fastlvm.training import train

torch.set_num_threads(1)
payload = Payload.open(sys.argv[1])
windows = Windows.build(payload, split=(0.6, 0.2, 0.2), seed=0)
save = weight_file.save_file

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def run(out, where):
    def half(tensors, path, metadata):
        save(tensors, path, metadata)
        if where in os.path.basename(path) and os.path.exists(f"{out}/history.json"):
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)
            die()

    if where != "step":
        weight_file.save_file = half
    progress = lambda **e: die() if where == "step" and (e["epoch"], e["step"]) == (2, 2) else None
    train("mamba-s", payload, windows, out, progress=progress, **json.loads(sys.argv[3]))

for where in ("step", "last.", "best."):
    child = os.fork()
    if not child:
        run(f"{sys.argv[2]}/{where}", where)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_kill_resumes_bit_for_bit(payload, windows, tmp_path, whole):
    """SIGKILL in a step, and with half of either checkpoint file written."""
    command = [sys.executable, "-c", KILLED, str(payload.path), str(tmp_path), json.dumps(SETTINGS)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout.split() == ["-9"] * 3, ended.stderr
    for where in ("step", "last.", "best."):
        out = tmp_path / where
        if where == "best.":  # killed in epoch 0, before there was any
            assert not (out / "best.safetensors").exists()
        else:
            load_run(out)
        go(payload, windows, out, resume=True)
        assert content(out) == whole
        assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_resuming_a_finished_run_changes_nothing(payload, windows, tmp_path, whole):
    out = tmp_path / "run"
    first = go(payload, windows, out)
    again = go(payload, windows, out, resume=True, progress=at(1, 1, pytest.fail))
    assert again == first and content(out) == whole


def test_resume_starts_an_empty_or_missing_folder(payload, windows, tmp_path, whole):
    (tmp_path / "run").mkdir()
    go(payload, windows, tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == whole


@pytest.fixture(scope="module")
def started(payload, windows, tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("started") / "run"
    with pytest.raises(KeyboardInterrupt):
        go(payload, windows, out, progress=at(1, 1, interrupt))
    return out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": 1e-4}, "lr 0.003, not 0.0001"),
        ({"epochs": 4}, "epochs 3, not 4"),
        ({"seed": 5}, "seed 3, not 5"),
        ({"d_state": 8}, "d_state 4, not 8"),
        ({"objective": "ar"}, "objective 'contrastive', not 'ar'"),
        ({"decay": 0.35}, "decay"),
        ({"space": "none"}, "space 'whiten', not 'none'"),
    ],
)
def test_resume_with_other_settings_is_refused(payload, windows, started, change, message):
    before = {path.name: path.read_bytes() for path in started.iterdir()}
    with pytest.raises(InputError, match=message):
        go(payload, windows, started, resume=True, **change)
    assert {path.name: path.read_bytes() for path in started.iterdir()} == before


def test_resume_with_other_windows_or_payload_is_refused(payload, started, tmp_path):
    with pytest.raises(InputError, match="windows_id"):
        go(payload, Windows.build(payload, split=(0.6, 0.2, 0.2), seed=1), started, resume=True)
    other = build_payload(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="payload_id"):
        go(other, Windows.build(other, split=(0.6, 0.2, 0.2), seed=0), started, resume=True)


def test_resume_in_a_folder_that_is_no_run_is_refused(payload, windows, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"config\.json"):
        go(payload, windows, tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_damaged_files_are_refused(payload, windows, tmp_path):
    out = tmp_path / "run"
    go(payload, windows, out, epochs=1)
    for name in ("last.safetensors", "best.safetensors"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(IntegrityError, match=name):
            load_run(out) if name.startswith("best") else go(payload, windows, out, epochs=1, resume=True)
        (out / name).write_bytes(whole)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "space_id": "0" * 16}))
    with pytest.raises(IntegrityError, match="space"):
        load_run(out)
    (out / "config.json").write_text(json.dumps(config))
    Space.identity(payload.dim).save(out / "space.safetensors")
    with pytest.raises(IntegrityError, match=r"space\.safetensors has id"):
        load_run(out)
    with pytest.raises(InputError, match="is no run folder"):
        load_run(tmp_path / "nothing")


def test_a_checkpoint_is_written_in_place_not_under_another_name(tmp_path):
    """A file written elsewhere and moved has another inode, and a kill in between would leave it behind."""
    path = tmp_path / "file"
    path.touch()
    before = path.stat().st_ino
    weight_file.save_file({"w": np.zeros(2)}, path, {"key": "value"})
    assert path.stat().st_size and path.stat().st_ino == before
