"""selective_scan_fn and mamba_inner_fn over the grid of mamba_ssm's own tests, and over what they leave out."""

from __future__ import annotations

import pytest
import torch

from fastlvm.compat import mamba_ssm

from . import plain

TOLERANCE = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}
WEIGHTS = (1e-3, 1e-3)
ALL = ("D", "z", "delta_bias")


def _limits(dtype):
    rtol, atol = TOLERANCE[dtype]
    return {
        "u": (2 * rtol, 2 * atol),
        "delta": (5 * rtol, 10 * atol),
        "A": (WEIGHTS[0], 5 * WEIGHTS[1]),
        "D": WEIGHTS,
        "delta_bias": WEIGHTS,
    }


def _inputs(dtype, batch=2, channels=4, length=64, states=8, B="groups1", C="groups1", options=ALL, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    def layout(kind):
        if kind == "constant":
            return normal(channels, states)  # a weight: float32
        shape = (batch, states, length) if kind == "shared" else (batch, int(kind[-1]), states, length)
        return normal(*shape).to(dtype)

    tensors = {
        "u": normal(batch, channels, length).to(dtype),
        "delta": (0.5 * torch.rand(batch, channels, length, generator=g)).to(dtype),
        "A": -0.5 * torch.rand(channels, states, generator=g),
        "B": layout(B),
        "C": layout(C),
        "D": normal(channels),
        "z": normal(batch, channels, length).to(dtype),
        "delta_bias": 0.5 * torch.rand(channels, generator=g),
    }
    return {k: v for k, v in tensors.items() if k in options or k not in ALL}


def _check(tensors, dtype, softplus=True, function=mamba_ssm.selective_scan_fn):
    plain.compare(
        lambda **kwargs: function(**kwargs, delta_softplus=softplus, return_last_state=True),
        lambda **kwargs: plain.selective_scan(**kwargs, delta_softplus=softplus),
        tensors,
        TOLERANCE[dtype],
        _limits(dtype),
    )


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("length", [128, 372])
@pytest.mark.parametrize("B, C", [("groups1", "groups1"), ("groups2", "groups2"), ("shared", "constant")])
def test_the_grid_of_the_original(dtype, length, B, C):
    _check(_inputs(dtype, length=length, B=B, C=C), dtype)


@pytest.mark.parametrize("layouts", [("constant", "constant"), ("constant", "groups2"), ("shared", "groups1")], ids=str)
@pytest.mark.parametrize("options", [(), ("D",), ("z",), ("delta_bias",)], ids=str)
@pytest.mark.parametrize("softplus", [False, True])
def test_every_option_by_itself(layouts, options, softplus):
    B, C = layouts
    _check(_inputs(torch.float32, B=B, C=C, options=options), torch.float32, softplus)


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("length", range(1, 9))
def test_short_sequences_of_large_states(dtype, length):
    _check(_inputs(dtype, channels=24, length=length, states=128), dtype)


def test_a_long_sequence():
    _check(_inputs(torch.float32, length=2048), torch.float32)


@pytest.mark.parametrize("states", [1, 16, 300])
def test_state_sizes_the_original_has_not(states):
    _check(_inputs(torch.float32, states=states, length=33), torch.float32)


def test_the_step_by_step_reference():
    _check(_inputs(torch.float32, length=33), torch.float32, function=mamba_ssm.selective_scan_ref)


def test_the_last_state_alone_has_gradients():
    tensors = _inputs(torch.float32, length=5, states=128, options=("delta_bias",))
    plain.compare(
        lambda **kwargs: mamba_ssm.selective_scan_fn(**kwargs, return_last_state=True)[1] + 0 * kwargs["C"].sum(),
        lambda **kwargs: plain.selective_scan(**kwargs)[1] + 0 * kwargs["C"].sum(),
        tensors,
        TOLERANCE[torch.float32],
        _limits(torch.float32),
    )


def test_second_derivatives():
    tensors = {k: v.double().requires_grad_() for k, v in _inputs(torch.float32, 1, 2, 3, 4).items()}
    function = lambda *args: mamba_ssm.selective_scan_fn(*args, True, True)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, tuple(tensors[k] for k in ("u", "delta", "A", "B", "C", *ALL)))


NORMS = ("b_rms_weight", "c_rms_weight", "dt_rms_weight")


