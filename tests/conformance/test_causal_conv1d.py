"""causal_conv1d's functions over the grid of its own tests."""

from __future__ import annotations

import pytest
import torch

from fastlvm.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states

from . import plain

TOLERANCE = {torch.float32: (3e-4, 1e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (1e-2, 5e-2)}
WEIGHTS = {"weight": (1e-3, 1e-3), "bias": (1e-3, 1e-3)}
LENGTHS = [1, 2, 3, 4, 5, 6, 7, 8, 16, 129, 372]


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _inputs(dtype, batch=2, channels=40, length=33, width=4, bias=True, past=False, channel_last=False):
    x = _normal(batch, channels, length)
    if channel_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    tensors = {"x": x.to(dtype), "weight": _normal(channels, width, seed=1)}
    if bias:
        tensors["bias"] = _normal(channels, seed=2)
    if past:
        tensors["past"] = _normal(batch, channels, width - 1, seed=3).to(dtype)
    return tensors


def _check(tensors, dtype, activation, final=False):
    def function(past=None, **kwargs):
        return causal_conv1d_fn(**kwargs, initial_states=past, return_final_states=final, activation=activation)

    def formula(**kwargs):
        y, state = plain.conv1d(**kwargs, activation=activation)
        return (y, state) if final else y

    plain.compare(function, formula, tensors, TOLERANCE[dtype], WEIGHTS)


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_lengths_and_widths(dtype, length, width):
    _check(_inputs(dtype, length=length, width=width), dtype, "silu")


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channel_last", [False, True])
def test_options(activation, bias, channel_last):
    _check(_inputs(torch.float32, bias=bias, channel_last=channel_last), torch.float32, activation)


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 17])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_states_in_and_out(dtype, length, past, final):
    _check(_inputs(dtype, length=length, past=past, channel_last=True), dtype, "silu", final)


@pytest.mark.parametrize("width", [1, 7])
def test_widths_the_original_has_not(width):
    _check(_inputs(torch.float32, width=width, past=True), torch.float32, "silu", final=True)


SEQUENCES = [[0] * 11, [0, 0, 1, 2, 2, 2, 2, 5, 5, 7, 7], [3, 3, 3, 3, 0, 0, -1, -1, -1, 1, 1], [-1] * 3 + [4] * 8]


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("past", [False, True])
def test_sequences_by_index(dtype, activation, integer, past):
    """Every row has other sequences; negative indices are padding. What came before is the first one's past."""
    rows = torch.tensor(SEQUENCES, dtype=integer)

    def function(past=None, **kwargs):
        return causal_conv1d_fn(**kwargs, seq_idx=rows, initial_states=past, activation=activation)

    def formula(x, weight, bias, past=None):
        lines = []
        for i, indices in enumerate(SEQUENCES):
            parts = []
            for begin, end, index in plain.stretches(indices):
                start = None if past is None or begin else past[i, None]
                out, _ = plain.conv1d(x[i, None, :, begin:end], weight, bias, activation, start)
                parts.append(out[0] * (index >= 0))
            lines.append(torch.cat(parts, dim=-1))
        return torch.stack(lines)

    plain.compare(
        function,
        formula,
        _inputs(dtype, batch=len(SEQUENCES), length=len(SEQUENCES[0]), past=past),
        TOLERANCE[dtype],
        WEIGHTS,
    )


