"""selective_state_update over the grid of mamba_ssm's own tests: one token, the states written in place."""

from __future__ import annotations

import pytest
import torch

from fastlvm.compat.mamba_ssm import selective_state_update

from . import plain

TOLERANCE = {torch.float32: (3e-4, 1e-3), torch.float16: (5e-3, 1e-2), torch.bfloat16: (1e-2, 5e-2)}


def _formula(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """Output [b, h, dim] and new state [b, h, dim, N] in float64, everything with heads."""
    arrays = (state, x, dt, A, B, C, D, z, dt_bias)
    state, x, dt, A, B, C, D, z, dt_bias = (None if M is None else M.double() for M in arrays)
    group = torch.arange(x.shape[1]) * B.shape[1] // x.shape[1]
    B, C = B[:, group], C[:, group]
    dt = dt if dt_bias is None else dt + dt_bias
    dt = plain.softplus(dt) if dt_softplus else dt
    state = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, :, None]
    y = (state * C[:, :, None]).sum(-1)
    y = y if D is None else y + D * x
    return (y if z is None else y * plain.silu(z)), state


def _inputs(dtype, batch=2, heads=4, dim=16, states=16, groups=2, pool=None, tied=False, options=("D", "z", "dt_bias")):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    if tied:
        dt = normal(batch, heads, 1).to(dtype).expand(-1, -1, dim)
        A = -(torch.rand(heads, 1, 1, generator=g) + 1).expand(-1, dim, states)
        dt_bias = (torch.rand(heads, 1, generator=g) - 4).expand(-1, dim)
    else:
        dt = normal(batch, heads, dim).to(dtype)
        A = -(torch.rand(heads, dim, states, generator=g) + 1)
        dt_bias = torch.rand(heads, dim, generator=g) - 4
    return {
        "state": normal(pool or batch, heads, dim, states).to(dtype),
        "x": normal(batch, heads, dim).to(dtype),
        "dt": dt,
        "A": A,
        "B": normal(batch, groups, states).to(dtype),
        "C": normal(batch, groups, states).to(dtype),
        "D": normal(heads, dim) if "D" in options else None,
        "z": normal(batch, heads, dim).to(dtype) if "z" in options else None,
        "dt_bias": dt_bias if "dt_bias" in options else None,
    }


def _hold(out, state, expected, new_state, dtype):
    ours = plain.OUR_FORWARD if dtype == torch.float32 else None
    assert out.dtype == dtype
    plain.close(out, expected, *TOLERANCE[dtype], ours)
    plain.close(state, new_state, *TOLERANCE[dtype], ours, "state")


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("states", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("options", [("D", "dt_bias"), ("D", "z", "dt_bias"), ()], ids=str)
def test_without_heads(dtype, states, options):
    tensors = _inputs(dtype, heads=1, dim=208, states=states, groups=1, options=options)
    expected, new_state = _formula(**tensors, dt_softplus=True)
    flat = {k: _without_heads(k, v) for k, v in tensors.items()}
    out = selective_state_update(**flat, dt_softplus=True)
    assert out.shape == (2, 208)
    _hold(out, flat["state"], expected[:, 0], new_state[:, 0], dtype)


def _without_heads(name, x):
    if x is None:
        return None
    return x[0] if name in ("A", "D", "dt_bias") else x[:, 0]


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("states", [16, 128])
def test_with_heads(dtype, groups, tied, states):
    tensors = _inputs(dtype, dim=24, states=states, groups=groups, tied=tied)
    expected, new_state = _formula(**tensors, dt_softplus=True)
    out = selective_state_update(**tensors, dt_softplus=True)
    _hold(out, tensors["state"], expected, new_state, dtype)


@pytest.mark.parametrize("options", [(), ("D",), ("z",), ("dt_bias",)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_every_option_by_itself(options, tied, softplus):
    tensors = _inputs(torch.float32, tied=tied, options=options)
    expected, new_state = _formula(**tensors, dt_softplus=softplus)
    out = selective_state_update(**tensors, dt_softplus=softplus)
    _hold(out, tensors["state"], expected, new_state, torch.float32)


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_states_chosen_by_index(dtype, tied, padded):
    tensors = _inputs(dtype, batch=4, pool=9, tied=tied)
    indices = torch.tensor([7, -1, 0, 3] if padded else [7, 2, 0, 3], dtype=torch.int32)
    before = tensors["state"].clone()
    expected, new_state = _formula(**{**tensors, "state": before[indices.long()]}, dt_softplus=True)
    out = selective_state_update(**tensors, dt_softplus=True, state_batch_indices=indices)
    kept = indices >= 0
    _hold(out[kept], tensors["state"][indices[kept].long()], expected[kept], new_state[kept], dtype)
    assert not out[~kept].any()
    others = [i for i in range(9) if i not in indices.tolist()]
    assert torch.equal(tensors["state"][others], before[others])


def test_a_state_whose_heads_are_apart_in_memory():
    """The channels of such heads are no one axis: the state goes through a copy and back."""
    tensors = _inputs(torch.float32)
    expected, new_state = _formula(**tensors, dt_softplus=True)
    tensors["state"] = tensors["state"].transpose(1, 2).contiguous().transpose(1, 2)
    out = selective_state_update(**tensors, dt_softplus=True)
    _hold(out, tensors["state"], expected, new_state, torch.float32)