def _block(dtype, length=64, batch=2, inner=48, states=8, rank=6, width=4, model=24, given=(), extra=(), seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=g)

    tensors = {
        "xz": normal(batch, 2 * inner, length).to(dtype),
        "conv1d_weight": normal(inner, 1, width),
        "conv1d_bias": normal(inner),
        "x_proj_weight": normal(rank + (2 - len(given)) * states, inner, scale=inner**-0.5).to(dtype),
        "delta_proj_weight": normal(inner, rank, scale=rank**-0.5).to(dtype),
        "out_proj_weight": normal(model, inner, scale=inner**-0.5).to(dtype),
        "out_proj_bias": normal(model).to(dtype),
        "A": -0.5 * torch.rand(inner, states, generator=g),
        "D": normal(inner),
        "delta_bias": 0.5 * torch.rand(inner, generator=g),
        "B_proj_bias": normal(states),
        "C_proj_bias": normal(states),
        "b_rms_weight": normal(states),
        "c_rms_weight": normal(states),
        "dt_rms_weight": normal(inner),
        "B": normal(inner, states),
        "C": normal(inner, states),
    }
    optional = {"B_proj_bias", "C_proj_bias", *NORMS, "B", "C"} - set(given) - set(extra)
    return {k: v for k, v in tensors.items() if k not in optional}


def _block_formula(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, D, delta_bias,
    B=None, C=None, B_proj_bias=0.0, C_proj_bias=0.0, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None,
):  # fmt: skip
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    x, z = xz.chunk(2, 1)
    x = plain.conv1d(x, conv1d_weight[:, 0], conv1d_bias, "silu")[0]
    parts = torch.einsum("rd,bdl->blr", x_proj_weight, x)
    delta = torch.einsum("dr,blr->bld", delta_proj_weight, parts[..., :rank])
    if dt_rms_weight is not None:
        delta = plain.rms(delta, dt_rms_weight, 1e-6)
    if B is None:
        B = parts[..., rank : rank + states] + B_proj_bias
        B = (B if b_rms_weight is None else plain.rms(B, b_rms_weight, 1e-6)).transpose(1, 2)
    if C is None:
        C = parts[..., -states:] + C_proj_bias
        C = (C if c_rms_weight is None else plain.rms(C, c_rms_weight, 1e-6)).transpose(1, 2)
    y, _ = plain.selective_scan(x, delta.transpose(1, 2), A, B, C, D, z, delta_bias, True)
    return torch.einsum("ed,bdl->ble", out_proj_weight, y) + out_proj_bias


@pytest.mark.parametrize("length", [1, 2, 5, 128])
@pytest.mark.parametrize("given", [(), ("B",), ("B", "C")], ids=str)
def test_the_block(length, given):
    tensors = _block(torch.float32, length, given=given)
    plain.compare(mamba_ssm.mamba_inner_fn, _block_formula, tensors, TOLERANCE[torch.float32])


@pytest.mark.parametrize("extra", [("B_proj_bias", "C_proj_bias"), NORMS, ("B_proj_bias", *NORMS)], ids=str)
def test_the_block_with_biases_and_norms(extra):
    tensors = _block(torch.float32, 17, extra=extra)
    plain.compare(mamba_ssm.mamba_inner_fn, _block_formula, tensors, TOLERANCE[torch.float32])


@pytest.mark.parametrize("extra", [(), ("B_proj_bias", "C_proj_bias")], ids=str)
def test_the_reference_of_the_block(extra):
    tensors = _block(torch.float32, 17, extra=extra)
    plain.compare(mamba_ssm.mamba_inner_ref, _block_formula, tensors, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_block_in_sixteen_bits(dtype):
    """Each of its layers rounds, so that gradients are compared by their size."""
    tensors = {k: v.requires_grad_() for k, v in _block(dtype).items()}
    out = mamba_ssm.mamba_inner_fn(**tensors)
    wide = {k: plain.double(v).requires_grad_() for k, v in tensors.items()}
    expected = _block_formula(**wide)
    unit = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert (out - expected).abs().max() <= 4 * unit * expected.abs().max()
    grads = torch.autograd.grad(out.float().square().mean(), list(tensors.values()))
    wanted = torch.autograd.grad(expected.square().mean(), list(wide.values()))
    for name, grad, want in zip(tensors, grads, wanted, strict=True):
        assert (grad - want).abs().max() <= 8 * unit * want.abs().max(), name
