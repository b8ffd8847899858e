"""What the stand-ins write in place, hand back by the same object, and refuse."""

from __future__ import annotations

import re

import pytest
import torch

from fastlvm.compat import causal_conv1d, mamba_ssm
from fastlvm.errors import InputError


def _n(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _scan(**changes):
    tensors = {"u": _n(2, 4, 6), "delta": _n(2, 4, 6), "A": -_n(4, 3).exp(), "B": _n(2, 3, 6), "C": _n(2, 3, 6)}
    return mamba_ssm.selective_scan_fn(**{**tensors, **changes})


def _ssd(**changes):
    tensors = {"x": _n(2, 6, 4, 3), "dt": _n(2, 6, 4), "A": -_n(4).exp(), "B": _n(2, 6, 2, 5), "C": _n(2, 6, 2, 5)}
    return mamba_ssm.mamba_chunk_scan_combined(**{**tensors, "chunk_size": 4, **changes})


def _split(**changes):
    tensors = {"zxbcdt": _n(2, 6, 12 + 32 + 4), "conv1d_weight": _n(32, 4), "conv1d_bias": _n(32), "dt_bias": _n(4)}
    tensors |= {"A": -_n(4).exp(), "D": _n(4), "chunk_size": 4, "headdim": 3, "ngroups": 2}
    return mamba_ssm.mamba_split_conv1d_scan_combined(**{**tensors, **changes})


def _update(**changes):
    tensors = {"state": _n(2, 4, 3), "x": _n(2, 4), "dt": _n(2, 4), "A": -_n(4, 3).exp(), "B": _n(2, 3), "C": _n(2, 3)}
    return mamba_ssm.selective_state_update(**{**tensors, **changes})


def _inner(**changes):
    tensors = {"xz": _n(2, 8, 6), "conv1d_weight": _n(4, 1, 4), "conv1d_bias": _n(4), "x_proj_weight": _n(2 + 6, 4)}
    tensors |= {"delta_proj_weight": _n(4, 2), "out_proj_weight": _n(5, 4), "out_proj_bias": None, "A": -_n(4, 3).exp()}
    return mamba_ssm.mamba_inner_fn(**{**tensors, **changes})


def _conv(**changes):
    return causal_conv1d.causal_conv1d_fn(**{"x": _n(2, 4, 6), "weight": _n(4, 3), **changes})


def _conv_update(**changes):
    tensors = {"x": _n(2, 4, 6), "conv_state": _n(2, 4, 3), "weight": _n(4, 3)}
    return causal_conv1d.causal_conv1d_update(**{**tensors, **changes})


def _varlen(x=None, offsets=(0, 3, 5)):
    x = _n(5, 4) if x is None else x
    return causal_conv1d.causal_conv1d_varlen_states(x, torch.tensor(offsets, dtype=torch.int32), 3)


def _rms(**changes):
    return mamba_ssm.rms_norm_fn(**{"x": _n(2, 6), "weight": _n(6), "bias": None, **changes})


def _gated(**changes):
    return mamba_ssm.rmsnorm_fn(**{"x": _n(2, 6), "weight": _n(6), "bias": None, **changes})


ROWS = torch.zeros(2, 6, dtype=torch.int32)
COMPLEX = torch.zeros(4, 3, dtype=torch.complex64)
REFUSED = [
    (_scan, {"A": COMPLEX}, "selective_scan_fn: A is complex; fastlvm has the real scan only, pass a real A"),
    (_scan, {"B": _n(2, 3, 5)}, "B has shape (2, 3, 5)"),
    (_inner, {"A": COMPLEX}, "mamba_inner_fn: A is complex"),
    (_inner, {"checkpoint_lvl": 2}, "checkpoint_lvl is 2; wants 0 or 1"),
    (_inner, {"B": _n(4, 3), "x_proj_weight": _n(5, 4), "b_rms_weight": _n(3)}, "b_rms_weight goes with what depends"),
    (_update, {"A": COMPLEX}, "selective_state_update: A is complex"),
    (_update, {"x": _n(2, 5)}, "x has shape (2, 1, 5); wants (b, h, dim) = (2, 1, 4)"),
    (_update, {"B": _n(2, 2, 3), "C": _n(2, 2, 3)}, "B has 2 groups; wants a number that divides the 1 heads"),
    (_update, {"state_batch_indices": torch.tensor([0, 2])}, "got 2, wants less than 2"),
    (_update, {"state_batch_indices": torch.tensor([1, 1])}, "got 1 twice"),
    (_ssd, {"return_varlen_states": True}, "return_varlen_states is set without cu_seqlens"),
    (_ssd, {"return_varlen_states": True, "cu_seqlens": torch.tensor([0, 6])}, "x has batch size 2; wants 1"),
    (_ssd, {"seq_idx": ROWS[:, :5]}, "seq_idx has shape (2, 5); wants (B, L) = (2, 6)"),
    (_ssd, {"seq_idx": ROWS.float()}, "seq_idx is torch.float32; wants torch.int32"),
    (_ssd, {"seq_idx": ROWS, "B": _n(3, 4, 2, 5)}, "B has shape (3, 4, 2, 5); wants (2, 6) first"),
    (_ssd, {"seq_idx": ROWS, "initial_states": _n(2, 4, 3, 4)}, "initial_states has shape (2, 4, 3, 4)"),
    (_ssd, {"dt_limit": (0.2, 0.1)}, "dt_limit is (0.2, 0.1)"),
    (_split, {"headdim": None}, "headdim is None"),
    (_split, {"activation": "gelu"}, "activation is 'gelu'"),
    (_split, {"outproj_bias": _n(5)}, "outproj_bias is given without outproj_weight"),
    (_split, {"ngroups": 3}, "ngroups is 3; wants a number that divides the 4 heads"),
    (_split, {"zxbcdt": _n(2, 6, 47)}, "zxbcdt has shape (2, 6, 47)"),
    (_conv, {"activation": "relu"}, 'causal_conv1d_fn: activation is \'relu\'; wants None, "silu" or "swish"'),
    (_conv, {"seq_idx": ROWS, "initial_states": _n(2, 4, 3)}, "initial_states has shape (2, 4, 3)"),
    (_conv, {"seq_idx": ROWS, "return_final_states": True}, "seq_idx and return_final_states exclude each other"),
    (_conv, {"return_final_states": True, "final_states_out": _n(2, 4, 3)}, "final_states_out has shape (2, 4, 3)"),
    (_conv_update, {"activation": "relu"}, "causal_conv1d_update: activation is 'relu'"),
    (_conv_update, {"conv_state": _n(2, 4, 1)}, "conv_state has shape (2, 4, 1)"),
    (_conv_update, {"conv_state": _n(3, 4, 3)}, "conv_state has shape (3, 4, 3)"),
    (_conv_update, {"cache_seqlens": torch.zeros(3, dtype=torch.int32)}, "cache_seqlens has shape (3,)"),
    (_conv_update, {"conv_state_indices": torch.tensor([0, 5])}, "got 5, wants less than 2"),
    (_varlen, {"offsets": (0, 3, 6)}, "cu_seqlens are not offsets into 5 tokens"),
    (_varlen, {"offsets": (0, 4, 3)}, "cu_seqlens are not offsets into 5 tokens"),
    (_varlen, {"x": _n(1, 5, 4)}, "x and cu_seqlens have shapes (1, 5, 4) and (3,)"),
    (_rms, {"x1": _n(2, 6)}, "rms_norm_fn: x1 is given; fastlvm has no parallel norm"),
    (_rms, {"return_dropout_mask": True}, "return_dropout_mask is set"),
    (_rms, {"residual": _n(2, 5)}, "residual has shape (2, 5)"),
    (_gated, {"group_size": 4}, "group_size is 4; wants a number that divides the 6 channels"),
    (_gated, {"z": _n(2, 5)}, "z has shape (2, 5)"),
]
UNSUPPORTED = ("complex", "activation", "x1", "return_dropout_mask")


@pytest.mark.parametrize("call, changes, message", REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_refused_is_named_in_one_sentence(call, changes, message):
    call()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call(**changes)
    text = str(caught.value)
    assert "\n" not in text
    if any(word in message for word in UNSUPPORTED):
        assert isinstance(caught.value, InputError) and isinstance(caught.value, NotImplementedError)


def test_a_refused_update_leaves_the_states():
    places = {_update: ("state", "state_batch_indices"), _conv_update: ("conv_state", "conv_state_indices")}
    for call, (name, indices) in places.items():
        state = _n(2, 4, 3)
        before = state.clone()
        with pytest.raises(ValueError, match="got 7"):
            call(**{name: state, indices: torch.tensor([0, 7])})
        assert torch.equal(state, before)


def test_final_states_go_where_they_are_wanted():
    place = torch.full((2, 4, 2), torch.nan)
    x = _n(2, 4, 6).requires_grad_()
    out, final = _conv(x=x, return_final_states=True, final_states_out=place)
    assert final is place
    assert torch.equal(place, x[:, :, -2:])
    final.sum().backward()
    assert torch.equal(x.grad, torch.cat([torch.zeros(2, 4, 4), torch.ones(2, 4, 2)], dim=2))
    assert torch.equal(out, _conv(x=x))


def test_a_place_for_final_states_is_left_alone_unless_they_are_wanted():
    place = torch.full((2, 4, 2), 7.0)
    assert torch.equal(_conv(final_states_out=place), _conv())
    assert (place == 7).all()


def test_updates_write_through_views_and_hand_nothing_else_back():
    pool = _n(5, 4, 8)
    view, outside = pool[1:3, :, 2:5], pool.clone()
    assert isinstance(_update(state=view), torch.Tensor)
    assert not torch.equal(pool[1:3, :, 2:5], outside[1:3, :, 2:5])
    pool[1:3, :, 2:5] = outside[1:3, :, 2:5]
    assert torch.equal(pool, outside)
    _conv_update(conv_state=view)
    assert torch.equal(view, _n(2, 4, 6)[:, :, -3:])


@pytest.mark.parametrize("call", [_update, _conv_update], ids=lambda f: f.__name__)
def test_updates_take_parameters_that_want_gradients(call):
    """As the originals do: a step in a training loop has no gradient, and no error."""
    name = "A" if call is _update else "weight"
    parameter = (-_n(4, 3).exp()).requires_grad_()
    assert not call(**{name: parameter}).requires_grad


def test_inputs_are_not_written():
    tensors = {"x": _n(1, 6, 4, 3), "dt": _n(1, 6, 4), "B": _n(1, 6, 2, 5), "C": _n(1, 6, 2, 5)}
    copies = {k: v.clone() for k, v in tensors.items()}
    _ssd(**tensors, cu_seqlens=torch.tensor([0, 2, 6]), return_varlen_states=True, dt_limit=(0.1, 0.5))
    assert all(torch.equal(tensors[k], copies[k]) for k in tensors)


@pytest.mark.parametrize("call", [_scan, _inner, _ssd, _split, _conv, _update, _conv_update], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_outputs_have_the_dtype_of_the_input(call, dtype, monkeypatch):
    plain = _n
    monkeypatch.setitem(globals(), "_n", lambda *shape: plain(*shape).to(dtype))
    assert call().dtype == dtype


@pytest.mark.parametrize("lengths", [(0,), (3, 0)], ids=str)
def test_empty_batches(lengths):
    batch, length = lengths[0], lengths[-1]
    x, rows = torch.zeros(batch, 4, length), torch.zeros(batch, length, dtype=torch.int32)
    assert causal_conv1d.causal_conv1d_fn(x, _n(4, 3), seq_idx=rows).shape == x.shape
    x, B = torch.zeros(batch, length, 4, 1), torch.zeros(batch, length, 2, 5)
    args = (x, x[..., 0], -_n(4).exp(), B, B, 4)
    out, state = mamba_ssm.mamba_chunk_scan_combined(*args, seq_idx=rows, return_final_states=True)
    assert out.shape == x.shape and state.shape == (batch, 4, 1, 5)
