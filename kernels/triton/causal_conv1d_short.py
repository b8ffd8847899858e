"""The causal convolution of few times and taps, as of a window of chunks: all of a row's times are in registers.

A program works on a tile [BB, BD] of batch entries and channels, one such tile for each time: every array is read and
written once, nothing is computed twice, and the layout of memory over time does not matter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import sigmoid

MOST_TIMES, MOST_TAPS = 8, 8
_PROGRAMS = 512  # of the backward, each with a partial sum for the gradients of the parameters


@triton.jit
def _line(x, x_t, initial, i_k, zero, inside, L: tl.constexpr, W: tl.constexpr):
    """Inputs at times 1 - W … L - 1, as W - 1 + L tiles."""
    line = ()
    for k in tl.static_range(W - 1):
        if initial is not None:
            line += (tl.load(initial + (zero + k) * i_k, mask=inside, other=0.0).to(tl.float32),)
        else:
            line += (tl.zeros(inside.shape, tl.float32),)
    for t in tl.static_range(L):
        line += (tl.load(x + (zero + t) * x_t, mask=inside, other=0.0).to(tl.float32),)
    return line


@triton.jit
def _parameters(weight, w_d, w_k, bias, bias_d, d, channels, W: tl.constexpr):
    """W columns of the filters and the bias, [1, BD]."""
    known = d < channels
    taps = ()
    for k in tl.static_range(W):
        taps += (tl.load(weight + d * w_d + k * w_k, mask=known, other=0.0).to(tl.float32)[None, :],)
    shift = tl.zeros(d.shape, tl.float32)
    if bias is not None:
        shift = tl.load(bias + d * bias_d, mask=known, other=0.0).to(tl.float32)
    return taps, shift[None, :]


@triton.jit
def _sum(line, taps, shift, t: tl.constexpr, W: tl.constexpr, PAST: tl.constexpr):
    y = tl.zeros(line[0].shape, tl.float32) + shift
    for k in tl.static_range(W):
        if PAST or t + k >= W - 1:  # else a zero
            y += taps[k] * line[t + k]
    return y


@triton.jit
def _forward(
    x, x_b, x_d, x_t,
    weight, w_d, w_k,
    bias, bias_d,
    initial, i_b, i_d, i_k,
    out, o_b, o_d, o_t,
    final, f_b, f_d, f_k,
    batch, channels, d_tiles,
    L: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    zero = program * 0
    d = program % d_tiles * BD + tl.arange(0, BD)
    b = program // d_tiles * BB + tl.arange(0, BB)[:, None]
    inside = (b < batch) & (d < channels)[None, :]
    taps, shift = _parameters(weight, w_d, w_k, bias, bias_d, d, channels, W)
    past = initial
    if initial is not None:
        past = initial + b * i_b + d[None, :] * i_d
    line = _line(x + b * x_b + d[None, :] * x_d, x_t, past, i_k, zero, inside, L, W)
    out += b * o_b + d[None, :] * o_d
    for t in tl.static_range(L):
        y = _sum(line, taps, shift, t, W, initial is not None)
        if SILU:
            y *= sigmoid(y)
        tl.store(out + (zero + t) * o_t, y, mask=inside)
    final += b * f_b + d[None, :] * f_d
    for k in tl.static_range(W - 1):
        tl.store(final + (zero + k) * f_k, line[L + k], mask=inside)


@triton.jit
def _backward(
    grad, g_b, g_d, g_t,
    grad_final, s_b, s_d, s_k,
    x, x_b, x_d, x_t,
    weight, w_d, w_k,
    bias, bias_d,
    initial, i_b, i_d, i_k,
    dx, o_b, o_d, o_t,
    dinitial,  # [B, D, W-1], contiguous
    partial,  # [segments, D, W + 1]: of the weights and the bias
    batch, channels, d_tiles, tiles, share,
    L: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    zero = program * 0
    d = program % d_tiles * BD + tl.arange(0, BD)
    segment = program // d_tiles
    taps, shift = _parameters(weight, w_d, w_k, bias, bias_d, d, channels, W)
    sums = ()
    if partial is not None:
        for _ in tl.static_range(W + 1):
            sums += (tl.zeros([BB, BD], tl.float32),)

    tile = segment * share
    stop = tl.minimum(tile + share, tiles)
    while tile < stop:
        b = tile * BB + tl.arange(0, BB)[:, None]
        inside = (b < batch) & (d < channels)[None, :]
        past = initial
        if initial is not None:
            past = initial + b * i_b + d[None, :] * i_d
        line = _line(x + b * x_b + d[None, :] * x_d, x_t, past, i_k, zero, inside, L, W)
        slopes = ()  # of the sums, by time
        for t in tl.static_range(L):
            slope = tl.zeros([BB, BD], tl.float32)
            if grad is not None:
                at = grad + b * g_b + d[None, :] * g_d + (zero + t) * g_t
                slope = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                if SILU:
                    y = _sum(line, taps, shift, t, W, initial is not None)
                    s = sigmoid(y)
                    slope *= s * (1.0 + y * (1.0 - s))
            slopes += (slope,)
        for p in tl.static_range(W - 1 + L):  # of time p - W + 1
            if (p >= W - 1 and dx is not None) or (p < W - 1 and dinitial is not None):
                pulled = tl.zeros([BB, BD], tl.float32)
                for k in tl.static_range(W):
                    if p - k >= 0 and p - k < L:
                        pulled += taps[k] * slopes[p - k]
                if grad_final is not None and p >= L:
                    at = grad_final + b * s_b + d[None, :] * s_d + (zero + (p - L)) * s_k
                    pulled += tl.load(at, mask=inside, other=0.0).to(tl.float32)
                if p >= W - 1:
                    tl.store(dx + b * o_b + d[None, :] * o_d + (zero + (p - W + 1)) * o_t, pulled, mask=inside)
                else:
                    tl.store(dinitial + (b * channels + d[None, :]) * (W - 1) + p, pulled, mask=inside)
        if partial is not None:
            more = ()
            for k in tl.static_range(W):
                total = sums[k]
                for t in tl.static_range(L):
                    if initial is not None or t + k >= W - 1:
                        total += slopes[t] * line[t + k]
                more += (total,)
            total = sums[W]
            for t in tl.static_range(L):
                total += slopes[t]
            more += (total,)
            sums = more
        tile += 1

    if partial is not None:
        for k in tl.static_range(W + 1):
            at = partial + (segment * channels + d) * (W + 1) + k
            tl.store(at, tl.sum(sums[k], axis=0), mask=d < channels)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether x [B, D, L] is so short, and its filters are."""
    return 0 < x.shape[2] <= MOST_TIMES and weight.shape[1] <= MOST_TAPS


