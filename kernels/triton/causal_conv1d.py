"""The causal depthwise convolution, forward and backward: bound by memory, each array read and written once.

A program works on a tile [BD, BT] of channels and times. The W taps read the input at W offsets, all but the first from
the L1 cache. Packed sequences are one line of time in which each time knows its sequence, so that many short ones fill
tiles as one long one does. What is short and not packed goes to `causal_conv1d_short`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import causal_conv1d_short as short
from .math import sigmoid

MOST_TAPS = 16  # they are unrolled, and the backward holds 2 W - 1 tiles in registers
_PROGRAMS = 2048  # of the backward, each with a partial sum for the gradients of the parameters


@triton.jit
def _sequence(offsets, owners, entry, t, length):
    """Index of the sequence that holds time t, its begin and its end: [BT] where sequences are packed."""
    if owners is not None:
        owner = tl.load(owners + t, mask=t < length, other=0).to(tl.int64)
        return owner, tl.load(offsets + owner), tl.load(offsets + owner + 1)
    else:
        return entry, entry * 0, entry * 0 + length


@triton.jit
def _input(x, x_d, x_t, initial, i_s, i_d, i_k, at, owner, begin, end, d, channels, W: tl.constexpr):
    """[BD, BT]: x at times `at`, before a sequence's begin its initial state, 0 where neither has any."""
    within = (at >= begin) & (at < end)
    value = tl.load(
        x + d[:, None] * x_d + at[None, :] * x_t, mask=(d < channels)[:, None] & within[None, :], other=0.0
    ).to(tl.float32)
    if initial is not None:
        k = at - begin + (W - 1)
        before = (k >= 0) & (at < begin)
        held = tl.load(
            initial + (owner * i_s + k * i_k)[None, :] + d[:, None] * i_d,
            mask=(d < channels)[:, None] & before[None, :],
            other=0.0,
        )
        value = tl.where(before[None, :], held.to(tl.float32), value)
    return value


@triton.jit
def _taps(weight, w_d, w_k, d, channels, W: tl.constexpr):
    """The filters, W columns [BD, 1]."""
    taps = ()
    for k in tl.static_range(W):
        taps += (tl.load(weight + d * w_d + k * w_k, mask=d < channels, other=0.0).to(tl.float32)[:, None],)
    return taps


