"""The selective scan backward of short sequences, from zero or from a state; `ssm_scan_bwd` says what is computed.

A program holds channels × state in registers and walks time, unrolled, for several batch entries in turn. What has no
state dimension is computed on tiles [channels, steps], an element a thread, and passed on as columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .math import COMPILED, LOG2E, exp2, sigmoid, softplus
from .ssm_scan import SHORT, Packed, Shape, _room, _split, _spread, every_other, held_zeros, strides

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Of loads that come a second time: otherwise the compiler keeps what the first gave, and all that was computed from it,
# in registers that are not there.
AGAIN: tl.constexpr = tl.constexpr("evict_last")
ONCE: tl.constexpr = tl.constexpr("")
WIDEST = 512  # state dimensions that the short regime holds in registers


@triton.jit
def _columns(x, K: tl.constexpr, PAD: tl.constexpr):
    """[BD, K * PAD] as the K columns [BD, 1, 1] that lie PAD apart."""
    if PAD == 1:
        return _split(x, K)
    else:
        even, _ = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
        return _columns(even, K, PAD // 2)


@triton.jit
def _tile_of(columns, K: tl.constexpr, PAD: tl.constexpr):
    """K columns [BD, 1, 1] as [BD, K * PAD], each PAD times."""
    if PAD > 1:
        half = _tile_of(columns, K, PAD // 2)
        return tl.join(half, half).reshape(half.shape[0], K * PAD)
    elif K == 1:
        return columns[0].reshape(columns[0].shape[0], 1)
    else:
        even = _tile_of(every_other(columns, 0, K // 2), K // 2, 1)
        odd = _tile_of(every_other(columns, 1, K // 2), K // 2, 1)
        return tl.join(even, odd).reshape(even.shape[0], K)


@triton.jit
def _add_2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add_4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add_8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def _some(tiles, first: tl.constexpr, COUNT: tl.constexpr):
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tiles[first + i],)
    return found


@triton.jit
def _over_channels(tiles, COUNT: tl.constexpr, MOST: tl.constexpr):
    """COUNT tiles [X, NI, NK] summed over the first axis, up to MOST behind the same barriers: tiles [1, NI, NK]."""
    if COUNT == 1 or not COMPILED:  # the interpreter takes a minute for several
        sums = ()
        for i in tl.static_range(COUNT):
            sums = sums + (tl.sum(tiles[i], 0, keep_dims=True),)
        return sums
    elif COUNT > MOST:
        return _over_channels(_some(tiles, 0, MOST), MOST, MOST) + _over_channels(
            _some(tiles, MOST, COUNT - MOST), COUNT - MOST, MOST
        )
    elif COUNT == 8:
        return tl.reduce(tiles, 0, _add_8, keep_dims=True)
    elif COUNT == 4:
        return tl.reduce(tiles, 0, _add_4, keep_dims=True)
    elif COUNT == 2:
        return tl.reduce(tiles, 0, _add_2, keep_dims=True)
    else:
        return _over_channels(tiles, COUNT, MOST // 2)


@triton.jit
def _fixed(x):
    """x, of which the compiler moves elements to where they are used instead of computing them there again."""
    return tl.sum(x.reshape(x.shape[0], 1, x.shape[1]), 1)


@triton.jit
def _thread_sum(x, R: tl.constexpr):
    """Sum over the channels that a thread holds, R of them."""
    if R == 1:
        return x
    else:
        return tl.sum(x.reshape(R, x.shape[0] // R, x.shape[1], x.shape[2]), 0)


@triton.jit
def _over_states(x):
    return tl.sum(tl.sum(x, 1, keep_dims=True), 2, keep_dims=True)


@triton.jit
def _store_in_turn(into, row, mask, turn, which: tl.constexpr):
    """A row [1, NI, NK] that all warps have, by those whose turn it is: as a tile in the layout that the row has."""
    tl.store(into + turn * 0, row, mask & (turn == which))


@triton.jit
def _short_bwd(
    u, delta, A, B, C, D, z, delta_bias, h0, dout, dhT,
    du, ddelta, dA, dB, dC, dD, dz, dbias, dh0,
    u_b, u_d, u_l, dt_b, dt_d, dt_l, A_d, A_n, B_b, B_g, B_n, B_l, C_b, C_g, C_n, C_l, D_d, z_b, z_d, z_l, bias_d,
    h_b, h_d, h_n, do_b, do_d, do_l, dhT_b, dhT_d, dhT_n,
    du_b, du_d, du_l, ddt_b, ddt_d, ddt_l, dz_b, dz_d, dz_l,
    batch, channels, N, per_unit, blocks, per_B, per_C, groups_B, groups_C, batches,
    L: tl.constexpr, K: tl.constexpr, SOFTPLUS: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
    BD: tl.constexpr, NI: tl.constexpr, NK: tl.constexpr, R: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    # Lanes lie along the last axis first, then along the channels, as do warps: a thread holds all of the middle one
    # and R channels.
    NP: tl.constexpr = NI * NK
    X: tl.constexpr = BD // R
    EACH: tl.constexpr = (dC is not None and not C_CONSTANT) + (dB is not None and not B_CONSTANT)
    turn = tl.arange(0, X)[:, None, None]
    part, block = tl.program_id(0), tl.program_id(1)
    lead = (block // blocks) * per_unit
    in_unit = (block % blocks) * BD + tl.arange(0, BD)
    in_d = (in_unit < per_unit)[:, None, None]
    d = (lead + in_unit).to(tl.int64)[:, None, None]
    in_row = (in_unit < per_unit)[:, None]
    row_d = (lead + in_unit).to(tl.int64)[:, None]
    n = tl.arange(0, NI)[None, :, None] * NK + tl.arange(0, NK)[None, None, :]
    in_n = n < N
    in_dn = in_d & in_n
    a = tl.load(A + d * A_d + n.to(tl.int64) * A_n, in_dn, 0.0).to(tl.float32) * LOG2E
    if B_CONSTANT:
        B_t = tl.load(B + d * B_g + n.to(tl.int64) * B_n, in_dn, 0.0).to(tl.float32)
    if C_CONSTANT:
        C_t = tl.load(C + d * C_g + n.to(tl.int64) * C_n, in_dn, 0.0).to(tl.float32)
    bias, skip = 0.0, 0.0
    if delta_bias is not None:
        bias = tl.load(delta_bias + row_d * bias_d, in_row, 0.0).to(tl.float32)
    if D is not None:
        skip = tl.load(D + row_d * D_d, in_row, 0.0).to(tl.float32)
    k = tl.arange(0, K * PAD)[None, :]
    step = k // PAD
    is_step = (step < L) & (k % PAD == 0)
    t = step.to(tl.int64)
    # A factor that the compiler does not know: decays are computed twice, as there are no registers to keep them in.
    one = tl.where(batch > 0, 1.0, 0.0)
    zeros = held_zeros(a)
    sum_A = zeros
    sum_B = zeros
    sum_C = zeros
    for i in range(batches):
        b = (part * batches + i).to(tl.int64)
        there = b < batch
        b = tl.minimum(b, batch - 1)
        here = in_row & there & is_step
        here_dn = in_dn & there
        of_B = B
        if not B_CONSTANT:
            of_B = B + ((b * groups_B + lead // per_B) * L * NP + n)
        of_C = C
        if not C_CONSTANT:
            of_C = C + ((b * groups_C + lead // per_C) * L * NP + n)
        x = tl.load(u + b * u_b + row_d * u_d + t * u_l, here, 0.0).to(tl.float32)
        raw = tl.load(delta + b * dt_b + row_d * dt_d + t * dt_l, here, 0.0).to(tl.float32) + bias
        dt = softplus(raw) if SOFTPLUS else raw
        g = x * 0.0
        if dout is not None:
            g = tl.load(dout + b * do_b + row_d * do_d + t * do_l, here, 0.0).to(tl.float32)
        if z is not None:
            gate = tl.load(z + b * z_b + row_d * z_d + t * z_l, here, 0.0).to(tl.float32)
            s = sigmoid(gate)
            to_z = g * s * (1.0 + gate * (1.0 - s))
            g = g * gate * s
        dts = _columns(_fixed(dt), K, PAD)
        dxs = _columns(_fixed(dt * x), K, PAD)
        h = zeros
        if h0 is not None:
            h = tl.load(h0 + b * h_b + d * h_d + n.to(tl.int64) * h_n, here_dn, 0.0).to(tl.float32)
        states = ()
        for j in tl.static_range(L):
            states = states + (h,)
            if not B_CONSTANT:
                B_t = tl.load(of_B + j * NP)
            if j == 0 and h0 is None:
                h = dxs[j] * B_t + h
            else:
                h = exp2(dts[j] * a) * h + dxs[j] * B_t
        gs = _columns(_fixed(g), K, PAD)
        dh = zeros
        if dhT is not None:
            dh = tl.load(dhT + b * dhT_b + d * dhT_d + n.to(tl.int64) * dhT_n, here_dn, 0.0).to(tl.float32)
        ys = ()
        through_B = ()
        through_A = ()
        over = ()  # what is to be summed over channels
        for j in tl.static_range(L - 1, -1, -1):
            if not B_CONSTANT:
                B_t = tl.load(of_B + j * NP, eviction_policy=AGAIN)
            if not C_CONSTANT:
                C_t = tl.load(of_C + j * NP)
            if dz is not None:
                ys = (_over_states(h * C_t),) + ys
            dh += C_t * gs[j]
            if dC is not None:
                if C_CONSTANT:
                    sum_C += h * gs[j]
                else:
                    over = over + (_thread_sum(h * gs[j], R),)
            if dB is not None:
                if B_CONSTANT:
                    sum_B += dh * dxs[j]
                else:
                    over = over + (_thread_sum(dh * dxs[j], R),)
            through_B = (_over_states(dh * B_t),) + through_B
            h = states[j]
            if j > 0 or h0 is not None:
                dh = exp2((dts[j] * one) * a) * dh
                moved = dh * h
                sum_A += moved * dts[j]
                through_A = (_over_states(moved * a),) + through_A
            else:
                through_A = (through_B[0] * 0.0,) + through_A
        for _ in tl.static_range(K - L):
            through_B = through_B + (through_B[0],)
            through_A = through_A + (through_A[0],)
            if dz is not None:
                ys = ys + (ys[0],)
        if EACH > 0:
            rows = _over_channels(over, L * EACH, 8)
            for j in tl.static_range(L):
                at = ((block.to(tl.int64) * batch + b) * L + j) * N + n
                if dC is not None and not C_CONSTANT:
                    _store_in_turn(dC + at, rows[(L - 1 - j) * EACH], in_n & there, turn, (2 * j) % X)
                if dB is not None and not B_CONSTANT:
                    _store_in_turn(dB + at, rows[(L - j) * EACH - 1], in_n & there, turn, (2 * j + 1) % X)
        to_B = _tile_of(through_B, K, PAD)
        ddt = x * to_B + LN2 * _tile_of(through_A, K, PAD)
        if SOFTPLUS:
            ddt *= tl.where(raw > 20.0, 1.0, sigmoid(raw))
        if du is not None:
            tl.store(du + b * du_b + row_d * du_d + t * du_l, dt * to_B + skip * g, here)
        if ddelta is not None:
            tl.store(ddelta + b * ddt_b + row_d * ddt_d + t * ddt_l, ddt, here)
        if dz is not None:
            tl.store(dz + b * dz_b + row_d * dz_d + t * dz_l, to_z * (_tile_of(ys, K, PAD) + skip * x), here)
        if dh0 is not None:
            tl.store(dh0 + (b * channels + d) * N + n, dh, here_dn)
        if dD is not None:
            tl.store(dD + b * channels + row_d, tl.sum(g * x, 1, keep_dims=True), in_row & there)
        if dbias is not None:
            sums = tl.sum(tl.where(here, ddt, 0.0), 1, keep_dims=True)
            tl.store(dbias + b * channels + row_d, sums, in_row & there)
    place = (part.to(tl.int64) * channels + d) * N + n
    if dA is not None:
        tl.store(dA + place, sum_A, in_dn)
    if B_CONSTANT and dB is not None:
        tl.store(dB + place, sum_B, in_dn)
    if C_CONSTANT and dC is not None:
        tl.store(dC + place, sum_C, in_dn)


def is_short(shape: Shape, packed: Packed | None) -> bool:
    return packed is None and shape.length <= SHORT and shape.state <= WIDEST


class ShortTile(NamedTuple):
    """Channels, state dimensions a thread and along lanes, and warps of a program."""

    BD: int
    NI: int
    NK: int
    warps: int

    @property
    def held(self) -> int:
        """Channels a thread."""
        return max(1, self.BD // (max(1, 32 // max(1, self.NK // 4)) * self.warps))


def short_tile(shape: Shape) -> ShortTile:
    """More threads than state dimensions: the compiler takes loads of fewer elements than threads to be cheap."""
    padded = triton.next_power_of_2(shape.state)
    NK = min(128, padded)
    warps = 4 if padded < 128 else 8 if padded == 128 else 16
    held = max(1, padded // 16) if padded < 128 else 4 if padded == 128 else 1
    lanes = max(1, 32 // max(1, NK // 4))  # along the channels
    BD = min(held * lanes * warps, triton.next_power_of_2(shape.per_unit))
    return ShortTile(BD, padded // NK, NK, warps)


def short_bwd(
    inputs: Any, into: Any, steps: Any, sizes: Any, shape: Shape, batches: int, flags: dict[str, Any]
) -> None:
    """Launch the kernel on what `ssm_scan_bwd` gathered."""
    tile = short_tile(shape)
    u, delta, A, B, C, *others = inputs
    room = [_room(M, shape, shape.length, tile.NI * tile.NK) for M in (B, C)]
    groups = (shape.groups_B, shape.groups_C)
    K = triton.next_power_of_2(shape.length)
    if any(M is not None for M in room):
        _spread[(1, shape.batch, max(groups))](
            B, C, *room, *strides(B), *strides(C), *groups, shape.length, shape.state, shape.length,
            T=K, NP=tile.NI * tile.NK, num_warps=4,
        )  # fmt: skip
    # As many elements as threads, or the compiler has every thread load and compute all that it needs for itself.
    pad = max(1, 32 * tile.warps // (tile.BD * K))
    blocks = triton.cdiv(shape.per_unit, tile.BD)
    _short_bwd[(triton.cdiv(shape.batch, batches), shape.units * blocks)](
        u, delta, A, *(M if into is None else into for M, into in zip((B, C), room, strict=True)), *others,
        *into, *steps, shape.batch, *sizes, *groups, batches, L=shape.length, K=K,
        BD=tile.BD, NI=tile.NI, NK=tile.NK, R=tile.held, PAD=pad,
        num_warps=tile.warps, **flags,
    )  # fmt: skip
