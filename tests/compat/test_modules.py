"""Mamba, Mamba2 and Block: a step is the forward of one token, states are kept, parameters are the originals'."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle

import pytest
import torch
from torch import nn

from fastlvm.compat.mamba_ssm import Block, InferenceParams, Mamba, Mamba2, RMSNorm
from fastlvm.errors import InputError

DIM, BATCH, LENGTH = 24, 2, 9
MAMBA = [{}, {"d_state": 128, "d_conv": 2}, {"d_conv": 3, "dt_rank": 5, "bias": True, "conv_bias": False, "expand": 3}]
MAMBA2 = [
    {"headdim": 8},
    {"headdim": 8, "ngroups": 3, "d_state": 16, "norm_before_gate": True},
    {"headdim": 8, "rmsnorm": False, "D_has_hdim": True, "d_conv": 2, "bias": True},
    {"headdim": 4, "d_ssm": 16, "ngroups": 2, "d_state": 8, "conv_bias": False, "conv_init": 0.5},
    {"headdim": 8, "dt_limit": (0.02, 0.05), "d_state": 8, "expand": 1},
]
MIXERS = [(Mamba, options) for options in MAMBA] + [(Mamba2, options) for options in MAMBA2]
every_mixer = pytest.mark.parametrize("kind, options", MIXERS, ids=lambda v: str(getattr(v, "__name__", v)))
each_kind = pytest.mark.parametrize("kind, options", [MIXERS[0], MIXERS[3]], ids=["Mamba", "Mamba2"])


def _mixer(kind, options, dtype=torch.float32, **more):
    torch.manual_seed(0)
    mixer = kind(DIM, **options, **more)
    with torch.no_grad():
        for parameter in mixer.parameters():  # D and norms start as ones, which would hide a mistake
            if parameter.std() == 0:
                parameter.uniform_(0.5, 1.5)
    return mixer.to(dtype)


def _inputs(length=LENGTH, batch=BATCH, dtype=torch.float32):
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


@every_mixer
@torch.no_grad()
def test_steps_are_the_forward(kind, options):
    mixer, x = _mixer(kind, options, torch.float64), _inputs(dtype=torch.float64)
    conv_state, ssm_state = mixer.allocate_inference_cache(BATCH, LENGTH)
    outputs = []
    for t in range(LENGTH):
        out, conv, ssm = mixer.step(x[:, t : t + 1], conv_state, ssm_state)
        assert conv is conv_state and ssm is ssm_state
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x), rtol=1e-9, atol=1e-12)


@every_mixer
@pytest.mark.parametrize("prompt", [1, 2, 6])
def test_a_prompt_and_steps_after_it_are_the_forward(kind, options, prompt):
    """In grad mode too, as the originals allow; the states take no part in it."""
    mixer, x = _mixer(kind, options, torch.float64, layer_idx=3), _inputs(dtype=torch.float64)
    cache = InferenceParams(max_seqlen=LENGTH, max_batch_size=BATCH)
    outputs = [mixer(x[:, :prompt], inference_params=cache)]
    states = cache.key_value_memory_dict[3]
    for t in range(prompt, LENGTH):
        cache.seqlen_offset = t
        outputs.append(mixer(x[:, t : t + 1], inference_params=cache))
    assert cache.key_value_memory_dict[3] is states
    assert not any(state.requires_grad for state in states)
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x), rtol=1e-9, atol=1e-12)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_steps_in_sixteen_bits_stay_near_the_forward(kind, options, dtype):
    mixer, x = _mixer(kind, options, dtype), _inputs(dtype=dtype)
    states = mixer.allocate_inference_cache(BATCH, LENGTH)
    assert {state.dtype for state in states} == {dtype}
    out = torch.cat([mixer.step(x[:, t : t + 1], *states)[0] for t in range(LENGTH)], 1)
    whole = mixer(x)
    assert whole.dtype == dtype
    torch.testing.assert_close(out, whole, rtol=3e-2, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("options", MAMBA2, ids=str)
@torch.no_grad()
def test_packed_prompts_are_each_sequence_alone(options):
    mixer, offsets = _mixer(Mamba2, options, torch.float64, layer_idx=0), [0, 2, 3, 9]
    x = _inputs(batch=1, dtype=torch.float64)
    rows = torch.tensor([[0] * 2 + [1] + [2] * 6], dtype=torch.int32)
    cache = InferenceParams(LENGTH, 3)
    out = mixer(x, seq_idx=rows, cu_seqlens=torch.tensor(offsets, dtype=torch.int32), inference_params=cache)
    torch.testing.assert_close(mixer(x, seq_idx=rows), out)
    cache.seqlen_offset = 1
    next_out = mixer(_inputs(1, 3, torch.float64), inference_params=cache)
    for i, (begin, end) in enumerate(itertools.pairwise(offsets)):
        alone = torch.cat([x[:, begin:end], _inputs(1, 3, torch.float64)[i, None]], 1)
        both = torch.cat([out[:, begin:end], next_out[i, None]], 1)
        torch.testing.assert_close(both, mixer(alone), rtol=1e-9, atol=1e-12)


def test_rows_may_come_as_one_axis():
    mixer, x = _mixer(*MIXERS[3]), _inputs()
    out = mixer(x.flatten(0, 1), seqlen=LENGTH)
    torch.testing.assert_close(out, mixer(x).flatten(0, 1))


NAMES = {
    Mamba: {
        "A_log": (48, 16),
        "D": (48,),
        "in_proj.weight": (96, 24),
        "conv1d.weight": (48, 1, 4),
        "conv1d.bias": (48,),
        "x_proj.weight": (2 + 32, 48),
        "dt_proj.weight": (48, 2),
        "dt_proj.bias": (48,),
        "out_proj.weight": (24, 48),
    },
    Mamba2: {
        "dt_bias": (6,),
        "A_log": (6,),
        "D": (6,),
        "in_proj.weight": (2 * 48 + 2 * 128 + 6, 24),
        "conv1d.weight": (48 + 256, 1, 4),
        "conv1d.bias": (48 + 256,),
        "norm.weight": (48,),
        "out_proj.weight": (24, 48),
    },
}


@each_kind
def test_names_and_shapes_of_parameters(kind, options):
    mixer = kind(DIM, **options)
    assert {name: tuple(x.shape) for name, x in mixer.state_dict().items()} == NAMES[kind]
    decayed = {name for name, p in mixer.named_parameters() if not getattr(p, "_no_weight_decay", False)}
    assert decayed == set(NAMES[kind]) - {"A_log", "D", "dt_bias"}


@each_kind
def test_every_parameter_has_a_gradient(kind, options):
    mixer, x = _mixer(kind, options), _inputs().requires_grad_()
    mixer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixer.parameters())
    assert x.grad.abs().sum() > 0


@each_kind
def test_step_sizes_start_between_their_bounds(kind, options):
    mixer = kind(200, **options, dt_min=0.01, dt_max=0.02)
    bias = mixer.dt_proj.bias if kind is Mamba else mixer.dt_bias
    steps = nn.functional.softplus(bias)
    assert 0.0099 < steps.min() < steps.max() < 0.0201


@each_kind
def test_dtypes_of_parameters(kind, options):
    """D stays in float32, and Mamba's A_log."""
    wide = {"D", "A_log"} if kind is Mamba else {"D"}
    for name, parameter in kind(DIM, **options, dtype=torch.bfloat16).named_parameters():
        assert parameter.dtype == (torch.float32 if name in wide else torch.bfloat16), name


