"""The demo, on a small payload in place of the sample one."""

from __future__ import annotations

import shutil

import pytest

from cli.conftest import fastlvm, listing, refused
from fastlvm import Index, Payload, demo, training


@pytest.fixture
def small(made, monkeypatch, tmp_path):
    """A demo of a second: small payload, small models, one epoch."""
    payload = Payload.open(made.payload)
    monkeypatch.setattr(Payload, "sample", lambda: payload)
    quick = {"d_model": 32, "n_layers": 1, "d_state": 4, "d_ff": 16, "epochs": 1, "batch_size": 16}
    monkeypatch.setattr(demo, "MODELS", {model: {**given, **quick} for model, given in demo.MODELS.items()})
    return tmp_path / "demo"


def test_demo(small):
    result = fastlvm("demo", "--out", small)
    assert result.code == 0, result
    wanted = ("mlp: ", "mamba-s: ", "validation R@5", "whitened mixture", "latency, batch 1", "last chunk read: chunk ")
    for words in (*wanted, "retrieved 1"):
        assert words in result.out, words
    for name in ("windows.npz", "runs", "index", "artifact", "report.json", "report.png"):
        assert (small / name).exists() and str(small / name) in result.out
    assert "articles in two splits: 0" in result.err and "epoch   1" in result.err

    runs = [small / "runs" / model / "best.safetensors" for model in demo.MODELS]
    weights = [run.read_bytes() for run in runs]
    again = fastlvm("demo", "--out", small)  # nothing is trained again
    assert again.code == 0 and "epoch" not in again.err
    assert [run.read_bytes() for run in runs] == weights


@pytest.mark.parametrize("name", ["windows.npz", "index", "artifact"])
def test_a_demo_removes_nothing_that_is_not_its_own(name, small, made, other_payload):
    small.mkdir()
    if name == "windows.npz":
        (small / name).write_text("mine")
    elif name == "index":
        Index.build(other_payload).save(small / name)
    else:
        shutil.copytree(made.run, small / name)
    before = listing(small)
    assert f"{small / name} is not the demo's own" in refused("demo", "--out", small)
    assert listing(small) == before


def test_an_interrupted_demo_says_how_to_go_on(small, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", stopped)
    result = fastlvm("demo", "--out", small)
    assert result.code == 130
    assert result.err.splitlines()[-1] == f"fastlvm: interrupted; the same command goes on from what {small} holds"
