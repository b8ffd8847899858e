"""The selective scan forward: every thread walks time with its channel's states, or a part of them, in registers.

Time goes in blocks of up to 8 steps, unrolled, the inputs of the next block loaded before this one is computed. Where
channels are too few to fill the device, long sequences are cut into segments: a first pass leaves what each segment
makes of a zero state, those are composed one after the other, and the second pass starts every segment from the state
that enters it. Where a backward will follow, the state before every `CHUNK` steps is kept for it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import LOG2E, exp2, sigmoid, softplus

SHORT = 8  # steps of a block of time
CHUNK: tl.constexpr = tl.constexpr(256)  # steps between the states that are kept, and the least of a segment
WARPS = 2048  # that segments of a sequence are to make of fewer than ENOUGH
ENOUGH = 1024
BATCHES = 4  # that a program of short sequences takes in turn, at most


class Packed(NamedTuple):
    """Sequences one after the other: their offsets [S + 1], int64 on the device, and the longest one's length."""

    offsets: Tensor
    longest: int


class Shape(NamedTuple):
    """What the kernels ask about a call. A unit is a run of channels that share a group of B and one of C."""

    batch: int
    channels: int
    length: int
    state: int
    groups_B: int
    groups_C: int
    units: int
    sequences: int
    longest: int  # of the sequences

    @classmethod
    def of(cls, u: Tensor, A: Tensor, B: Tensor, C: Tensor, packed: Packed | None) -> Shape:
        batch, channels, length = u.shape
        groups = [M.shape[1] if M.ndim == 4 else 1 for M in (B, C)]
        sequences, longest = (batch, length) if packed is None else (packed.offsets.shape[0] - 1, packed.longest)
        return cls(batch, channels, length, A.shape[1], *groups, math.lcm(*groups), sequences, longest)

    @property
    def per_unit(self) -> int:
        return self.channels // self.units

    @property
    def per_group(self) -> tuple[int, int]:
        return self.channels // self.groups_B, self.channels // self.groups_C


def strides(M: Tensor) -> tuple[int, int, int, int]:
    """Of B or C in any layout as (b, group, n, l)."""
    if M.ndim == 2:  # (D, N): the channel is the group
        return 0, M.stride(0), M.stride(1), 0
    if M.ndim == 3:
        return M.stride(0), 0, M.stride(1), M.stride(2)
    return M.stride()  # type: ignore[return-value]


