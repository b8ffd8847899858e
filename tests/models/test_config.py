from __future__ import annotations

import json

import pytest
import torch

from fastlvm.errors import InputError
from fastlvm.models import ModelConfig, create, names


def test_mamba_s_is_the_published_size():
    config = ModelConfig.preset("mamba-s")
    assert (config.d_model, config.n_layers, config.d_state, config.d_conv, config.expand) == (768, 8, 128, 4, 2)
    assert config.dt_rank == 48 and config.d_inner == 1536


def test_round_trip_through_json():
    config = ModelConfig.preset("mamba-s", d_model=24, n_layers=2, residual=False)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_dt_rank_follows_a_new_width():
    assert ModelConfig.preset("mamba-s").replace(d_model=64).dt_rank == 4
    assert ModelConfig.preset("mamba-s").replace(d_model=64, dt_rank=7).dt_rank == 7


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="'mamba-z' is not known"):
        create("mamba-z")
    with pytest.raises(InputError, match="'d_modell' is no field"):
        create("mamba-s", d_modell=3)
    with pytest.raises(InputError, match="'head' is no field"):
        ModelConfig.from_dict({"head": 3})


def mamba(d, state, expand=2, conv=4):
    inner, rank = expand * d, -(-d // 16)
    products = d * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * d
    return d + products + inner * (conv + 1) + inner + inner * state + inner


def mamba2(d, state=128, head=64, conv=4):
    inner = 2 * d
    heads, mixed = inner // head, inner + 2 * state
    return d + d * (inner + mixed + heads) + mixed * (conv + 1) + 3 * heads + inner + inner * d


def attention(d):
    return d + 4 * d * d


def mlp(d, inner=2048):
    return d + d * inner + inner + inner * d + d


def gate(d, hidden=256):
    return d + 3 * hidden * (d + hidden + 2) + hidden * d + d


def cells(gates, d=512):
    return 2 * d + gates * d * (2 * d + 2)


def around(blocks, d=768, dim=768, context=5):
    embed = 0 if d == dim else dim * d + d
    return dim + embed + blocks + d + d * dim + dim + context


SIZES = {
    "mixture": 5,
    "mlp": 768 + (5 * 768 + 1) * 2048 + (2048 + 1) * 768 + 5,
    "mamba-s": around(8 * mamba(768, 128)),
    "mamba-h": around(8 * mamba(768, 128) + 2 * attention(768)),
    "mamba-xl": around(12 * mamba(960, 160, 3), 960),
    "mamba-sandwich": around(8 * mamba(768, 128) + 4 * attention(768)),
    "mamba-gr": around(8 * (mamba(768, 144) + gate(768))),
    "mamba2": around(4 * mamba2(512), 512),
    "transformer": around(4 * (attention(512) + mlp(512)) + 5 * 512, 512),
    "gru": around(4 * cells(3), 512),
    "lstm": around(2 * cells(4), 512),
    "amn": 2 * (768 * 256 + 256) + (1536 + 1) * 512 + (512 + 1) * 256 + (256 + 1) * 768 + 5,
}


def test_the_seeds_models_have_the_seeds_sizes():
    assert names() == sorted(SIZES) and SIZES["amn"] == pytest.approx(1.5e6, rel=0.01)
    for name, count in SIZES.items():
        with torch.device("meta"):
            assert sum(weight.numel() for weight in create(name).parameters()) == count, name


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ("mamba", ["mamba"] * 5),
        ("mamba mamba attention", ["mamba", "mamba", "attention", "mamba", "mamba"]),
        ("attention*2 mamba*3", ["attention"] * 2 + ["mamba"] * 3),
        ("mamba+gate", ["mamba+gate"] * 5),
        ("mamba+gate*2 lstm", ["mamba+gate"] * 2 + ["lstm"] + ["mamba+gate"] * 2),
    ],
)
def test_a_layout_is_repeated_until_there_are_enough_layers(layout, layers):
    found = ModelConfig.preset("mamba-s", layout=layout, n_layers=5).layers
    assert ["+".join(layer) for layer in found] == layers


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"layout": ""}, "layout is ''"),
        ({"layout": 3}, "layout is 3"),
        ({"layout": "mamba rwkv"}, "layout has 'rwkv', and names of mamba, mamba2, "),
        ({"layout": "mamba*0"}, r"layout has 'mamba\*0'"),
        ({"layout": "mamba*"}, r"layout has 'mamba\*'"),
        ({"layout": "mamba+"}, r"layout has 'mamba\+'"),
        ({"layout": "attention", "heads": 5}, "heads is 5, and it has to divide d_model, which is 768"),
        ({"layout": "mamba2", "head_dim": 80}, "head_dim is 80, and it has to divide expand · d_model, 1536"),
        ({"window": 0}, "window is 0"),
        ({"positions": 1}, "positions is 1"),
    ],
)
def test_what_no_stack_can_be_made_of_is_refused(given, reason):
    with pytest.raises(InputError, match=reason):
        ModelConfig.preset("mamba-s", **given)


@pytest.mark.parametrize(
    "field, value",
    [
        ("d_model", 0),
        ("d_model", 1.5),
        ("n_layers", True),
        ("context", -1),
        ("dt_rank", 0),
        ("dropout", 1.0),
        ("dropout", "0.1"),
        ("dropout", float("nan")),
        ("decay", 0.0),
        ("decay", 1.1),
        ("norm_eps", 0),
        ("residual", 1),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(InputError, match=field):
        ModelConfig.preset("mamba-s", **{field: value})
