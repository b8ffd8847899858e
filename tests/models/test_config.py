from __future__ import annotations

import json

import pytest

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
    with pytest.raises(InputError, match="'heads' is no field"):
        ModelConfig.from_dict({"heads": 3})
    assert names() == ["mamba-s"]


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
