from __future__ import annotations

import numpy as np
import pytest
import torch

from fastlvm.errors import InputError
from fastlvm.predictor.blocks import LAYERS
from fastlvm.predictor.export import describe
from fastlvm.predictor.forward import Forward, Plan
from fastlvm.predictor.layers import read_layer, write_layer

from .sample import CONTEXT, DIM, make_model, torch_predict

CONFIGS = {
    "embedded": {},
    "no embedding": {"d_model": DIM},
    "no residual": {"residual": False},
    "neither": {"d_model": DIM, "residual": False},
    "state of 1": {"d_state": 1},
    "state of 130": {"d_state": 130, "n_layers": 1},
    "wide convolution": {"d_conv": 7},
    "convolution of 1": {"d_conv": 1},
    "odd": {"d_model": 17, "expand": 3, "dt_rank": 5, "d_state": 3},
    "other epsilon": {"norm_eps": 0.5},
    "context of 1": {"context": 1},
    "context of 9": {"context": 9},
}


def weights_of(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def forward_of(model):
    return Forward(Plan(describe(model.config), model.config.context, model.config.vector_dim), weights_of(model))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("n", (1, 6))
def test_equals_the_torch_model(name, n):
    model = make_model(3, **CONFIGS[name])
    context = np.random.default_rng(n).standard_normal((n, model.config.context, DIM)).astype(np.float32)
    context /= np.linalg.norm(context, axis=-1, keepdims=True)
    found = forward_of(model)(context)
    assert found.dtype == np.float32
    assert np.abs(found - torch_predict(model, context)).max() <= 1e-5


def test_every_weight_of_the_torch_model_shows():
    """What the comparison above rests on: each tensor changes the prediction, on both sides alike."""
    model = make_model(3)
    context = np.random.default_rng(0).standard_normal((2, CONTEXT, DIM)).astype(np.float32)
    before = forward_of(model)(context)
    for name, weight in model.named_parameters():
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(3 + torch.rand_like(weight))
        after = forward_of(model)(context)
        assert np.abs(after - before).max() > 1e-5, name
        assert np.abs(after - torch_predict(model, context)).max() <= 1e-5, name
        with torch.no_grad():
            weight.copy_(kept)


def test_an_untrained_model_is_its_recency_mixture():
    import fastlvm

    model = fastlvm.models.create("mamba-s", vector_dim=DIM, d_model=16, n_layers=1, d_state=4, decay=0.3)
    context = np.random.default_rng(0).standard_normal((3, CONTEXT, DIM)).astype(np.float32)
    mixed = np.einsum("nld,l->nd", context, 0.3 ** np.arange(CONTEXT - 1, -1, -1))
    found = forward_of(model)(context)
    np.testing.assert_allclose(found, mixed / np.linalg.norm(mixed, axis=1, keepdims=True), atol=1e-6)


def test_layers_survive_json():
    entries = describe(make_model().config)
    assert [write_layer(read_layer(entry, "layer")) for entry in entries] == entries
    assert {entry["type"] for entry in entries} <= set(LAYERS)


def changed(number, **values):
    entries = describe(make_model().config)
    entries[number] = {name: value for name, value in (entries[number] | values).items() if value is not ...}
    return entries


LIST = [entry["type"] for entry in describe(make_model().config)]
EMBED, BLOCK, LAST, MIXTURE = 1, 2, LIST.index("last"), LIST.index("recency_mixture")


@pytest.mark.parametrize(
    "entries, says",
    (
        (changed(BLOCK, type="rwkv"), "layer 2 has type 'rwkv', and this version knows linear, rms_norm, layer_norm"),
        (changed(BLOCK, type=...), "layer 2 has type None"),
        (changed(BLOCK, type=["linear"]), "layer 2 has type"),
        (changed(BLOCK, chunk=4), "layer 2 .*has a field 'chunk'"),
        (changed(BLOCK, d_state=...), "layer 2 .*d_state = None"),
        (changed(BLOCK, d_state=0), "d_state = 0"),
        (changed(BLOCK, d_state=True), "d_state = True"),
        (changed(BLOCK, d_state=13.0), "d_state = 13.0"),
        (changed(BLOCK, eps=-1e-5), "eps = -1e-05"),
        (changed(BLOCK, eps=float("nan")), "eps = nan"),
        (changed(BLOCK, prefix=""), "prefix = ''"),
        (changed(BLOCK, prefix=7), "prefix = 7"),
        (changed(EMBED, bias=1), "bias = 1"),
        (changed(BLOCK, dim=32), "layer 2 .*takes 32 features, and 48 arrive"),
        (changed(EMBED, outputs=47), "takes 48 features, and 47 arrive"),
        (changed(MIXTURE, context=4), "adds 4 vectors of 32"),
        (describe(make_model().config)[:-3], "leaves"),
        (describe(make_model().config)[:LAST], "leaves"),
        (
            describe(make_model().config)[: LAST + 1] + describe(make_model().config)[BLOCK:],
            "takes a sequence, and one vector arrives",
        ),
        ([{"type": "last"}, {"type": "last"}], "layer 1 .*takes a sequence"),
        ([], "at least one layer"),
        ("linear", "at least one layer"),
        (None, "at least one layer"),
        ([7], "layer 0 has type None"),
    ),
)
def test_a_list_that_is_no_model_is_refused(entries, says):
    with pytest.raises(InputError, match=says):
        Plan(entries, CONTEXT, DIM)


def test_weights_that_do_not_fit_are_refused():
    model = make_model()
    plan, good = Plan(describe(model.config), CONTEXT, DIM), weights_of(model)
    name = "blocks.1.A_log"
    bad = good[name].copy()
    bad[3, 4] = np.nan
    for weights, says in (
        ({key: value for key, value in good.items() if key != name}, "blocks.1.A_log is missing"),
        (good | {"blocks.2.D": good["blocks.1.D"]}, "blocks.2.D belongs to none"),
        (good | {name: good[name].T}, r"blocks.1.A_log has shape \[13, 96\], and \[96, 13\] is wanted"),
        (good | {name: good[name].astype(np.float64)}, "float64"),
        (good | {name: bad}, "blocks.1.A_log holds NaN"),
    ):
        with pytest.raises(InputError, match=says):
            Forward(plan, weights)
