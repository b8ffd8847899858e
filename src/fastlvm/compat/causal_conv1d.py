"""causal_conv1d (Dao-AILab), its functions with the same arguments, through fastlvm's ops.

`fastlvm.compat.install()` lets `import causal_conv1d` find them. They run on every device and layout that the ops run
on, take any width of filter, and float64 throughout beside the dtypes of the original.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlvm import __version__ as _fastlvm
from fastlvm.compat._checks import before_first, check_activation, check_seq_idx, check_shape, one_row, runs
from fastlvm.errors import InputError
from fastlvm.ops import _step, causal_conv1d, causal_conv1d_step

__version__ = f"1.7.0+fastlvm.{_fastlvm}"  # whose signatures these are, and where the code comes from

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """Convolve every channel with its own filter over the past, with gradients, those of the states included.

    Args:
        x: [B, D, L].
        weight: [D, W], the newest input last.
        bias: [D].
        seq_idx: [B, L], int32: neighbours of the same index are one sequence, which sees nothing before it. A negative
            index is padding, whose output is zero.
        initial_states: the W-1 inputs before x, [B, D, W-1]; with `seq_idx` before the first sequence of a row.
        return_final_states: also return the last W-1 inputs; not together with `seq_idx`.
        final_states_out: [B, D, W-1], written and returned as the final states.
        activation: None, "silu" or "swish".

    Returns:
        [B, D, L] in x's dtype, or a pair of it and the final states [B, D, W-1].

    Raises:
        InputError: arguments that exclude each other, or an unknown activation (a NotImplementedError, too).
        TypeError, ValueError: as `fastlvm.causal_conv1d`.
    """
    op = "causal_conv1d_fn"
    check_activation(op, activation)
    if seq_idx is None or 0 in x.shape:
        result = causal_conv1d(x, weight, bias, activation, initial_states, bool(return_final_states))
        if not return_final_states or final_states_out is None:
            return result
        out, final = result
        check_shape(op, "final_states_out", final_states_out, "(B, D, W-1)", tuple(final.shape))
        return out, final_states_out.copy_(final)
    if return_final_states:
        raise InputError(f"{op}: seq_idx and return_final_states exclude each other; read them off x")
    batch, channels, length = x.shape
    check_seq_idx(op, seq_idx, batch, length)
    packed, start = runs(seq_idx), None
    if initial_states is not None:
        check_shape(op, "initial_states", initial_states, "(B, D, W-1)", (batch, channels, weight.shape[-1] - 1))
        start = before_first(initial_states, packed)
    row = one_row(x.transpose(1, 2)).transpose(1, 2)  # [1, D, B·L]
    out = causal_conv1d(row, weight, bias, activation, start, cu_seqlens=packed.offsets)
    out = out.transpose(1, 2).reshape(batch, length, channels).transpose(1, 2)
    padding = seq_idx < 0
    return out.masked_fill(padding[:, None], 0) if padding.any() else out


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve the next inputs and push them into the states in place; without gradients.

    Args:
        x: [b, D], or [b, D, L] for L inputs at once.
        conv_state: inputs before x, [S, D, K] with K at least W-1, written. S is b unless there are indices.
        weight: [D, W], the newest input last.
        bias: [D].
        activation: None, "silu" or "swish".
        cache_seqlens: [b], int32, the number of inputs each state has seen: it is a ring then, the next input goes to
            place `cache_seqlens % K`. Without it the newest input is last and all move on.
        conv_state_indices: [b], int32: row i has the state of that index. A negative one is padding: its output is zero
            and no state is touched.

    Returns:
        The shape and dtype of x.

    Raises:
        InputError: an array does not fit, or an unknown activation (a NotImplementedError, too).
        TypeError, ValueError: as `fastlvm.causal_conv1d_step`.
    """
    op = "causal_conv1d_update"
    check_activation(op, activation)
    if cache_seqlens is None and (x.ndim == 2 or (x.ndim == 3 and x.shape[2] == 1)):
        out = causal_conv1d_step(x.flatten(1), conv_state, weight, bias, activation, conv_state_indices)
        return out.view_as(x) if x.ndim == 3 else out
    line = x[:, :, None] if x.ndim == 2 else x
    _check_update(op, line, conv_state, weight, cache_seqlens, conv_state_indices)
    args = (weight, bias, activation)
    if conv_state_indices is None:
        out = _advance(line, conv_state, cache_seqlens, *args)
    else:
        kept = (conv_state_indices >= 0).nonzero()[:, 0]
        rows = conv_state_indices.long()[kept]
        state = conv_state[rows]  # a copy
        seen = None if cache_seqlens is None else cache_seqlens[kept]
        out = torch.zeros_like(line)
        out[kept] = _advance(line[kept], state, seen, *args)
        conv_state[rows] = state
    return out[:, :, 0] if x.ndim == 2 else out