def _update_formula(line, state, weight, bias, activation):
    """Output of inputs [b, D, L] after states [b, D, K], and all inputs [b, D, K + L]."""
    line, state, weight, bias = (M.double() for M in (line, state, weight, bias))
    past = state[..., state.shape[-1] - weight.shape[1] + 1 :]
    return plain.conv1d(line, weight, bias, activation, past)[0], torch.cat([state, line], dim=-1)


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("length", [None, 1, 2, 4, 5, 9])
@pytest.mark.parametrize("width, places", [(2, 1), (3, 5), (4, 3), (4, 4)])
def test_an_update_moves_the_state_on(dtype, length, width, places):
    tensors = _inputs(dtype, length=length or 1, width=width)
    x = tensors["x"][..., 0] if length is None else tensors["x"]
    state = _normal(2, 40, places, seed=5).to(dtype)
    args = (tensors["weight"], tensors["bias"], "silu")
    expected, line = _update_formula(tensors["x"], state, *args)
    out = causal_conv1d_update(x, state, *args)
    assert out.shape == x.shape and out.dtype == dtype
    plain.close(out, expected.reshape(x.shape), *TOLERANCE[dtype])
    assert torch.equal(state.double(), line[..., line.shape[-1] - places :])


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("length", [None, 1, 3, 5, 12])
@pytest.mark.parametrize("places", [3, 4, 7])
@pytest.mark.parametrize("chosen", [False, True])
def test_an_update_of_a_ring(dtype, length, places, chosen):
    """The place of an input is its number modulo the size of the ring."""
    tensors, batch = _inputs(dtype, batch=3, length=length or 1), 3
    x = tensors["x"][..., 0] if length is None else tensors["x"]
    pool = _normal(8 if chosen else batch, 40, places, seed=5).to(dtype)
    indices = torch.tensor([6, 0, 3] if chosen else [0, 1, 2], dtype=torch.int32)
    seen = torch.tensor([0, places - 1, 5 * places + 2], dtype=torch.int32)
    before, args = pool.clone(), (tensors["weight"], tensors["bias"], "silu")
    out = causal_conv1d_update(x, pool, *args, seen, indices if chosen else None)
    for row, (number, index) in enumerate(zip(seen.tolist(), indices.tolist(), strict=True)):
        order = [(number + k) % places for k in range(places)]  # the oldest input of the ring first
        expected, line = _update_formula(tensors["x"][row, None], before[index, None, :, order], *args)
        plain.close(out[row], expected[0].reshape(x[row].shape), *TOLERANCE[dtype])
        ring = [(number + (length or 1) + k) % places for k in range(places)]
        assert torch.equal(pool[index][:, ring].double(), line[0, :, line.shape[-1] - places :])
    others = [i for i in range(len(pool)) if i not in indices.tolist()]
    assert torch.equal(pool[others], before[others])


@pytest.mark.parametrize("length", [None, 1, 6])
def test_an_update_of_chosen_states_with_padding(length):
    tensors = _inputs(torch.float32, batch=4, length=length or 1)
    x = tensors["x"][..., 0] if length is None else tensors["x"]
    pool, indices = _normal(9, 40, 4, seed=5), torch.tensor([5, -1, 0, -3], dtype=torch.int32)
    before, args = pool.clone(), (tensors["weight"], tensors["bias"], "silu")
    out = causal_conv1d_update(x, pool, *args, conv_state_indices=indices)
    for row, index in enumerate(indices.tolist()):
        if index < 0:
            assert not out[row].any()
            continue
        expected, line = _update_formula(tensors["x"][row, None], before[index, None], *args)
        plain.close(out[row], expected[0].reshape(x[row].shape), *TOLERANCE[torch.float32], plain.OUR_FORWARD)
        assert torch.equal(pool[index].double(), line[0, :, -4:])
    others = [i for i in range(9) if i not in indices.tolist()]
    assert torch.equal(pool[others], before[others])


@pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)
@pytest.mark.parametrize("state_len", [1, 3, 8])
def test_states_of_packed_sequences(dtype, state_len):
    offsets, x = [0, 1, 1, 6, 19, 20], _normal(20, 12).to(dtype)
    states = causal_conv1d_varlen_states(x, torch.tensor(offsets, dtype=torch.int32), state_len)
    assert states.shape == (5, 12, state_len) and states.dtype == dtype
    for state, begin, end in zip(states, offsets[:-1], offsets[1:], strict=True):
        last = x[max(begin, end - state_len) : end]
        assert torch.equal(state[:, state_len - len(last) :], last.T)
        assert not state[:, : state_len - len(last)].any()