def conv(x: Tensor, weight: Tensor, arrays: tuple[Any, ...], silu: bool) -> None:
    """Write the results, the last of `arrays`: all that the kernel reads and writes, each with its strides."""
    batch, channels, length = x.shape
    width = weight.shape[1]
    block_b, block_d = _tile(x, 512 if length + width <= 9 else 256)
    d_tiles = triton.cdiv(channels, block_d)
    _forward[(triton.cdiv(batch, block_b) * d_tiles,)](
        *(*arrays, batch, channels, d_tiles), L=length, W=width, SILU=silu, BB=block_b, BD=block_d
    )


def conv_bwd(
    x: Tensor, weight: Tensor, arrays: tuple[Any, ...], dinitial: Tensor | None, sums: bool, silu: bool
) -> Tensor | None:
    """Write the gradient of x, the last of `arrays`, and `dinitial`; gives partial sums of the rest, [.., D, W + 1]."""
    batch, channels, length = x.shape
    width = weight.shape[1]
    block_b, block_d = _tile(x, 512 if length + width <= 9 and x.stride(1) == 1 else 256)
    d_tiles, tiles = triton.cdiv(channels, block_d), triton.cdiv(batch, block_b)
    share = triton.cdiv(tiles, max(1, _PROGRAMS // d_tiles))
    segments = triton.cdiv(tiles, share)
    partial = None
    if sums:
        partial = torch.empty((segments, channels, width + 1), dtype=torch.float32, device=x.device)
    _backward[(segments * d_tiles,)](
        *(*arrays, dinitial, partial, batch, channels, d_tiles, tiles, share),
        L=length,
        W=width,
        SILU=silu,
        BB=block_b,
        BD=block_d,
    )
    return partial


def _tile(x: Tensor, elements: int) -> tuple[int, int]:
    """Batch entries and channels of a tile."""
    batch, channels = (triton.next_power_of_2(n) for n in x.shape[:2])
    block_d = min(channels, elements)
    return min(batch, elements // block_d), block_d