@triton.jit
def _forward(
    x, x_b, x_d, x_t,
    weight, w_d, w_k,
    bias, bias_d,
    initial, i_s, i_d, i_k,
    out, o_b, o_d, o_t,
    final, f_s, f_d, f_k,
    offsets, owners,
    channels, length, d_tiles, t_tiles,
    W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    entry = program // d_tiles // t_tiles
    d = program % d_tiles * BD + tl.arange(0, BD)
    t = program // d_tiles % t_tiles * BT + tl.arange(0, BT)
    owner, begin, end = _sequence(offsets, owners, entry, t, length)

    y = tl.zeros([BD, BT], tl.float32)
    if bias is not None:
        y += tl.load(bias + d * bias_d, mask=d < channels, other=0.0).to(tl.float32)[:, None]
    taps = _taps(weight, w_d, w_k, d, channels, W)
    last = (d < channels)[:, None] & ((t == end - 1) & (t < length))[None, :]
    for k in tl.static_range(W):
        value = _input(
            x + entry * x_b, x_d, x_t, initial, i_s, i_d, i_k, t + (k - W + 1), owner, begin, end, d, channels, W
        )
        y += taps[k] * value
        if k > 0:  # the last output of a sequence has read its final state
            tl.store(final + (owner * f_s + t * 0)[None, :] + (k - 1) * f_k + d[:, None] * f_d, value, mask=last)
    if SILU:
        y *= sigmoid(y)
    tl.store(
        out + entry * o_b + d[:, None] * o_d + t[None, :] * o_t,
        y,
        mask=(d < channels)[:, None] & (t < length)[None, :],
    )


@triton.jit
def _inputs(
    x, x_d, x_t, initial, i_s, i_d, i_k, t, owner, begin, end, d, channels, W: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """COUNT tiles of inputs, the first W - 1 times before t: all that the gradients at t look at."""
    values = ()
    for i in tl.static_range(COUNT):
        values += (_input(x, x_d, x_t, initial, i_s, i_d, i_k, t + (i - W + 1), owner, begin, end, d, channels, W),)
    return values


@triton.jit
def _pull(
    grad, g_d, g_t, grad_final, s_s, s_d, s_k, bias, values, taps, t, known, owner, begin, end, d, channels,
    W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Gradients [BD, BT] of the inputs at t, of which `known` are of the sequence, and of the sums of taps at t.

    Input t is in the sums of t … t + W - 1 and in the final state. With STEPS = 1 the first of them is of no use.
    """
    dx = tl.zeros([BD, BT], tl.float32)
    first = tl.zeros([BD, BT], tl.float32)
    if grad is not None:
        for j in tl.static_range(STEPS):
            valid = (d < channels)[:, None] & (known & (t + j >= begin) & (t + j < end))[None, :]
            g = tl.load(grad + d[:, None] * g_d + (t + j)[None, :] * g_t, mask=valid, other=0.0).to(tl.float32)
            if SILU:
                y = tl.zeros([BD, BT], tl.float32) + bias
                for k in tl.static_range(W):
                    y += taps[k] * values[j + k]
                s = sigmoid(y)
                g = tl.where(valid, g * s * (1.0 + y * (1.0 - s)), 0.0)
            dx += taps[W - 1 - j] * g
            if j == 0:
                first = g
    if grad_final is not None:
        k = t - end + (W - 1)
        kept = (d < channels)[:, None] & (known & (k >= 0) & (t < end))[None, :]
        dx += tl.load(
            grad_final + (owner * s_s + k * s_k)[None, :] + d[:, None] * s_d, mask=kept, other=0.0
        ).to(tl.float32)  # fmt: skip
    return dx, first


@triton.jit
def _backward(
    grad, g_b, g_d, g_t,
    grad_final, s_s, s_d, s_k,
    x, x_b, x_d, x_t,
    weight, w_d, w_k,
    bias, bias_d,
    initial, i_s, i_d, i_k,
    dx, o_b, o_d, o_t,
    partial,  # [segments, D, W + 1]: of the weights and the bias
    offsets, owners,
    channels, length, d_tiles, t_tiles, tiles, share,
    W: tl.constexpr, SILU: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    d = program % d_tiles * BD + tl.arange(0, BD)
    segment = program // d_tiles
    taps = _taps(weight, w_d, w_k, d, channels, W)
    shift = tl.zeros([BD, 1], tl.float32)
    if bias is not None:
        shift += tl.load(bias + d * bias_d, mask=d < channels, other=0.0).to(tl.float32)[:, None]
    sums = ()
    if partial is not None:
        for _ in tl.static_range(W + 1):
            sums += (tl.zeros([BD, BT], tl.float32),)

    tile = segment * share
    stop = tl.minimum(tile + share, tiles)
    while tile < stop:
        entry = tile // t_tiles
        t = tile % t_tiles * BT + tl.arange(0, BT)
        owner, begin, end = _sequence(offsets, owners, entry, t, length)
        values = _inputs(
            x + entry * x_b, x_d, x_t, initial, i_s, i_d, i_k, t, owner, begin, end, d, channels, W, COUNT
        )  # fmt: skip
        at = grad
        if grad is not None:
            at = grad + entry * g_b
        pulled, first = _pull(
            at, g_d, g_t, grad_final, s_s, s_d, s_k, shift, values, taps, t, t < length, owner, begin, end, d, channels,
            W, SILU, BD, BT, STEPS,
        )  # fmt: skip
        if dx is not None:
            tl.store(
                dx + entry * o_b + d[:, None] * o_d + t[None, :] * o_t,
                pulled,
                mask=(d < channels)[:, None] & (t < length)[None, :],
            )
        if partial is not None:
            more = ()
            for k in tl.static_range(W):
                more += (sums[k] + first * values[k],)
            more += (sums[W] + first,)
            sums = more
        tile += 1

    if partial is not None:
        for k in tl.static_range(W + 1):
            at = partial + (segment * channels + d) * (W + 1) + k
            tl.store(at, tl.sum(sums[k], axis=1), mask=d < channels)


@triton.jit
def _backward_of_states(
    grad, g_b, g_d, g_t,
    grad_final, s_s, s_d, s_k,
    x, x_b, x_d, x_t,
    weight, w_d, w_k,
    bias, bias_d,
    initial, i_s, i_d, i_k,
    dinitial,  # [S, D, W-1], contiguous
    offsets,
    channels, length, d_tiles,
    W: tl.constexpr, SILU: tl.constexpr, COUNT: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Gradients of the W-1 inputs before a sequence, times begin - W + 1 … begin - 1 of it."""
    program = tl.program_id(0).to(tl.int64)
    d = program % d_tiles * BD + tl.arange(0, BD)
    owner = program // d_tiles
    entry, begin, end = owner, owner * 0, owner * 0 + length
    if offsets is not None:
        entry, begin, end = owner * 0, tl.load(offsets + owner), tl.load(offsets + owner + 1)
    k = tl.arange(0, BT)
    t = begin - (W - 1) + k
    taps = _taps(weight, w_d, w_k, d, channels, W)
    shift = tl.zeros([BD, 1], tl.float32)
    if bias is not None:
        shift += tl.load(bias + d * bias_d, mask=d < channels, other=0.0).to(tl.float32)[:, None]
    values = _inputs(
        x + entry * x_b, x_d, x_t, initial, i_s, i_d, i_k, t, owner, begin, end, d, channels, W, COUNT
    )  # fmt: skip
    at = grad
    if grad is not None:
        at = grad + entry * g_b
    pulled, _ = _pull(
        at, g_d, g_t, grad_final, s_s, s_d, s_k, shift, values, taps, t, k < W - 1, owner, begin, end, d, channels,
        W, SILU, BD, BT, W,
    )  # fmt: skip
    tl.store(
        dinitial + ((owner * channels + d) * (W - 1))[:, None] + k[None, :],
        pulled,
        mask=(d < channels)[:, None] & (k < W - 1)[None, :],
    )


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    out: Tensor,
    final_state: Tensor,
    offsets: Tensor | None = None,
) -> None:
    """Write `out` [B, D, L] and `final_state` [S, D, W-1], that of empty sequences excepted.

    Args:
        offsets: [S + 1], int64 beside x, of packed sequences.
    """
    batch, channels, length = x.shape
    if 0 in x.shape:
        return
    arrays = (
        *(x, *x.stride()),
        *(weight, *weight.stride()),
        *_strided(bias, 1),
        *_strided(initial_state, 3),
        *(out, *out.stride()),
        *(final_state, *final_state.stride()),
    )
    with torch.cuda.device_of(x):
        if offsets is None and short.takes(x, weight):
            return short.conv(x, weight, arrays, silu)
        block_d, block_t = _tile(x, 1024)
        d_tiles, t_tiles = triton.cdiv(channels, block_d), triton.cdiv(length, block_t)
        _forward[(batch * d_tiles * t_tiles,)](
            *arrays,
            *(offsets, _owners(offsets, length)),
            *(channels, length, d_tiles, t_tiles),
            W=weight.shape[1],
            SILU=silu,
            BD=block_d,
            BT=block_t,
        )


def conv_bwd(
    grad_out: Tensor | None,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dinitial: Tensor | None,
    offsets: Tensor | None = None,
) -> None:
    """Write the gradients that are given: `dx` of any layout, the others contiguous and in float32."""
    width = weight.shape[1]
    arrays = (
        *_strided(grad_out, 3),
        *_strided(grad_final_state, 3),
        *(x, *x.stride()),
        *(weight, *weight.stride()),
        *_strided(bias, 1),
        *_strided(initial_state, 3),
    )
    sums = dweight is not None or dbias is not None
    empty, partial = 0 in x.shape, None
    with torch.cuda.device_of(x):
        if offsets is None and not empty and short.takes(x, weight):
            partial = short.conv_bwd(x, weight, (*arrays, *_strided(dx, 3)), dinitial, sums, silu)
        else:
            if dinitial is not None and dinitial.numel():
                _states_bwd(x, arrays, width, silu, dinitial, offsets)
            if not empty and (dx is not None or sums):
                partial = _inputs_bwd(x, (*arrays, *_strided(dx, 3)), width, silu, offsets, sums)
        for gradient, columns in ((dweight, slice(width)), (dbias, width)):
            if gradient is not None:
                gradient.zero_() if partial is None else torch.sum(partial[..., columns], dim=0, out=gradient)


def _states_bwd(
    x: Tensor, arrays: tuple[Any, ...], width: int, silu: bool, dinitial: Tensor, offsets: Tensor | None
) -> None:
    channels, length = x.shape[1:]
    block_t = triton.next_power_of_2(width - 1)
    block_d = min(triton.next_power_of_2(channels), max(1, 512 // block_t))
    d_tiles = triton.cdiv(channels, block_d)
    _backward_of_states[(dinitial.shape[0] * d_tiles,)](
        *(*arrays, dinitial, offsets, channels, length, d_tiles),
        W=width,
        SILU=silu,
        COUNT=2 * width - 1 if silu else 0,
        BD=block_d,
        BT=block_t,
    )


def _inputs_bwd(
    x: Tensor, arrays: tuple[Any, ...], width: int, silu: bool, offsets: Tensor | None, sums: bool
) -> Tensor | None:
    """Write the gradient of x, the last of the arrays; gives partial sums of the parameters', [.., D, W + 1]."""
    batch, channels, length = x.shape
    block_d, block_t = _tile(x, 512 if width <= 4 else 256)
    d_tiles, t_tiles = triton.cdiv(channels, block_d), triton.cdiv(length, block_t)
    share = triton.cdiv(batch * t_tiles, max(1, _PROGRAMS // d_tiles))
    segments = triton.cdiv(batch * t_tiles, share)
    partial = None
    if sums:
        partial = torch.empty((segments, channels, width + 1), dtype=torch.float32, device=x.device)
    dx = arrays[-4]
    _backward[(segments * d_tiles,)](
        *(*arrays, partial),
        *(offsets, _owners(offsets, length)),
        *(channels, length, d_tiles, t_tiles, batch * t_tiles, share),
        W=width,
        SILU=silu,
        COUNT=2 * width - 1 if silu else width if sums else 0,
        STEPS=1 if dx is None else width,
        BD=block_d,
        BT=block_t,
    )
    return partial


def _strided(x: Tensor | None, axes: int) -> tuple[Tensor | int | None, ...]:
    return (None, *[0] * axes) if x is None else (x, *x.stride())


def _tile(x: Tensor, elements: int) -> tuple[int, int]:
    """Channels and times of a tile: along what is contiguous a row of it, along time enough to reuse what is read."""
    channels, length = (triton.next_power_of_2(n) for n in x.shape[1:])
    block_t = min(length, 16 if x.stride(1) < x.stride(2) else 128)
    block_d = min(channels, elements // block_t)
    return block_d, min(length, elements // block_d)


def _owners(offsets: Tensor | None, length: int) -> Tensor | None:
    """Index of the sequence of every time [L]; none of them is empty."""
    if offsets is None:
        return None
    times = torch.arange(length, device=offsets.device)
    return torch.searchsorted(offsets[1:], times, right=True, out_int32=True)