@each_kind
def test_copies_and_pickles(kind, options):
    mixer, x = _mixer(kind, options), _inputs()
    for other in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):  # noqa: S301
        assert torch.equal(other(x), mixer(x))


@each_kind
def test_autocast(kind, options):
    mixer, x = _mixer(kind, options), _inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), mixer(x), rtol=5e-2, atol=2e-2)


@each_kind
def test_what_a_mixer_refuses(kind, options):
    mixer = kind(DIM, **options)
    with pytest.raises(InputError, match="step got 9 tokens"):
        mixer.step(_inputs(), *mixer.allocate_inference_cache(BATCH, LENGTH))
    with pytest.raises(InputError, match="no layer_idx"):
        mixer(_inputs(), inference_params=InferenceParams(LENGTH, BATCH))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"process_group": object()}, "process_group is given"),
        ({"headdim": 7}, "48 channels; wants a multiple of headdim, 7"),
        ({"headdim": 8, "d_ssm": 64}, "64 channels; wants a multiple of headdim, 8, of at most 48"),
        ({"headdim": 8, "ngroups": 4}, "ngroups is 4; wants a number that divides the 6 heads"),
        ({"headdim": 8, "A_init_range": (0, 1)}, "A_init_range"),
    ],
)
def test_what_mamba2_is_not_made_of(options, message):
    with pytest.raises(InputError, match=message):
        Mamba2(DIM, **options)


