"""The bench of training steps, at a small size: every contender takes steps of the trainer and has a row."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import fastlvm
import training_steps


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(training_steps, "DIM", 32)
    monkeypatch.setattr(training_steps, "SIZES", {"tiny": {"d_model": 16, "n_layers": 1, "d_state": 4}})
    threads, ours = torch.get_num_threads(), fastlvm.get_num_threads()
    yield
    torch.set_num_threads(threads)
    fastlvm.set_num_threads(ours)


def test_every_contender_has_a_row(monkeypatch, tmp_path, capsys):
    out = tmp_path / "steps.json"
    argv = ["training_steps.py", "--batch", "8", "--rounds", "1", "--threads", "1", "--size", "tiny", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    training_steps.main()
    (rows,) = json.loads(out.read_text(encoding="utf-8"))["tables"].values()
    assert [row["name"] for row in rows] == [
        training_steps.OURS,
        training_steps.BF16,
        training_steps.FREE,
        training_steps.REFERENCE,
    ]
    assert all(row["windows_per_s"] > 0 for row in rows) and training_steps.REFERENCE in capsys.readouterr().out


def test_a_step_moves_every_weight():
    one = training_steps.Training(training_steps.OURS, {"d_model": 16, "n_layers": 1, "d_state": 4}, 8)
    one.step()  # the head starts at zero and lets no gradient through yet
    before = [parameter.detach().clone() for parameter in one.parameters]
    one.step()
    assert all(not torch.equal(was, now) for was, now in zip(before, one.parameters, strict=True))
