"""The two-tower form: a tower that the payload goes through is learned, and becomes a part of the run's space."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fastlvm
from fastlvm.data import Space
from fastlvm.errors import InputError, IntegrityError
from fastlvm.evaluation.ranks import exact_ranks
from fastlvm.models import names
from fastlvm.models.tower import Tower, arrays
from fastlvm.retrieval import Index
from fastlvm.training import checkpoint, load_run, train
from fastlvm.training.negatives import Batch, Negatives
from fastlvm.training.objective import Objective
from fastlvm.training.options import TrainOptions
from fastlvm.training.validation import Validation

from .conftest import TINY
from .test_resume import at, content, interrupt

SETTINGS = {**TINY, "tower": 8, "lr": 3e-2, "head_lr": 1.0, "residual": False}  # which betters the untrained model


def go(payload, windows, out, model="mamba-s", **settings):
    return train(model, payload, windows, out, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def run(payload, windows, tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("towers") / "run"
    go(payload, windows, out)
    return out


def test_an_untrained_tower_leaves_vectors_as_they_are_and_the_space_computes_a_trained_one():
    torch.manual_seed(0)
    tower = Tower(12, 5, 0.3).eval()
    w = F.normalize(torch.randn(40, 12), dim=-1)
    torch.testing.assert_close(tower(w), w)
    torch.nn.init.normal_(tower.down.weight)
    torch.nn.init.normal_(tower.down.bias)
    assert (tower(w) - w).abs().max() > 0.1
    space = Space.identity(12).with_tower(arrays(tower.state_dict()))
    np.testing.assert_allclose(space.apply(w.numpy()), tower(w).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("negatives", ("payload", "batch"))
def test_the_loss_is_taken_on_keys_behind_the_tower(negatives):
    torch.manual_seed(0)
    tower = Tower(16, 6, 0.0)
    torch.nn.init.normal_(tower.down.weight)
    vectors, groups = F.normalize(torch.randn(24, 16), dim=-1), torch.arange(24)
    options = TrainOptions(negatives=negatives, tower=6, temperature=0.1)
    objective = Objective(options, vectors, Negatives(options, groups // 6, groups, torch.arange(18)), tower)
    batch = Batch(torch.tensor([[0, 1, 2], [8, 9, 10]]))
    y = F.normalize(torch.randn(2, 16), dim=-1)
    loss = objective(y, batch)
    loss.total.backward()
    found = [weight.grad.clone() for weight in tower.parameters()]
    tower.zero_grad()
    keys = tower(vectors)
    scores = y @ keys[:18].T / 0.1
    for i, window in enumerate(batch.rows):
        left = [row for row in range(18) if row in batch.target.tolist()] if negatives == "batch" else list(range(18))
        for row in range(18):
            if row not in left or row in window[:-1]:
                scores[i, row] = -torch.inf
    cosine = 1 - (y * keys[batch.target]).sum(dim=1).mean()
    wanted = 0.7 * F.cross_entropy(scores, batch.target) + 0.3 * cosine
    torch.testing.assert_close(loss.total, wanted)
    wanted.backward()
    for got, weight in zip(found, tower.parameters(), strict=True):
        torch.testing.assert_close(got, weight.grad)


def test_a_run_has_its_tower_in_its_space(run, payload, windows):
    model, config, space = load_run(run)
    assert {name: array.shape for name, array in space.tower.items()} == {
        "up.weight": (8, 12), "up.bias": (8,), "down.weight": (12, 8), "down.bias": (12,),
    }  # fmt: skip
    assert np.abs(space.tower["down.weight"]).max() > 0  # it has learned
    assert Space.load(run / "space.safetensors").id == space.id != space.base.id == config["space_id"]
    meta = checkpoint.load(run / "best.safetensors")[1]
    rows = windows.rows("validation")
    pool = space.apply(payload.take(np.arange(len(payload))))
    with torch.no_grad():
        predicted = model(torch.from_numpy(pool[rows[:, :-1]])).numpy()
    ranks = exact_ranks(predicted, pool, rows[:, -1], rows[:, :-1], payload.groups)
    assert meta["epoch"] > 0 and meta["val_r@5"] == pytest.approx(np.mean(ranks <= 5))


@pytest.mark.parametrize("settings", ({}, {"ema": 0.9}, {"hard_negatives": "index:3", "negatives": "batch"}))
def test_it_goes_on_bit_for_bit(payload, windows, tmp_path, settings):
    go(payload, windows, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        go(payload, windows, tmp_path / "cut", **settings, progress=at(2, 2, interrupt))
    go(payload, windows, tmp_path / "cut", **settings, resume=True)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    spaces = [(tmp_path / name / "space.safetensors").read_bytes() for name in ("cut", "whole")]
    assert spaces[0] == spaces[1]


@pytest.mark.parametrize("model", sorted(set(names()) - {"mixture"}))
def test_every_model_has_a_two_tower_form(payload, windows, tmp_path, model):
    summary = go(
        payload, windows, tmp_path / "run", model, epochs=1, n_layers=2, heads=4, head_dim=8, hidden=8, d_ff=16
    )
    own, _, space = load_run(tmp_path / "run")
    assert space.tower is not None
    count = sum(weight.numel() for weight in own.parameters()) + sum(array.size for array in space.tower.values())
    assert summary.parameters == count


@pytest.mark.parametrize("precision", ("fp32", "int8"))
def test_an_artifact_predicts_and_searches_in_the_towers_space(run, payload, windows, tmp_path, precision):
    space = Space.load(run / "space.safetensors")
    index = Index.build(payload, space=space)
    fastlvm.export(run, tmp_path / "a", precision, index, payload=payload, windows=windows)
    predictor = fastlvm.Predictor.load(tmp_path / "a")
    model, _, _ = load_run(run)
    rows = windows.rows("test")
    context = payload.take(rows[:, :-1])
    with torch.no_grad():
        wanted = model(torch.from_numpy(space.apply(context))).numpy()
    predicted = predictor.predict(context)
    assert (predicted * wanted).sum(axis=1).min() > (0.999999 if precision == "fp32" else 0.999)
    ids = predictor.search(context, k=5, exclude="context").ids
    for found, window in zip(ids, rows, strict=True):
        assert not set(found) & set(payload.groups[window[:-1]])
    scores = predicted @ space.apply(payload.take(np.arange(len(payload)))).T
    np.put_along_axis(scores, rows[:, :-1], -np.inf, axis=1)
    assert (ids[:, 0] == scores.argmax(axis=1)).mean() > 0.95


def test_a_whitening_alone_is_no_longer_the_runs_space(run, payload, tmp_path):
    base = Space.load(run / "space.safetensors").base
    with pytest.raises(IntegrityError, match="index is of space"):
        fastlvm.export(run, tmp_path / "a", index=Index.build(payload, space=base))


def test_baselines_stay_in_the_whitened_space(payload, windows):
    from fastlvm.evaluation.baselines import fit_baselines

    base = Space.fit_articles(payload, windows.articles("train"))
    space = base.with_tower(arrays(Tower(12, 4, 0.0).state_dict()))
    assert {ranker.space.id for ranker in fit_baselines(payload, windows, space) if ranker.space} == {base.id}


@pytest.mark.parametrize("settings", ({"objective": "ar"}, {"projection": "mlp"}, {"tower": -1}, {"tower": 1 << 17}))
def test_what_teaches_no_tower_is_refused(settings):
    with pytest.raises(InputError, match="tower is"):
        TrainOptions(**{"tower": 4, **settings})


@pytest.mark.parametrize("ema", (0.0, 0.9))
def test_an_epoch_is_judged_by_what_would_be_kept_of_it(payload, windows, tmp_path, monkeypatch, ema):
    judged = []
    figures = Validation.figures

    def spied(self, predicted, vectors):
        judged.append((predicted.copy(), vectors.copy()))
        return figures(self, predicted, vectors)

    monkeypatch.setattr(Validation, "figures", spied)
    summary = go(payload, windows, tmp_path / "run", ema=ema, epochs=8)
    assert summary.best_epoch > 0
    predicted, vectors = judged[summary.best_epoch]
    model, _, space = load_run(tmp_path / "run")
    pool = space.apply(payload.take(np.arange(len(payload))))
    np.testing.assert_allclose(vectors, pool, atol=1e-6)
    with torch.no_grad():
        wanted = model(torch.from_numpy(pool[windows.rows("validation")[:, :-1]])).numpy()
    np.testing.assert_allclose(predicted, wanted, atol=1e-5)
