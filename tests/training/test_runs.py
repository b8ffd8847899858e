"""What a run is made of: its vectors on disk or not, what is nearest to its predictions, and the order it reads in."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from fastlvm.data import Space
from fastlvm.training import runs, train
from fastlvm.training.step import Step

from .conftest import TINY


def test_a_large_payload_lies_in_a_file_that_nobody_sees(payload, tmp_path, monkeypatch):
    space = Space.fit(payload.take(np.arange(100)))
    wanted = space.apply(payload.take(np.arange(len(payload))))
    monkeypatch.setattr(runs, "_BLOCK", 50)
    for most in (1 << 28, 0):
        monkeypatch.setattr(runs, "_IN_MEMORY", most)
        found = runs.vectors(payload, space, tmp_path)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        assert not list(tmp_path.iterdir())


def test_the_nearest_rows_are_those_of_a_sort_without_the_windows_own(monkeypatch):
    monkeypatch.setattr(runs, "_BLOCK", 7)
    rng = np.random.default_rng(0)
    pool, predicted = rng.standard_normal((40, 6), np.float32), rng.standard_normal((20, 6), np.float32)
    windows = rng.permuted(np.tile(np.arange(40), (20, 1)), axis=1)[:, :4]
    scores = predicted @ pool.T
    np.put_along_axis(scores, windows, -np.inf, axis=1)
    np.testing.assert_array_equal(runs.nearest(predicted, pool, windows, 5), np.argsort(-scores, axis=1)[:, :5])
    every = runs.nearest(predicted, pool, windows, 40)
    assert ((every < 0).sum(axis=1) == 4).all() and (every[:, :36] >= 0).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_articles_are_read_backwards_only_where_that_is_asked_for(payload, windows, tmp_path, monkeypatch, reverse):
    seen, kept = [], Step.__call__

    def spied(self, context, batch, *args):
        seen.append((batch.rows.clone(), torch.are_deterministic_algorithms_enabled()))
        return kept(self, context, batch, *args)

    monkeypatch.setattr(Step, "__call__", spied)
    train("gru", payload, windows, tmp_path / "run", **{**TINY, "epochs": 1}, reverse=reverse, deterministic=reverse)
    rows = torch.cat([each for each, _ in seen])
    assert (rows.diff(dim=1) == (-1 if reverse else 1)).all()
    assert all(flag == reverse for _, flag in seen) and not torch.are_deterministic_algorithms_enabled()


def test_every_figure_of_an_epoch_goes_to_tensorboard(payload, windows, tmp_path, monkeypatch):
    written, closed = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            closed.append(True)

    there = types.ModuleType("torch.utils.tensorboard")
    there.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", there)
    summary = train("mamba-s", payload, windows, tmp_path / "run", **{**TINY, "epochs": 2})
    wanted = [
        (name, value, entry["epoch"])
        for entry in summary.history
        for name, value in entry.items()
        if name != "epoch" and value is not None
    ]
    assert written == [(str(tmp_path / "run" / "tensorboard"), 0), *wanted] and closed == [True]
