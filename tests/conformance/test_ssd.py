"""The scans of Mamba-2 over the grid of mamba_ssm's own tests, and over what they leave out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastlvm.compat.mamba_ssm import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

from . import plain

TOLERANCE = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 1e-2), torch.bfloat16: (3e-2, 8e-2)}
WEIGHTS = dict.fromkeys(("A", "D", "dt_bias"), (0.001, 0.005))
OPTIONS = ("D", "z", "dt_bias", "initial_states")


def _limits(dtype):
    rtol, atol = TOLERANCE[dtype]
    return {**WEIGHTS, "dt": (5 * rtol, 10 * atol), "initial_states": (rtol, atol)}


def _inputs(dtype, batch=2, length=40, heads=4, dim=8, groups=2, states=16, options=OPTIONS, D_wide=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    tensors = {
        "x": normal(batch, length, heads, dim).to(dtype),
        "dt": (normal(batch, length, heads) - 2).to(dtype),
        "A": -torch.exp(torch.rand(heads, generator=g)),
        "B": normal(batch, length, groups, states).to(dtype),
        "C": normal(batch, length, groups, states).to(dtype),
        "D": normal(heads, dim) if D_wide else normal(heads),
        "z": normal(batch, length, heads, dim).to(dtype),
        "dt_bias": normal(heads),
        "initial_states": normal(batch, heads, dim, states),
    }
    return {k: v for k, v in tensors.items() if k in options or k not in OPTIONS}


def _function(initial_states=None, softplus=True, limit=(0.0, math.inf), seq_idx=None, **kwargs):
    return mamba_chunk_scan_combined(
        **kwargs,
        chunk_size=16,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=softplus,
        dt_limit=limit,
        return_final_states=True,
    )


def _formula(initial_states=None, softplus=True, limit=(0.0, math.inf), **kwargs):
    return plain.ssd(**kwargs, start=initial_states, dt_softplus=softplus, limit=limit)


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [40, 150])
def test_groups_and_dtypes(dtype, groups, length):
    plain.compare(_function, _formula, _inputs(dtype, length=length, groups=groups), TOLERANCE[dtype], _limits(dtype))


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("length", range(1, 9))
def test_short_sequences_of_large_states(dtype, length):
    tensors = _inputs(dtype, length=length, states=128)
    plain.compare(_function, _formula, tensors, TOLERANCE[dtype], _limits(dtype))


@pytest.mark.parametrize("option", [(), *((name,) for name in OPTIONS)], ids=str)
@pytest.mark.parametrize("D_wide", [False, True])
def test_every_option_by_itself(option, D_wide):
    tensors = _inputs(torch.float32, options=option, D_wide=D_wide)
    plain.compare(_function, _formula, tensors, TOLERANCE[torch.float32], _limits(torch.float32))


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.05, math.inf), (0.0, 0.2), (0.1, 0.3)], ids=str)
def test_step_sizes_have_limits(softplus, limit):
    """Without softplus half of them are negative, which the least of the limits, 0, takes for 0."""
    tensors = _inputs(torch.float32, options=("dt_bias", "D"))
    tensors["dt"] += 2
    plain.compare(
        lambda **kwargs: _function(**kwargs, softplus=softplus, limit=limit),
        lambda **kwargs: _formula(**kwargs, softplus=softplus, limit=limit),
        tensors,
        TOLERANCE[torch.float32],
        _limits(torch.float32),
    )


SEQUENCES = [[0] * 5 + [1] * 7 + [2], [3] * 4 + [4] * 9, [0] + [9] * 11 + [0]]


def _by_sequence(sequences, initial_states=None, **kwargs):
    """Every sequence by itself; states before go to a row's first of index 0. The last states of the rows."""
    outputs, finals = [], []
    for row, indices in enumerate(sequences):
        parts = []
        for begin, end, index in plain.stretches(indices):
            start = None
            if initial_states is not None and begin == 0 and index == 0:
                start = initial_states[row, None]
            timed = {k: kwargs[k][row, None, begin:end] for k in ("x", "dt", "B", "C", "z") if k in kwargs}
            out, state = _formula(**{**kwargs, **timed}, initial_states=start)
            parts.append(out[0])
        outputs.append(torch.cat(parts))
        finals.append(state[0])
    return torch.stack(outputs), torch.stack(finals)


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("options", [("D", "z", "dt_bias"), OPTIONS], ids=str)
def test_sequences_by_index(dtype, options):
    tensors = _inputs(dtype, batch=len(SEQUENCES), length=len(SEQUENCES[0]), options=options)
    rows = torch.tensor(SEQUENCES, dtype=torch.int32)
    plain.compare(
        lambda **kwargs: _function(**kwargs, seq_idx=rows),
        lambda **kwargs: _by_sequence(SEQUENCES, **kwargs),
        tensors,
        TOLERANCE[dtype],
        _limits(dtype),
    )


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("offsets", [[0, 5, 12, 13], [0, 5, 5, 13], [0, 3, 11]], ids=str)
def test_states_of_packed_sequences(indexed, final, offsets):
    """They do not hang on `seq_idx`, which keeps the output of one from the next."""
    tensors = _inputs(torch.float32, batch=1, length=13, options=("D", "z", "dt_bias"))
    rows = torch.tensor(SEQUENCES[:1], dtype=torch.int32) if indexed else None
    out, *states = mamba_chunk_scan_combined(
        **tensors,
        chunk_size=8,
        seq_idx=rows,
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        dt_softplus=True,
        return_final_states=final,
        return_varlen_states=True,
    )
    wide = {k: plain.double(v) for k, v in tensors.items()}
    whole = _by_sequence(SEQUENCES[:1] if indexed else [[0] * 13], **wide)
    tolerance = (*TOLERANCE[torch.float32], plain.OUR_FORWARD)
    plain.close(out, whole[0], *tolerance)
    assert len(states) == 1 + final
    if final:
        plain.close(states[0], whole[1], *tolerance)
    assert states[-1].shape == (len(offsets) - 1, 4, 8, 16)
    for state, begin, end in zip(states[-1], offsets[:-1], offsets[1:], strict=True):
        if begin == end:
            assert not state.any()
            continue
        timed = {k: wide[k][:, begin:end] for k in ("x", "dt", "B", "C", "z")}
        plain.close(state, _formula(**{**wide, **timed})[1][0], *tolerance)


