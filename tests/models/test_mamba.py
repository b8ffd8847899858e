from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fastlvm.errors import InputError
from fastlvm.models import create

SMALL = {"vector_dim": 12, "d_model": 16, "n_layers": 2, "d_state": 4, "dropout": 0.0}


def build(**overrides):
    torch.manual_seed(0)
    return create("mamba-s", **{**SMALL, **overrides})


def awake(model):
    """The model with a head that is no longer zero."""
    with torch.no_grad():
        model.head.weight.normal_(std=0.3)
        model.head.bias.normal_(std=0.3)
    return model


def contexts(batch=3, length=5, dim=12):
    generator = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(batch, length, dim, generator=generator), dim=-1)


def test_mixture_weights_sum_to_one_and_refuse_a_long_context():
    mixture = build(decay=0.5).mixture
    torch.testing.assert_close(mixture.weights(5).sum(), torch.tensor(1.0))
    torch.testing.assert_close(mixture.weights(2), torch.tensor([1 / 3, 2 / 3]))
    with torch.no_grad():
        mixture.logits.copy_(torch.tensor([9.0, 9.0, 9.0, 0.0, 1.0]))
    torch.testing.assert_close(mixture.weights(2), torch.tensor([0.0, 1.0]).softmax(0))  # the newest two
    with pytest.raises(InputError, match="holds 6 vectors"):
        mixture.weights(6)


def test_state_dict_names_and_shapes():
    found = {name: tuple(weight.shape) for name, weight in build(n_layers=1).state_dict().items()}
    assert found == {
        "mixture.logits": (5,),
        "input.weight": (12,),
        "embed.weight": (16, 12),
        "embed.bias": (16,),
        "blocks.0.norm.weight": (16,),
        "blocks.0.in_proj.weight": (64, 16),
        "blocks.0.conv.weight": (32, 4),
        "blocks.0.conv.bias": (32,),
        "blocks.0.x_proj.weight": (1 + 2 * 4, 32),
        "blocks.0.dt_proj.weight": (32, 1),
        "blocks.0.dt_proj.bias": (32,),
        "blocks.0.A_log": (32, 4),
        "blocks.0.D": (32,),
        "blocks.0.out_proj.weight": (16, 32),
        "norm.weight": (16,),
        "head.weight": (12, 16),
        "head.bias": (12,),
    }
    assert not any(name.startswith("embed") for name in build(d_model=12).state_dict())
    assert not any(name.startswith("mixture") for name in build(residual=False).state_dict())


def test_published_initialisation():
    block = build(d_model=64, d_state=8).blocks[0]
    torch.testing.assert_close(block.A_log.exp(), torch.arange(1.0, 9.0).repeat(128, 1))
    assert torch.equal(block.D, torch.ones(128))
    dt = F.softplus(block.dt_proj.bias.detach())
    assert 0.999e-3 <= float(dt.min()) < 3e-3 and 3e-2 < float(dt.max()) <= 0.1001
    assert 0.4 < float(block.dt_proj.weight.detach().abs().max()) <= 4**-0.5


def test_without_residual_the_head_stands_alone():
    x = contexts()
    y = build(residual=False)(x)
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(3))
    assert not torch.allclose(y, build()(x))


def test_output_is_the_formula():
    """Against a loop over time written out from the published equations."""
    model = awake(build())
    x = contexts()
    h = model.embed(x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * model.input.weight)
    for block in model.blocks:
        n = h / torch.sqrt((h**2).mean(-1, keepdim=True) + 1e-5) * block.norm.weight
        u, z = (n @ block.in_proj.weight.T).chunk(2, dim=-1)
        padded = F.pad(u, (0, 0, 3, 0))
        u = F.silu(sum(padded[:, k : k + 5] * block.conv.weight[:, k] for k in range(4)) + block.conv.bias)
        dt, B, C = (u @ block.x_proj.weight.T).split([1, 4, 4], dim=-1)
        delta = F.softplus(dt @ block.dt_proj.weight.T + block.dt_proj.bias)
        state, ys = torch.zeros(3, 32, 4), []
        for t in range(5):
            decayed = torch.exp(delta[:, t, :, None] * -torch.exp(block.A_log)) * state
            state = decayed + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
            ys.append((state * C[:, t, None]).sum(-1) + block.D * u[:, t])
        h = h + (torch.stack(ys, 1) * F.silu(z)) @ block.out_proj.weight.T
    last = h[:, -1] / torch.sqrt((h[:, -1] ** 2).mean(-1, keepdim=True) + 1e-5) * model.norm.weight
    torch.testing.assert_close(model(x), F.normalize(model.mixture(x) + model.head(last), dim=-1), atol=1e-5, rtol=1e-5)


def test_dropout_acts_only_while_training():
    model = awake(build(dropout=0.5))
    x = contexts()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_integer_contexts_are_refused():
    with pytest.raises(InputError, match="int64"):
        build()(torch.zeros(2, 5, 12, dtype=torch.int64))


def test_same_seed_same_weights():
    first, second = build().state_dict(), build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(math.isnan(float(weight.sum())) for weight in first.values())