def _check_update(
    op: str, x: Tensor, state: Tensor, weight: Tensor, cache_seqlens: Tensor | None, indices: Tensor | None
) -> None:
    if x.ndim != 3 or state.ndim != 3:
        raise InputError(f"{op}: x has {x.ndim} dimensions, conv_state {state.ndim}; wants 2 or 3, and 3")
    batch, channels, _ = x.shape
    places, width = state.shape[2], weight.shape[-1]
    check_shape(op, "weight", weight, "(D, W)", (channels, width))
    states = batch if indices is None else len(state)
    check_shape(op, "conv_state", state, "(S, D, W-1 or more)", (states, channels, max(places, width - 1)))
    check_shape(op, "cache_seqlens", cache_seqlens, "(b,)", (batch,))
    check_shape(op, "conv_state_indices", indices, "(b,)", (batch,))
    _step.check_values(op, state, indices)


def _advance(
    x: Tensor, state: Tensor, seen: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """The output for x [b, D, L]; `state` [b, D, K] moves on, as a ring where `seen` [b] tells its next place."""
    (_, channels, length), places, width = x.shape, state.shape[2], weight.shape[1]
    if seen is None:
        past = state[:, :, places - (width - 1) :]
        line = torch.cat([state, x.to(state.dtype)], dim=2)
        out: Tensor = causal_conv1d(x, weight, bias, activation, past)
        state.copy_(line[:, :, length:])
        return out
    past = state.gather(2, _ring(seen, torch.arange(1 - width, 0, device=x.device), places, channels))
    out = causal_conv1d(x, weight, bias, activation, past)
    ahead = torch.arange(max(length - places, 0), length, device=x.device)  # what would be overwritten is not written
    state.scatter_(2, _ring(seen, ahead, places, channels), x[:, :, ahead].to(state.dtype))
    return out


def _ring(seen: Tensor, steps: Tensor, places: int, channels: int) -> Tensor:
    """Places [b, D, steps] in rings of `places`."""
    return torch.remainder(seen.long()[:, None] + steps, max(places, 1))[:, None].expand(-1, channels, -1)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last `state_len` inputs of every packed sequence, zeros before the first; without gradients.

    Args:
        x: [T, D], the tokens of S sequences one after the other.
        cu_seqlens: offsets [S + 1], int32 or int64: 0 first, never falling.
        state_len: inputs in a state, at least 1.

    Returns:
        [S, D, state_len] in x's dtype.

    Raises:
        InputError: a rank, or an offset beyond T.
    """
    op = "causal_conv1d_varlen_states"
    if x.ndim != 2 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
        shapes = f"{tuple(x.shape)} and {tuple(cu_seqlens.shape)}"
        raise InputError(f"{op}: x and cu_seqlens have shapes {shapes}; wants (T, D) and (S + 1,)")
    offsets = cu_seqlens.to(device=x.device, dtype=torch.int64)
    if offsets[0] != 0 or (offsets.diff() < 0).any() or offsets[-1] > len(x):
        raise InputError(f"{op}: cu_seqlens are not offsets into {len(x)} tokens; wants 0 first, never falling")
    if not len(x):
        return x.new_zeros(len(offsets) - 1, x.shape[1], state_len)
    places = offsets[1:, None] + torch.arange(-state_len, 0, device=x.device)  # [S, state_len]
    states = x.detach()[places.clamp(min=0)].masked_fill((places < offsets[:-1, None])[..., None], 0)
    return states.transpose(1, 2)