@triton.jit
def _spread(
    B, C, into_B, into_C, B_b, B_g, B_n, B_l, C_b, C_g, C_n, C_l, groups_B, groups_C, length, N, padded,
    T: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """B and C as float32 [batch, group, padded length, NP], contiguous, zero beyond what there is."""
    t = (tl.program_id(0) * T + tl.arange(0, T)[:, None]).to(tl.int64)
    n = tl.arange(0, NP)[None, :].to(tl.int64)
    inside = (t < length) & (n < N)
    b, g = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if into_B is not None:
        if g < groups_B:
            x = tl.load(B + b * B_b + g * B_g + n * B_n + t * B_l, inside, 0.0).to(tl.float32)
            tl.store(into_B + ((b * groups_B + g) * padded + t) * NP + n, x, t < padded)
    if into_C is not None:
        if g < groups_C:
            x = tl.load(C + b * C_b + g * C_g + n * C_n + t * C_l, inside, 0.0).to(tl.float32)
            tl.store(into_C + ((b * groups_C + g) * padded + t) * NP + n, x, t < padded)


@triton.jit
def held_zeros(loaded):
    """Zeros in the layout of a tile that was loaded: what starts from a constant would be computed anew in others."""
    return tl.minimum(tl.maximum(loaded, 0.0), 0.0)


@triton.jit
def woven(even, odd, HALF: tl.constexpr):
    columns = ()
    for i in tl.static_range(HALF):
        columns = columns + (even[i], odd[i])
    return columns


@triton.jit
def _split(x, K: tl.constexpr):
    """[BD, K] as its K columns [BD, 1, 1]."""
    if K == 1:
        return (x.reshape(x.shape[0], 1, 1),)
    else:
        even, odd = tl.split(x.reshape(x.shape[0], K // 2, 2))
        return woven(_split(even, K // 2), _split(odd, K // 2), K // 2)


@triton.jit
def every_other(columns, first: tl.constexpr, HALF: tl.constexpr):
    found = ()
    for i in tl.static_range(HALF):
        found = found + (columns[2 * i + first],)
    return found


@triton.jit
def _joined(columns, K: tl.constexpr):
    """K columns [BD] as [BD, K]."""
    if K == 1:
        return columns[0].reshape(columns[0].shape[0], 1)
    else:
        even = _joined(every_other(columns, 0, K // 2), K // 2)
        odd = _joined(every_other(columns, 1, K // 2), K // 2)
        return tl.join(even, odd).reshape(even.shape[0], K)


@triton.jit
def _times(M, batch, row_d, t, s_b, s_d, s_l, mask):
    """[BD, K] of u, delta or z, as it lies in memory."""
    return tl.load(M + batch * s_b + row_d * s_d + t.to(tl.int64) * s_l, mask, 0.0)


@triton.jit
def _walk(
    u, delta, A, B, C, D, z, delta_bias, h0, out, hT, carry, spans, offsets,
    u_b, u_d, u_l, dt_b, dt_d, dt_l, A_d, A_n, B_d, B_n, C_d, C_n, D_d, z_b, z_d, z_l, bias_d,
    h_b, h_d, h_n, o_b, o_d, o_l,
    batch, length, padded, channels, N, per_unit, blocks, per_B, per_C, groups_B, groups_C, segment, rows_each,
    SOFTPLUS: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr, OUT: tl.constexpr, KEEP: tl.constexpr,
    BD: tl.constexpr, NI: tl.constexpr, NK: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr, BATCHES: tl.constexpr,
    ONE_BLOCK: tl.constexpr, ONE_WARP: tl.constexpr,
):  # fmt: skip
    # Lanes lie along the last axis first, then along the channels: a thread holds all of the middle one.
    NP: tl.constexpr = NI * NK
    lead = (tl.program_id(0) // blocks) * per_unit
    in_unit = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    in_d = (in_unit < per_unit)[:, None, None]
    d = (lead + in_unit).to(tl.int64)[:, None, None]
    in_row = (in_unit < per_unit)[:, None]
    row_d = (lead + in_unit).to(tl.int64)[:, None]
    n = tl.arange(0, NI)[None, :, None] * NK + tl.arange(0, NK)[None, None, :]
    in_dn = in_d & (n < N)
    a = tl.load(A + d * A_d + n.to(tl.int64) * A_n, in_dn, 0.0).to(tl.float32) * LOG2E
    if B_CONSTANT:
        B_t = tl.load(B + d * B_d + n.to(tl.int64) * B_n, in_dn, 0.0).to(tl.float32)
    if C_CONSTANT:
        C_t = tl.load(C + d * C_d + n.to(tl.int64) * C_n, in_dn, 0.0).to(tl.float32)
    bias, skip = 0.0, 0.0
    if delta_bias is not None:
        bias = tl.load(delta_bias + d * bias_d, in_d, 0.0).to(tl.float32)
    if D is not None:
        skip = tl.load(D + d * D_d, in_d, 0.0).to(tl.float32)
    k = tl.arange(0, K)[None, :]
    part = tl.program_id(2)
    for i in range(BATCHES):
        s = tl.program_id(1).to(tl.int64) * BATCHES + i
        there = s < batch
        s = tl.minimum(s, batch - 1)
        b, begin, end = s, 0, length
        if offsets is not None:
            b = s * 0
            begin = tl.load(offsets + s).to(tl.int32)
            end = tl.load(offsets + s + 1).to(tl.int32)
        first = begin + part * segment
        last = tl.minimum(first + segment, end)
        row = s * rows_each  # of `carry`, for the state that enters this segment
        if offsets is not None and KEEP:
            row = begin // CHUNK + s
        row += part * (segment // CHUNK) if KEEP else part
        h = held_zeros(a)
        if OUT:
            if h0 is not None:
                h = tl.load(h0 + s * h_b + d * h_d + n.to(tl.int64) * h_n, in_dn & there, 0.0).to(tl.float32)
            if carry is not None:
                if part > 0:
                    h = tl.load(carry + (row * channels + d) * N + n, in_dn, 0.0)
        total = tl.zeros([BD, 1, 1], tl.float32)
        nothing = tl.zeros([] if ONE_WARP else [BD, 1, 1], tl.float32)
        if not B_CONSTANT:
            of_B = B + ((b * groups_B + lead // per_B) * padded * NP + n)
        if not C_CONSTANT:
            of_C = C + ((b * groups_C + lead // per_C) * padded * NP + n)
        ahead = in_row & there & (first + k < last)
        x_block = _times(u, b, row_d, first + k, u_b, u_d, u_l, ahead)
        dt_block = _times(delta, b, row_d, first + k, dt_b, dt_d, dt_l, ahead)
        z_block = x_block
        if OUT and z is not None:
            z_block = _times(z, b, row_d, first + k, z_b, z_d, z_l, ahead)
        for t0 in range(first, last, K):
            xs = _split(x_block.to(tl.float32), K)
            dts = _split(dt_block.to(tl.float32), K)
            gates = _split(z_block.to(tl.float32), K)
            if not ONE_BLOCK:  # what comes next is on its way while this is computed
                t = t0 + K + k
                ahead = in_row & there & (t < last)
                x_block = _times(u, b, row_d, t, u_b, u_d, u_l, ahead)
                dt_block = _times(delta, b, row_d, t, dt_b, dt_d, dt_l, ahead)
                z_block = x_block
                if OUT and z is not None:
                    z_block = _times(z, b, row_d, t, z_b, z_d, z_l, ahead)
            if not ONE_BLOCK:  # so that the next rows of B and C are in the first cache when each is read in its turn
                if ONE_WARP:
                    line = tl.arange(0, K * NP)
                    touched = tl.zeros([K * NP], tl.float32)
                else:
                    line = tl.arange(0, BD)[:, None, None] * 32  # of 128 bytes
                    touched = nothing
                cell = (tl.zeros([], tl.int64) + (t0 + K)) * NP + line
                near = (line < K * NP) & (cell < padded * NP)
                if not B_CONSTANT:
                    touched += tl.load(B + (b * groups_B + lead // per_B) * padded * NP + cell, near, 0.0)
                if OUT and not C_CONSTANT:
                    touched += tl.load(C + (b * groups_C + lead // per_C) * padded * NP + cell, near, 0.0)
            ys = ()
            for j in tl.static_range(STEPS):
                t = tl.zeros([], tl.int64) + (t0 + j)
                inside = t < last
                dt = dts[j] + bias
                if not ONE_BLOCK:
                    dt += nothing
                if SOFTPLUS:
                    dt = softplus(dt)
                dt = tl.where(inside, dt, 0.0)  # past the end the state stays
                if not B_CONSTANT:
                    B_t = tl.load(of_B + t * NP) if offsets is None else tl.load(of_B + t * NP, inside, 0.0)
                if ONE_BLOCK and j == 0 and h0 is None:  # a state that is zero needs no decay
                    h = (dt * xs[j]) * B_t + h
                else:
                    h = exp2(dt * a) * h + (dt * xs[j]) * B_t
                if OUT:
                    if not C_CONSTANT:
                        C_t = tl.load(of_C + t * NP) if offsets is None else tl.load(of_C + t * NP, inside, 0.0)
                    y = tl.sum(tl.sum(h * C_t, 1, keep_dims=True), 2, keep_dims=True) + skip * xs[j]
                    if z is not None:
                        y = y * gates[j] * sigmoid(gates[j])
                    ys = ys + (y.reshape(BD),)
                else:
                    total += dt
            if not ONE_BLOCK:  # what is never used is never loaded: zero, whatever came
                nothing = held_zeros(tl.max(touched, 0) if ONE_WARP else touched)
            if OUT:
                for _ in tl.static_range(K - STEPS):
                    ys = ys + (ys[0],)
                t = t0 + k
                into = out + b * o_b + row_d * o_d + t.to(tl.int64) * o_l
                tl.store(into, _joined(ys, K), in_row & there & (t < last))
                if KEEP:
                    done = tl.zeros([], tl.int32) + (t0 + K - begin)
                    if (done % CHUNK == 0) & (t0 + K < last):
                        at = row + (done - (first - begin)) // CHUNK
                        tl.store(carry + (at * channels + d) * N + n, h, in_dn)
        if OUT:
            if hT is not None:
                if last == end:
                    tl.store(hT + (s * channels + d) * N + n, h, in_dn & there)
        else:
            row += segment // CHUNK if KEEP else 1
            tl.store(carry + (row * channels + d) * N + n, h, in_dn)
            tl.store(spans + (s * tl.num_programs(2) + part) * channels + d, total, in_d)


@triton.jit
def _compose(
    A, h0, carry, spans, A_d, A_n, h_b, h_d, h_n, channels, N, parts, rows_each, rows_part, BLOCK: tl.constexpr
):
    """What every segment makes of a zero state into the state that enters the next one, in place."""
    s = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < channels * N
    d, n = (place // N).to(tl.int64), (place % N).to(tl.int64)
    a = tl.load(A + d * A_d + n * A_n, inside, 0.0).to(tl.float32) * LOG2E
    h = tl.zeros([BLOCK], tl.float32)
    if h0 is not None:
        h = tl.load(h0 + s * h_b + d * h_d + n * h_n, inside, 0.0).to(tl.float32)
    for part in range(parts - 1):
        at = carry + (s * rows_each + (part + 1) * rows_part) * channels * N + place
        h = exp2(tl.load(spans + (s * (parts - 1) + part) * channels + d, inside, 0.0) * a) * h + tl.load(
            at, inside, 0.0
        )
        tl.store(at, h, inside)


def optional(x: Tensor | None, rank: int) -> tuple[int, ...]:
    return x.stride() if x is not None else (0,) * rank


def carried(batch: Any, length: Any, sequences: Any) -> Any:
    """Rows of `carry` [rows, D, N], the states before every chunk; `sequences` is None where they are not packed."""
    if sequences is None:
        return batch * ((length + CHUNK.value - 1) // CHUNK.value)
    return length // CHUNK.value + sequences


class Tile(NamedTuple):
    """Channels, state dimensions a thread and along lanes, and warps of a program."""

    BD: int
    NI: int
    NK: int
    warps: int

    @classmethod
    def of(cls, shape: Shape) -> Tile:
        """Four states next to each other are a lane's, and up to 16 and more a thread's."""
        padded = triton.next_power_of_2(shape.state)
        NK = max(1, min(32, padded // 4)) if padded > 16 else min(4, padded)
        lanes = 32 // max(1, NK // 4)  # along the channels
        # More threads than states: else the compiler takes their loads to be dear, and moves them about in memory.
        warps = 1 if padded < 32 else min(32, max(4, padded // 16))
        return cls(lanes * warps, padded // NK, NK, warps)

    @property
    def padded(self) -> int:
        return self.NI * self.NK


def ssm_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None, packed: Packed | None,
    out: Tensor, final_state: Tensor | None, carry: Tensor | None,
) -> None:  # fmt: skip
    """Write `out` [B, D, L] and `final_state` [B or S, D, N] (fp32, contiguous).

    With `carry` [rows, D, N], as many as `carried` says, the states before every chunk stay there for the backward.
    """
    shape = Shape.of(u, A, B, C, packed)
    if not (shape.sequences and shape.channels):
        return
    if shape.length == 0 or shape.state == 0:
        return _trivial(shape, u, D, z, initial_state, out, final_state)
    tile = Tile.of(shape)
    K = min(SHORT, max(2, triton.next_power_of_2(shape.longest)))
    padded = triton.cdiv(shape.length, K) * K
    spread = [_room(M, shape, padded, tile.padded) for M in (B, C)]
    if any(M is not None for M in spread):
        T = min(64, triton.next_power_of_2(padded))
        groups = (shape.groups_B, shape.groups_C)
        grid = (triton.cdiv(padded, T), shape.batch, max(groups))
        sizes = (shape.length, shape.state, padded)
        _spread[grid](B, C, *spread, *strides(B), *strides(C), *groups, *sizes, T=T, NP=tile.padded, num_warps=4)
    blocks = triton.cdiv(shape.per_unit, tile.BD)
    programs = shape.units * blocks * shape.sequences
    one_block = packed is None and shape.length <= K
    batches = min(BATCHES, max(1, programs // 1024)) if one_block else 1
    segment, parts = _segments(shape, packed, programs * tile.warps)
    # Two programs of 8 warps hide more of each other's waiting than one with all the registers.
    more = {"maxnreg": 128} if tile.warps == 8 and torch.version.hip is None else {}
    keep = carry is not None
    rows_each = triton.cdiv(shape.length, CHUNK.value) if keep else parts
    rows_part = segment // CHUNK.value if keep else 1
    spans = None
    if parts > 1:
        spans = u.new_empty((shape.sequences, parts - 1, shape.channels), dtype=torch.float32)
        if carry is None:
            carry = u.new_empty((shape.sequences * parts, shape.channels, shape.state), dtype=torch.float32)

    def walk(OUT: bool) -> None:
        grid = (shape.units * blocks, triton.cdiv(shape.sequences, batches), parts if OUT else parts - 1)
        _walk[grid](
            u, delta, A, B if spread[0] is None else spread[0], C if spread[1] is None else spread[1], D, z, delta_bias,
            initial_state, out, final_state, carry, spans, None if packed is None else packed.offsets,
            *u.stride(), *delta.stride(), *A.stride(), *strides(B)[1:3], *strides(C)[1:3], *optional(D, 1),
            *optional(z, 3), *optional(delta_bias, 1), *optional(initial_state, 3), *out.stride(),
            shape.sequences, shape.length, padded, shape.channels, shape.state, shape.per_unit, blocks,
            *shape.per_group, shape.groups_B, shape.groups_C, segment, rows_each,
            SOFTPLUS=delta_softplus, B_CONSTANT=B.ndim == 2, C_CONSTANT=C.ndim == 2, OUT=OUT, KEEP=keep,
            BD=tile.BD, NI=tile.NI, NK=tile.NK, K=K, STEPS=shape.length if one_block else K, BATCHES=batches,
            ONE_BLOCK=one_block, ONE_WARP=tile.warps == 1, num_warps=tile.warps, **more,
        )  # fmt: skip

    if parts > 1:
        walk(OUT=False)
        _compose[(triton.cdiv(shape.channels * shape.state, 256), shape.sequences)](
            A, initial_state, carry, spans, *A.stride(), *optional(initial_state, 3), shape.channels, shape.state,
            parts, rows_each, rows_part, BLOCK=256, num_warps=4,
        )  # fmt: skip
    walk(OUT=True)


def _room(M: Tensor, shape: Shape, padded: int, width: int) -> Tensor | None:
    """Where B or C go in float32, if they vary in time."""
    if M.ndim == 2:
        return None
    groups = M.shape[1] if M.ndim == 4 else 1
    return M.new_empty((shape.batch, groups, padded, width), dtype=torch.float32)


def _segments(shape: Shape, packed: Packed | None, warps: int) -> tuple[int, int]:
    """Steps of a segment, a number of chunks, and how many there are."""
    chunks = triton.cdiv(max(shape.longest, 1), CHUNK.value)
    parts = 1 if packed is not None or warps >= ENOUGH else min(chunks, triton.cdiv(WARPS, warps))
    each = triton.cdiv(chunks, parts)
    return each * CHUNK.value, triton.cdiv(chunks, each)


def _trivial(shape, u, D, z, initial_state, out, final_state) -> None:
    """No step, or no state: the final state is the initial one, the output what the skip lets through."""
    if final_state is not None:
        final_state.copy_(initial_state) if initial_state is not None else final_state.zero_()
    if shape.length:
        y = torch.zeros_like(u, dtype=torch.float32) if D is None else u.float() * D.float()[:, None]
        out.copy_(y if z is None else y * torch.nn.functional.silu(z.float()))
