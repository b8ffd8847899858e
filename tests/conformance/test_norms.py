"""The norms of mamba_ssm against their formulas."""

from __future__ import annotations

import pytest
import torch

from fastlvm.compat import mamba_ssm

from . import plain

TOLERANCE = {torch.float32: (3e-4, 1e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (1e-2, 5e-2)}
WEIGHTS = {"weight": (2e-2, 5e-2), "bias": (2e-2, 5e-2)}


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group_size", [None, 24, 8])
@pytest.mark.parametrize("parts", [("weight", "z"), ("weight", "bias", "z"), ("weight",)], ids=str)
def test_the_gated_norm(dtype, is_rms, before, group_size, parts):
    tensors = {
        "x": _normal(2, 5, 48).to(dtype),
        "weight": _normal(48, seed=1),
        "z": _normal(2, 5, 48, seed=2).to(dtype),
    }
    tensors["bias"] = _normal(48, seed=3)
    tensors = {k: v for k, v in tensors.items() if k in ("x", *parts)}

    def function(bias=None, **kwargs):
        kwargs |= {"bias": bias, "group_size": group_size, "norm_before_gate": before}
        return mamba_ssm.rmsnorm_fn(**kwargs) if is_rms else mamba_ssm.layernorm_fn(**kwargs)

    def formula(x, weight, bias=0.0, z=None):
        gate = 1.0 if z is None else plain.silu(z)
        x = x if before else x * gate
        grouped = x.unflatten(-1, (-1, group_size or 48))
        if not is_rms:
            grouped = grouped - grouped.mean(-1, keepdim=True)
        normed = plain.rms(grouped, weight.view(-1, group_size or 48), 1e-6).flatten(2) + bias
        return normed * gate if before else normed

    plain.compare(function, formula, tensors, TOLERANCE[dtype], WEIGHTS)


def test_the_module_of_the_gated_layer_norm_uses_what_it_holds():
    norm = mamba_ssm.LayerNormGated(48, eps=0.3, group_size=8, norm_before_gate=False)
    assert {name: tuple(value.shape) for name, value in norm.state_dict().items()} == {"weight": (48,), "bias": (48,)}
    assert torch.all(norm.weight == 1) and torch.all(norm.bias == 0)
    with torch.no_grad():
        norm.weight.copy_(_normal(48, seed=1))
        norm.bias.copy_(_normal(48, seed=2))
    x, z = _normal(2, 48, seed=3), _normal(2, 48, seed=4)
    wanted = mamba_ssm.layernorm_fn(x, norm.weight, norm.bias, z, 0.3, 8, False)
    assert torch.equal(norm(x, z), wanted)
    assert not torch.allclose(wanted, mamba_ssm.layernorm_fn(x, norm.weight, norm.bias, z, 1e-5, 8, False))


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("parts", [(), ("bias",), ("residual",), ("bias", "residual", "rowscale")], ids=str)
def test_the_norm_of_a_sum(dtype, is_rms, parts):
    tensors = {"x": _normal(2, 5, 48).to(dtype), "weight": _normal(48, seed=1), "bias": _normal(48, seed=2)}
    tensors |= {"residual": _normal(2, 5, 48, seed=3), "rowscale": _normal(2, 5, seed=4)}
    tensors = {k: v for k, v in tensors.items() if k in ("x", "weight", *parts)}

    def function(bias=None, **kwargs):
        if is_rms:
            return mamba_ssm.rms_norm_fn(**kwargs, bias=bias, prenorm=True)
        return mamba_ssm.layer_norm_fn(**kwargs, bias=bias, prenorm=True)

    def formula(x, weight, bias=0.0, residual=0.0, rowscale=None):
        total = (x if rowscale is None else x * rowscale[..., None]) + residual
        held = total if is_rms else total - total.mean(-1, keepdim=True)
        return plain.rms(held, weight, 1e-6) + bias, total

    plain.compare(function, formula, tensors, TOLERANCE[dtype], WEIGHTS)


@pytest.mark.parametrize("residual, in_fp32, wanted", [
    (None, False, torch.bfloat16), (None, True, torch.float32), (torch.float32, False, torch.float32),
    (torch.bfloat16, True, torch.bfloat16),
])  # fmt: skip
def test_the_dtype_of_the_sum(residual, in_fp32, wanted):
    x, weight = _normal(2, 8).bfloat16(), torch.ones(8)
    before = None if residual is None else _normal(2, 8).to(residual)
    out, total = mamba_ssm.rms_norm_fn(x, weight, None, before, prenorm=True, residual_in_fp32=in_fp32)
    assert (out.dtype, total.dtype) == (torch.bfloat16, wanted)


def test_dropout_comes_before_the_sum():
    x, residual = torch.ones(400), torch.full((400,), 5.0)
    torch.manual_seed(0)
    _, total = mamba_ssm.rms_norm_fn(x, torch.ones(400), None, residual, dropout_p=0.5, prenorm=True)
    dropped = total == 5
    assert 100 < dropped.sum() < 300
    assert torch.equal(total[~dropped], torch.full_like(total[~dropped], 7.0))