def test_an_unknown_start_of_dt():
    with pytest.raises(InputError, match="dt_init is 'zeros'"):
        Mamba(DIM, dt_init="zeros")


class Mlp(nn.Sequential):
    def __init__(self, dim):
        super().__init__(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))


@pytest.mark.parametrize("mlp", [nn.Identity, Mlp])
@pytest.mark.parametrize("norm", [nn.LayerNorm, RMSNorm])
def test_a_block_is_the_same_fused_or_not(mlp, norm):
    torch.manual_seed(0)
    make = functools.partial(Block, DIM, functools.partial(Mamba, layer_idx=0), mlp, norm)
    plain, fused = make(), make(fused_add_norm=True, residual_in_fp32=True)
    fused.load_state_dict(plain.state_dict())
    x, residual = _inputs(), 2 * _inputs()
    for before in (None, residual):
        wanted = plain(x, before)
        if mlp is nn.Identity:
            total = x if before is None else x + before
            torch.testing.assert_close(wanted[1], total)
            torch.testing.assert_close(wanted[0], plain.mixer(plain.norm(total)))
        torch.testing.assert_close(fused(x, before), wanted, rtol=1e-4, atol=1e-5)


def test_a_block_keeps_its_sum_in_float32():
    block = Block(DIM, Mamba, nn.Identity, RMSNorm, residual_in_fp32=True).bfloat16()
    out, residual = block(_inputs(dtype=torch.bfloat16))
    assert (out.dtype, residual.dtype) == (torch.bfloat16, torch.float32)


def test_a_block_hands_on_what_its_mixer_takes():
    block = Block(DIM, functools.partial(Mamba2, headdim=8), nn.Identity, RMSNorm)
    rows = torch.tensor([[0] * 4 + [1] * 5] * BATCH, dtype=torch.int32)
    out, _ = block(_inputs(), seq_idx=rows)
    alone, _ = block(_inputs()[:, 4:])
    torch.testing.assert_close(out[:, 4:], alone)
    states = block.allocate_inference_cache(3, LENGTH, dtype=torch.float16)
    assert [tuple(state.shape) for state in states] == [(3, 48 + 256, 4), (3, 6, 8, 128)]
    assert {state.dtype for state in states} == {torch.float16}


def test_a_fused_block_needs_a_norm_it_knows():
    with pytest.raises(InputError, match="norm_cls makes a Identity"):
        Block(DIM, Mamba, nn.Identity, nn.Identity, fused_add_norm=True)


def test_inference_params_begin_again():
    cache = InferenceParams(8, 2, seqlen_offset=5, lengths_per_sample=torch.tensor([3, 5]))
    cache.reset(16, 4)
    assert (cache.max_seqlen, cache.max_batch_size, cache.seqlen_offset) == (16, 4, 0)
    assert not cache.lengths_per_sample.any()
