"""One token of the causal depthwise convolution: a program reads the states of some channels and moves them on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import sigmoid

MOST_HELD = 1024  # inputs in a state: a program holds all of a channel's in registers


@triton.jit
def _step(
    x, x_b, x_d,
    state, s_s, s_d, s_k,
    weight, w_d, w_k,
    bias, bias_d,
    indices, indices_b,
    out, o_b, o_d,
    states, channels, d_tiles, held,
    W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // d_tiles
    d = program % d_tiles * BD + tl.arange(0, BD)
    k = tl.arange(0, BK)
    slot = row
    if indices is not None:
        slot = tl.load(indices + row * indices_b).to(tl.int64)
    known = (slot >= 0) & (slot < states)
    there = known & (d < channels)[:, None] & (k < held)[None, :]
    place = state + slot * s_s + d[:, None] * s_d + k[None, :] * s_k
    past = tl.load(place, mask=there, other=0.0)  # [BD, BK]
    new = tl.load(x + row * x_b + d * x_d, mask=d < channels, other=0.0)

    tap = k - (held - (W - 1))  # of each input held; those before the last W - 1 have none
    taps = tl.load(
        weight + d[:, None] * w_d + tap[None, :] * w_k,
        mask=(d < channels)[:, None] & ((tap >= 0) & (k < held))[None, :],
        other=0.0,
    )  # fmt: skip
    y = tl.sum(tl.where((tap >= 0)[None, :], taps.to(tl.float32) * past.to(tl.float32), 0.0), axis=1)
    y += tl.load(weight + d * w_d + (W - 1) * w_k, mask=d < channels, other=0.0).to(tl.float32) * new.to(tl.float32)
    if bias is not None:
        y += tl.load(bias + d * bias_d, mask=d < channels, other=0.0).to(tl.float32)
    if SILU:
        y *= sigmoid(y)
    y = tl.where(slot < 0, 0.0, tl.where(known, y, float("nan")))
    tl.store(out + row * o_b + d * o_d, y, mask=d < channels)

    tl.debug_barrier()  # another thread may still have to read where this one writes
    tl.store(place - s_k, past, mask=there & (k > 0)[None, :])
    newest = state + slot * s_s + d * s_d + (held - 1) * s_k
    tl.store(newest, new.to(state.dtype.element_ty), mask=known & (held > 0) & (d < channels))


def step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state_indices: Tensor | None,
    out: Tensor,
) -> None:
    """Write `out` [b, D] and move `state` [S, D, W-1 or more] on, S being b without `state_indices`.

    A row whose index is negative gives zeros, one whose index is S or more NaN; neither touches a state.
    """
    rows, channels = x.shape
    if 0 in x.shape:
        return
    held = state.shape[2]
    block_k = triton.next_power_of_2(max(held, 1))
    block_d = min(triton.next_power_of_2(channels), max(1, 1024 // block_k), 256)
    d_tiles = triton.cdiv(channels, block_d)
    with torch.cuda.device_of(x):
        _step[(rows * d_tiles,)](
            *(x, *x.stride()),
            *(state, *state.stride()),
            *(weight, *weight.stride()),
            *((None, 0) if bias is None else (bias, *bias.stride())),
            *((None, 0) if state_indices is None else (state_indices, *state_indices.stride())),
            *(out, *out.stride()),
            *(state.shape[0], channels, d_tiles, held),
            W=weight.shape[1],
            SILU=silu,
            BD=block_d,
            BK=block_k,
        )
