"""The selective scan forward, in two regimes.

short: a program holds channels × state in registers and walks time, unrolled, for several batch entries in turn.
long: a program walks a sequence in chunks of time; inside a chunk, for one state dimension after the other, the
recurrence h_t = a_t h_{t-1} + b_t is an associative scan over time. The state between chunks goes through memory, where
the backward finds it again.

Blelloch, "Prefix Sums and Their Applications" (1990), section 1.4, for the scan of a linear recurrence.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import LOG2E, exp2, sigmoid, softplus

SHORT = 8  # steps, up to which time is unrolled
CHUNK: tl.constexpr = tl.constexpr(256)  # steps at most of a chunk: 8 a lane, for 16-byte loads of 16-bit numbers
ONCE: tl.constexpr = tl.constexpr("")  # eviction policy
WIDEST = 512  # state dimensions that the short regime holds in registers


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

    @property
    def chunk(self) -> int:
        """Steps of a chunk of the long regime. Fewer than `CHUNK` where one chunk holds every sequence."""
        return min(CHUNK.value, max(16, triton.next_power_of_2(max(self.longest, 1))))


def strides(M: Tensor) -> tuple[int, int, int, int]:
    """Of B or C in any layout as (b, group, n, l)."""
    if M.ndim == 2:  # (D, N): the channel is the group
        return 0, M.stride(0), M.stride(1), 0
    if M.ndim == 3:
        return M.stride(0), 0, M.stride(1), M.stride(2)
    return M.stride()  # type: ignore[return-value]


@triton.jit
def _tile(M, batch, channel, n, t, s_b, s_g, s_n, s_l, per_group, mask, CONSTANT: tl.constexpr, KIND: tl.constexpr):
    """B or C at the places given, in float32; `channel` is any one of the group where they are not CONSTANT in time."""
    group = channel if CONSTANT else channel // per_group
    offset = batch * s_b + group.to(tl.int64) * s_g + n.to(tl.int64) * s_n + t * s_l
    return tl.load(M + offset, mask, 0.0, eviction_policy=KIND).to(tl.float32)


@triton.jit
def held_zeros(loaded):
    """Zeros in the layout of a tile that was loaded: what starts from a constant would be computed anew in others."""
    return tl.minimum(tl.maximum(loaded, 0.0), 0.0)


@triton.jit
def _short(
    u, delta, A, B, C, D, z, delta_bias, h0, out, hT,
    u_b, u_d, u_l, dt_b, dt_d, dt_l, A_d, A_n, B_b, B_g, B_n, B_l, C_b, C_g, C_n, C_l, D_d, z_b, z_d, z_l, bias_d,
    h_b, h_d, h_n, o_b, o_d, o_l,
    batch, channels, N, per_unit, blocks, per_B, per_C,
    L: tl.constexpr, SOFTPLUS: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
    BD: tl.constexpr, NI: tl.constexpr, NK: tl.constexpr, BATCHES: tl.constexpr,
):  # fmt: skip
    # Lanes lie along the last axis first, then along the first: a thread holds all of the middle one.
    unit = tl.program_id(1) // blocks
    lead = unit * per_unit
    in_unit = (tl.program_id(1) % blocks) * BD + tl.arange(0, BD)[:, None, None]
    in_d = in_unit < per_unit
    d = (lead + in_unit).to(tl.int64)
    n = tl.arange(0, NI)[None, :, None] * NK + tl.arange(0, NK)[None, None, :]
    in_n = n < N
    a = tl.load(A + d * A_d + n.to(tl.int64) * A_n, in_d & in_n, 0.0).to(tl.float32) * LOG2E
    bias, skip = 0.0, 0.0
    if delta_bias is not None:
        bias = tl.load(delta_bias + d * bias_d, in_d, 0.0).to(tl.float32)
    if D is not None:
        skip = tl.load(D + d * D_d, in_d, 0.0).to(tl.float32)
    for i in range(BATCHES):
        b = (tl.program_id(0) * BATCHES + i).to(tl.int64)
        here = in_d & (b < batch)
        here_n = in_n & (b < batch)
        h = held_zeros(a)
        if h0 is not None:
            h = tl.load(h0 + b * h_b + d * h_d + n.to(tl.int64) * h_n, here & in_n, 0.0).to(tl.float32)
        for t in tl.static_range(L):
            x = tl.load(u + b * u_b + d * u_d + t * u_l, here, 0.0).to(tl.float32)
            dt = tl.load(delta + b * dt_b + d * dt_d + t * dt_l, here, 0.0).to(tl.float32) + bias
            if SOFTPLUS:
                dt = softplus(dt)
            in_B = here & in_n if B_CONSTANT else here_n
            in_C = here & in_n if C_CONSTANT else here_n
            B_t = _tile(B, b, d if B_CONSTANT else lead, n, t, B_b, B_g, B_n, B_l, per_B, in_B, B_CONSTANT, ONCE)
            C_t = _tile(C, b, d if C_CONSTANT else lead, n, t, C_b, C_g, C_n, C_l, per_C, in_C, C_CONSTANT, ONCE)
            if t == 0 and h0 is None:  # a state that is zero needs no decay
                h = (dt * x) * B_t + h
            else:
                h = exp2(dt * a) * h + (dt * x) * B_t
            y = tl.sum(tl.sum(h * C_t, 1, keep_dims=True), 2, keep_dims=True) + skip * x
            if z is not None:
                gate = tl.load(z + b * z_b + d * z_d + t * z_l, here, 0.0).to(tl.float32)
                y = y * gate * sigmoid(gate)
            tl.store(out + b * o_b + d * o_d + t * o_l, y, here)
        if hT is not None:
            tl.store(hT + (b * channels + d) * N + n, h, here & in_n)


@triton.jit
def compose(a, b, a_next, b_next):
    """h -> a h + b, then h -> a_next h + b_next."""
    return a * a_next, a_next * b + b_next


@triton.jit
def _long(
    u, delta, A, B, C, D, z, delta_bias, h0, out, hT, carry, offsets,
    u_b, u_d, u_l, dt_b, dt_d, dt_l, A_d, A_n, B_b, B_g, B_n, B_l, C_b, C_g, C_n, C_l, D_d, z_b, z_d, z_l, bias_d,
    h_b, h_d, h_n, o_b, o_d, o_l,
    length, channels, N, per_unit, blocks, per_B, per_C, chunks_each,
    SOFTPLUS: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr, KEEP: tl.constexpr,
    BD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1).to(tl.int64)
    b, begin = s, 0
    row = s * chunks_each if KEEP else s  # of `carry`, for the first chunk
    if offsets is not None:
        b = tl.zeros([], tl.int64)
        begin = tl.load(offsets + s)
        length = (tl.load(offsets + s + 1) - begin).to(tl.int32)
        row = begin // CHUNK + s if KEEP else s
    lead = (tl.program_id(0) // blocks) * per_unit
    in_unit = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)[:, None]
    in_d = in_unit < per_unit
    d = (lead + in_unit).to(tl.int64)  # [BD, 1]
    bias, skip = 0.0, 0.0
    if delta_bias is not None:
        bias = tl.load(delta_bias + d * bias_d, in_d, 0.0).to(tl.float32)
    if D is not None:
        skip = tl.load(D + d * D_d, in_d, 0.0).to(tl.float32)
    steps = tl.arange(0, T)[None, :]
    chunks = tl.cdiv(length, T)
    for c in range(chunks):
        in_t = c * T + steps < length
        t = (begin + c * T + steps).to(tl.int64)
        here = in_d & in_t
        x = tl.load(u + b * u_b + d * u_d + t * u_l, here, 0.0).to(tl.float32)
        dt = tl.load(delta + b * dt_b + d * dt_d + t * dt_l, here, 0.0).to(tl.float32) + bias
        if SOFTPLUS:
            dt = softplus(dt)
        dt = tl.where(here, dt, 0.0)  # steps past the end keep the state
        dx = dt * x
        y = tl.zeros([BD, T], tl.float32)
        for n in range(N):
            a = tl.load(A + d * A_d + n * A_n, in_d, 0.0).to(tl.float32) * LOG2E  # [BD, 1]
            h_in = tl.zeros([BD, 1], tl.float32)
            if c > 0:
                h_in = tl.load(carry + ((row + (c if KEEP else 0)) * channels + d) * N + n, in_d, 0.0)
            elif h0 is not None:
                h_in = tl.load(h0 + s * h_b + d * h_d + n * h_n, in_d, 0.0).to(tl.float32)
            n_B = n + tl.zeros([1, 1], tl.int32)
            B_t = _tile(B, b, d if B_CONSTANT else lead, n_B, t, B_b, B_g, B_n, B_l, per_B,
                        here if B_CONSTANT else in_t, B_CONSTANT, ONCE)  # fmt: skip
            C_t = _tile(C, b, d if C_CONSTANT else lead, n_B, t, C_b, C_g, C_n, C_l, per_C,
                        here if C_CONSTANT else in_t, C_CONSTANT, ONCE)  # fmt: skip
            decay = exp2(dt * a)
            step = dx * B_t
            step = tl.where(steps == 0, decay * h_in + step, step)
            _, h = tl.associative_scan((decay, step), 1, compose)
            y += h * C_t
            last = tl.sum(tl.where(steps == T - 1, h, 0.0), 1, keep_dims=True)
            if c + 1 < chunks:
                tl.store(carry + ((row + (c + 1 if KEEP else 0)) * channels + d) * N + n, last, in_d)
            elif hT is not None:
                tl.store(hT + (s * channels + d) * N + n, last, in_d)
        y += skip * x
        if z is not None:
            gate = tl.load(z + b * z_b + d * z_d + t * z_l, here, 0.0).to(tl.float32)
            y = y * gate * sigmoid(gate)
        tl.store(out + b * o_b + d * o_d + t * o_l, y, here)
        tl.debug_barrier()  # the next chunk reads what this one wrote into `carry`


def optional(x: Tensor | None, rank: int) -> tuple[int, ...]:
    return x.stride() if x is not None else (0,) * rank


def is_short(shape: Shape, packed: Packed | None) -> bool:
    return packed is None and shape.length <= SHORT and shape.state <= WIDEST


def carried(batch: Any, length: Any, sequences: Any) -> Any:
    """Rows of `carry` [rows, D, N] in which the long regime leaves the state before every chunk; None: not packed."""
    if sequences is None:
        return batch * ((length + CHUNK.value - 1) // CHUNK.value)
    return length // CHUNK.value + sequences


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
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state, out, final_state)
    steps = (
        *u.stride(), *delta.stride(), *A.stride(), *strides(B), *strides(C), *optional(D, 1), *optional(z, 3),
        *optional(delta_bias, 1), *optional(initial_state, 3), *out.stride(),
    )  # fmt: skip
    flags: dict[str, Any] = {"SOFTPLUS": delta_softplus, "B_CONSTANT": B.ndim == 2, "C_CONSTANT": C.ndim == 2}
    if is_short(shape, packed):
        BD, NI, NK, BATCHES, warps = short_tile(shape)
        blocks = triton.cdiv(shape.per_unit, BD)
        grid = (triton.cdiv(shape.batch, BATCHES), shape.units * blocks)
        sizes = (shape.batch, shape.channels, shape.state, shape.per_unit, blocks, *shape.per_group)
        _short[grid](
            *inputs, *steps, *sizes, L=shape.length, BD=BD, NI=NI, NK=NK, BATCHES=BATCHES, num_warps=warps, **flags
        )
        return
    T = shape.chunk
    BD, warps = long_tile(shape, T)
    blocks = triton.cdiv(shape.per_unit, BD)
    keep = carry is not None
    if carry is None:
        carry = u.new_empty((shape.sequences, shape.channels, shape.state), dtype=torch.float32)
    sizes = (shape.length, shape.channels, shape.state, shape.per_unit, blocks, *shape.per_group)
    offsets = None if packed is None else packed.offsets
    _long[(shape.units * blocks, shape.sequences)](
        *inputs, carry, offsets, *steps, *sizes, triton.cdiv(shape.length, T), KEEP=keep, BD=BD, T=T, num_warps=warps,
        **flags,
    )  # fmt: skip


def _trivial(shape, u, D, z, initial_state, out, final_state) -> None:
    """No step, or no state: the final state is the initial one, the output what the skip lets through."""
    if final_state is not None:
        final_state.copy_(initial_state) if initial_state is not None else final_state.zero_()
    if shape.length:
        y = torch.zeros_like(u, dtype=torch.float32) if D is None else u.float() * D.float()[:, None]
        out.copy_(y if z is None else y * torch.nn.functional.silu(z.float()))


def short_tile(shape: Shape, most: int = 64) -> tuple[int, int, int, int, int]:
    """Channels, state dimensions a thread and along lanes, batch entries in turn, warps."""
    NK = min(32, triton.next_power_of_2(shape.state))
    NI = triton.next_power_of_2(triton.cdiv(shape.state, NK))
    warps = 8 if NI > 1 else 4
    lanes = max(1, 32 // max(1, NK // 4))  # along the channels
    each = max(1, 8 // NI) if most > 32 else 1  # channels a thread
    BD = min(most, lanes * warps * each, max(1, triton.next_power_of_2(shape.per_unit)))
    programs = shape.batch * shape.units * triton.cdiv(shape.per_unit, BD)
    return BD, NI, NK, 4 if programs >= 8192 else 1, warps


def long_tile(shape: Shape, T: int) -> tuple[int, int]:
    """Channels and warps."""
    BD = max(1, min(1024 // T, triton.next_power_of_2(shape.per_unit)))
    return BD, max(1, min(4, BD * T // 256))