def test_the_dtypes_of_states():
    tensors = _inputs(torch.bfloat16, batch=1, length=8, options=())
    options = {"chunk_size": 8, "cu_seqlens": torch.tensor([0, 3, 8]), "return_final_states": True}
    _, final, apart = mamba_chunk_scan_combined(**tensors, **options, return_varlen_states=True)
    assert (final.dtype, apart.dtype) == (torch.float32, torch.bfloat16)
    *_, apart = mamba_chunk_scan_combined(**tensors, **options, return_varlen_states=True, state_dtype=torch.float32)
    assert apart.dtype == torch.float32


def _block(length=21, batch=2, heads=4, dim=8, groups=2, states=16, width=4, mlp=0, model=12, D_wide=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=g)

    inner = heads * dim
    channels = inner + 2 * groups * states
    return {
        "zxbcdt": normal(batch, length, 2 * mlp + inner + channels + heads),
        "conv1d_weight": normal(channels, width),
        "conv1d_bias": normal(channels),
        "dt_bias": normal(heads) - 2,
        "A": -torch.exp(torch.rand(heads, generator=g)),
        "D": normal(heads, dim) if D_wide else normal(heads),
        "rmsnorm_weight": normal(inner),
        "outproj_weight": normal(model, mlp + inner, scale=inner**-0.5),
        "outproj_bias": normal(model),
        "initial_states": normal(batch, heads, dim, states),
    }


def _block_formula(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight=None, outproj_weight=None, outproj_bias=None,
    initial_states=None, *, mlp, groups, dim, before, limit,
):  # fmt: skip
    heads, inner = len(A), len(A) * dim
    gate, held, z, xbc, dt = zxbcdt.split([mlp, mlp, inner, len(conv1d_weight), heads], -1)
    xbc = plain.conv1d(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, "silu")[0].transpose(1, 2)
    x, B, C = xbc.tensor_split([inner, (inner + xbc.shape[-1]) // 2], -1)
    apart = {"x": x.unflatten(-1, (heads, dim)), "B": B.unflatten(-1, (groups, -1)), "C": C.unflatten(-1, (groups, -1))}
    y, state = plain.ssd(**apart, dt=dt, A=A, D=D, dt_bias=dt_bias, start=initial_states, dt_softplus=True, limit=limit)
    y = y.flatten(2)
    if rmsnorm_weight is None:
        y = y * plain.silu(z)
    else:
        y = y if before else y * plain.silu(z)
        weight = rmsnorm_weight.view(groups, -1)
        y = plain.rms(y.unflatten(-1, (groups, -1)), weight, 1e-6).flatten(2)
        y = y * plain.silu(z) if before else y
    y = torch.cat([plain.silu(gate) * held, y], -1)
    return (y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)), state


@pytest.mark.parametrize("length", [1, 2, 40])
@pytest.mark.parametrize("D_wide", [False, True])
@pytest.mark.parametrize("mlp", [0, 6])
@pytest.mark.parametrize(
    "left_out",
    [(), ("rmsnorm_weight",), ("outproj_weight", "outproj_bias"), ("outproj_bias", "initial_states")],
    ids=str,
)
def test_the_block(length, D_wide, mlp, left_out):
    before, limit, dim = length == 1, (0.0, 0.5) if mlp else (0.0, math.inf), 8
    tensors = {k: v for k, v in _block(length, mlp=mlp, D_wide=D_wide).items() if k not in left_out}
    options = {"chunk_size": 16, "headdim": None if D_wide else dim, "ngroups": 2, "norm_before_gate": before}
    plain.compare(
        lambda **kwargs: mamba_split_conv1d_scan_combined(
            **kwargs, **options, dt_limit=limit, return_final_states=True
        ),
        lambda **kwargs: _block_formula(**kwargs, mlp=mlp, groups=2, dim=dim, before=before, limit=limit),
        tensors,
        TOLERANCE[torch.float32],
    )


def test_the_block_keeps_sequences_apart():
    """As every sequence alone, the convolution's past too."""
    tensors = {k: v for k, v in _block(13, batch=1).items() if k != "initial_states"}
    options = {"chunk_size": 16, "headdim": 8, "ngroups": 2}
    rows = torch.tensor(SEQUENCES[:1], dtype=torch.int32)
    out = mamba_split_conv1d_scan_combined(**tensors, **options, seq_idx=rows)
    for begin, end, _ in plain.stretches(SEQUENCES[0]):
        alone = {**tensors, "zxbcdt": tensors["zxbcdt"][:, begin:end]}
        plain.close(out[:, begin:end], mamba_split_conv1d_scan_combined(**alone, **options), 1e-5, 1e-6)
