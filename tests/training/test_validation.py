"""R@5 over all rows and over those of unseen articles alone, against a plain sort."""

from __future__ import annotations

import numpy as np

from fastlvm.training.validation import Validation


def test_figures_are_those_of_a_plain_sort():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((90, 8)).astype(np.float32)
    vectors[[40, 71]] = vectors[5]  # a group of a trained row and of two that are not
    groups = np.arange(90)
    groups[[40, 71]] = 5
    trained = np.arange(90) < 30
    rows = np.arange(30, 80)[:, None] + np.arange(4)
    predicted = rng.standard_normal((50, 8)).astype(np.float32)
    found = Validation(groups, rows, trained).figures(predicted, vectors)
    for name, there in (("val_r@5", np.ones(90, bool)), ("val_r@5_unseen", ~trained)):
        hits = []
        for query, window in zip(predicted, rows, strict=True):
            votes = {}
            for row in np.flatnonzero(there & ~np.isin(groups, groups[window[:-1]])):
                votes.setdefault(groups[row], query @ vectors[row])
            best = sorted(votes, key=votes.get)[-5:]
            hits.append(groups[window[-1]] in best)
        assert found[name] == np.mean(hits), name


def test_pushing_trained_rows_down_lifts_one_figure_alone():
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((400, 16)).astype(np.float32)
    trained = np.arange(400) < 300
    rows = np.arange(300, 390)[:, None] + np.arange(6)
    predicted = vectors[rows[:, -1]] + 2.5 * rng.standard_normal((90, 16)).astype(np.float32)
    validation = Validation(np.arange(400), rows, trained)
    plain = validation.figures(predicted, vectors)
    pushed = np.where(trained[:, None], 0.1 * vectors, vectors)
    after = validation.figures(predicted, pushed)
    assert after["val_r@5"] > plain["val_r@5"] and after["val_r@5_unseen"] == plain["val_r@5_unseen"]
