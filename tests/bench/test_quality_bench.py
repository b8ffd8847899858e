"""The command behind the quality tables, on twenty small articles: trains, judges, prints, and adds to what is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import fastlvm
import quality


@pytest.fixture
def toy(payload_factory, monkeypatch, tmp_path):
    payload = payload_factory(articles=20)
    windows = fastlvm.Windows.build(payload, split=quality.SPLIT, seed=0)
    monkeypatch.setattr(quality, "corpus", lambda name: (payload, windows))
    monkeypatch.setattr(quality, "OPTIONS", {"epochs": 1, "batch_size": 64})
    monkeypatch.setattr(quality, "BUILD", tmp_path / "runs")
    monkeypatch.setattr(quality, "RESULTS", tmp_path)


def test_a_run_is_judged_beside_the_baselines_and_kept(toy, tmp_path, monkeypatch, capsys):
    def command(*models):
        given = [x for model in models for x in ("--model", model)]
        monkeypatch.setattr(sys, "argv", ["quality.py", "--corpus", "toy", "--objective", "ar", *given, "--keep"])
        quality.main()
        return json.loads((tmp_path / "quality-toy.json").read_text(encoding="utf-8"))

    assert list(command("mixture")["runs"]) == ["mixture, ar"]
    table = (tmp_path / "quality-toy.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out and "mixture, ar" in table and "*whitened mixture*" in table
    assert set(command("mlp")["runs"]) == {"mixture, ar", "mlp, ar"}
