"""What a lower precision costs: on windows of the sample payload with a trained model, and at seed size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastlvm
from fastlvm.data import Payload, Windows
from fastlvm.predictor.export import AGREEMENT, describe
from fastlvm.predictor.forward import Forward, Plan
from fastlvm.predictor.pack import PRECISIONS, pack
from fastlvm.retrieval import Index

from .natives import PRODUCTS, pinned
from .sample import torch_predict

TRAINING = {
    "d_model": 64,
    "n_layers": 2,
    "d_state": 16,
    "epochs": 1,
    "warmup_steps": 5,
    "lr": 1e-3,
    "seed": 0,
}
POINTS = 0.3  # of R@5, in hundredths


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run on the sample payload, the payload, its windows and the index."""
    from fastlvm.training import train

    folder = tmp_path_factory.mktemp("precision")
    payload = Payload.sample()
    windows = Windows.build(payload, split=(0.6, 0.1, 0.3), seed=0)
    train("mamba-s", payload, windows, folder / "run", **TRAINING)
    space = fastlvm.Space.load(folder / "run/space.safetensors")
    return folder, payload, windows, Index.build(payload, space=space)


@pytest.fixture(scope="module")
def found(trained):
    """By precision: predictions of the test split's windows, and how many of their targets are among the first 5."""
    folder, payload, windows, index = trained
    rows = windows.rows("test")
    contexts, targets = payload.take(rows[:, :-1]), rows[:, -1]
    results = {}
    for precision in PRECISIONS:
        fastlvm.export(folder / "run", folder / precision, precision, index)
        predictor = fastlvm.Predictor.load(folder / precision)
        ids = predictor.search(contexts, 5, exclude=rows[:, :-1]).ids
        results[precision] = predictor.predict(contexts), 100 * (ids == targets[:, None]).any(axis=1).mean()
    return results


@pytest.mark.parametrize("precision", ("bf16", "int8"))
def test_a_trained_model_retrieves_as_well(found, precision):
    (wanted, full), (got, recall) = found["fp32"], found[precision]
    cosine = (got * wanted).sum(axis=1)
    mean, least = AGREEMENT[precision]
    assert cosine.mean() >= mean and cosine.min() >= least
    assert full > 10 and abs(recall - full) <= POINTS


@pytest.fixture(scope="module")
def seed_size():
    """Mamba-S as large as the seeds', with random weights in its head too: plan, weights, contexts, predictions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fastlvm.models.create("mamba-s").eval()
        with torch.no_grad():
            torch.nn.init.normal_(model.head.weight, std=0.02)
    context = np.random.default_rng(0).standard_normal((32, 5, 768)).astype(np.float32)
    context /= np.linalg.norm(context, axis=-1, keepdims=True)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return Plan(describe(model.config), 5, 768), weights, context, torch_predict(model, context)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_seed_size_on_every_instruction_set(seed_size, precision):
    plan, weights, context, wanted = seed_size
    forward = Forward(plan, pack(plan, weights, precision))
    mean, least = AGREEMENT[precision]
    for products in PRODUCTS:
        n = 2 if products.isa == "scalar" else len(context)
        with pinned(products) as names:
            cosine = (forward(context[:n]) * wanted[:n]).sum(axis=1)
        assert cosine.mean() >= mean and cosine.min() >= least, (str(products), names[precision])
