"""The selective scan backward of short sequences, from zero or from a state; `ssm_scan_bwd` says what is computed.

A program holds channels × state in registers and walks time, unrolled, for several batch entries in turn.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .math import LOG2E, exp2, sigmoid, softplus
from .ssm_scan import SHORT, Packed, Shape, held_zeros

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Of loads that come a second time: otherwise the compiler keeps what the first gave, and all that was computed from it,
# in registers that are not there.
AGAIN: tl.constexpr = tl.constexpr("evict_last")
ONCE: tl.constexpr = tl.constexpr("")
WIDEST = 512  # state dimensions that the short regime holds in registers


@triton.jit
def _tile(M, batch, channel, n, t, s_b, s_g, s_n, s_l, per_group, mask, CONSTANT: tl.constexpr, KIND: tl.constexpr):
    """B or C at the places given, in float32; `channel` is any one of the group where they are not CONSTANT in time."""
    group = channel if CONSTANT else channel // per_group
    offset = batch * s_b + group.to(tl.int64) * s_g + n.to(tl.int64) * s_n + t * s_l
    return tl.load(M + offset, mask, 0.0, eviction_policy=KIND).to(tl.float32)


@triton.jit
def _short_bwd(
    u, delta, A, B, C, D, z, delta_bias, h0, dout, dhT,
    du, ddelta, dA, dB, dC, dD, dz, dbias, dh0,
    u_b, u_d, u_l, dt_b, dt_d, dt_l, A_d, A_n, B_b, B_g, B_n, B_l, C_b, C_g, C_n, C_l, D_d, z_b, z_d, z_l, bias_d,
    h_b, h_d, h_n, do_b, do_d, do_l, dhT_b, dhT_d, dhT_n,
    du_b, du_d, du_l, ddt_b, ddt_d, ddt_l, dz_b, dz_d, dz_l,
    batch, channels, N, per_unit, blocks, per_B, per_C, batches,
    L: tl.constexpr, SOFTPLUS: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
    BD: tl.constexpr, NI: tl.constexpr, NK: tl.constexpr,
):  # fmt: skip
    part, block = tl.program_id(0), tl.program_id(1)
    lead = (block // blocks) * per_unit
    in_unit = (block % blocks) * BD + tl.arange(0, BD)[:, None, None]
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
    zeros = held_zeros(a)
    sum_A = zeros
    sum_B = zeros
    sum_C = zeros
    for i in range(batches):
        b = (part * batches + i).to(tl.int64)
        here = in_d & (b < batch)
        here_n = in_n & (b < batch)
        here_dn = here & in_n
        h = zeros
        if h0 is not None:
            h = tl.load(h0 + b * h_b + d * h_d + n.to(tl.int64) * h_n, here_dn, 0.0).to(tl.float32)
        states = ()
        for t in tl.static_range(L):
            states = states + (h,)
            x = tl.load(u + b * u_b + d * u_d + t * u_l, here, 0.0).to(tl.float32)
            dt = tl.load(delta + b * dt_b + d * dt_d + t * dt_l, here, 0.0).to(tl.float32) + bias
            if SOFTPLUS:
                dt = softplus(dt)
            B_t = _tile(B, b, d if B_CONSTANT else lead, n, t, B_b, B_g, B_n, B_l, per_B,
                        here_dn if B_CONSTANT else here_n, B_CONSTANT, ONCE)  # fmt: skip
            if t == 0 and h0 is None:
                h = (dt * x) * B_t + zeros
            else:
                h = exp2(dt * a) * h + (dt * x) * B_t
        sum_D = tl.zeros([BD, 1, 1], tl.float32)
        sum_bias = tl.zeros([BD, 1, 1], tl.float32)
        dh = zeros
        if dhT is not None:
            dh = tl.load(dhT + b * dhT_b + d * dhT_d + n.to(tl.int64) * dhT_n, here_dn, 0.0).to(tl.float32)
        for t in tl.static_range(L - 1, -1, -1):
            x = tl.load(u + b * u_b + d * u_d + t * u_l, here, 0.0, eviction_policy=AGAIN).to(tl.float32)
            raw = (
                tl.load(delta + b * dt_b + d * dt_d + t * dt_l, here, 0.0, eviction_policy=AGAIN).to(tl.float32) + bias
            )
            dt = softplus(raw) if SOFTPLUS else raw
            g = tl.zeros([BD, 1, 1], tl.float32)
            if dout is not None:
                g = tl.load(dout + b * do_b + d * do_d + t * do_l, here, 0.0).to(tl.float32)
            B_t = _tile(B, b, d if B_CONSTANT else lead, n, t, B_b, B_g, B_n, B_l, per_B,
                        here_dn if B_CONSTANT else here_n, B_CONSTANT, AGAIN)  # fmt: skip
            C_t = _tile(C, b, d if C_CONSTANT else lead, n, t, C_b, C_g, C_n, C_l, per_C,
                        here_dn if C_CONSTANT else here_n, C_CONSTANT, AGAIN)  # fmt: skip
            if z is not None:
                gate = tl.load(z + b * z_b + d * z_d + t * z_l, here, 0.0).to(tl.float32)
                s = sigmoid(gate)
                if dz is not None:
                    y = tl.sum(tl.sum(h * C_t, 1, keep_dims=True), 2, keep_dims=True) + skip * x
                    tl.store(dz + b * dz_b + d * dz_d + t * dz_l, g * y * s * (1.0 + gate * (1.0 - s)), here)
                g = g * gate * s
            dh += C_t * g
            if dC is not None:
                if C_CONSTANT:
                    sum_C += h * g
                else:
                    row = ((block.to(tl.int64) * batch + b) * L + t) * N + n
                    tl.store(dC + row, tl.sum(h * g, 0, keep_dims=True), here_n)
            if dB is not None:
                if B_CONSTANT:
                    sum_B += dh * (dt * x)
                else:
                    row = ((block.to(tl.int64) * batch + b) * L + t) * N + n
                    tl.store(dB + row, tl.sum(dh * (dt * x), 0, keep_dims=True), here_n)
            through_B = tl.sum(tl.sum(dh * B_t, 1, keep_dims=True), 2, keep_dims=True)
            ddt = x * through_B
            h = states[t]
            if t > 0 or h0 is not None:
                dh = exp2(dt * a) * dh
                moved = dh * h
                sum_A += moved * dt
                ddt += LN2 * tl.sum(tl.sum(moved * a, 1, keep_dims=True), 2, keep_dims=True)
            if du is not None:
                tl.store(du + b * du_b + d * du_d + t * du_l, dt * through_B + skip * g, here)
            if SOFTPLUS:
                ddt *= tl.where(raw > 20.0, 1.0, sigmoid(raw))
            if ddelta is not None:
                tl.store(ddelta + b * ddt_b + d * ddt_d + t * ddt_l, ddt, here)
            sum_bias += ddt
            sum_D += g * x
        if dh0 is not None:
            tl.store(dh0 + (b * channels + d) * N + n, dh, here_dn)
        if dD is not None:
            tl.store(dD + b * channels + d, sum_D, here)
        if dbias is not None:
            tl.store(dbias + b * channels + d, sum_bias, here)
    place = (part.to(tl.int64) * channels + d) * N + n
    if dA is not None:
        tl.store(dA + place, sum_A, in_d & in_n)
    if B_CONSTANT and dB is not None:
        tl.store(dB + place, sum_B, in_d & in_n)
    if C_CONSTANT and dC is not None:
        tl.store(dC + place, sum_C, in_d & in_n)


def is_short(shape: Shape, packed: Packed | None) -> bool:
    return packed is None and shape.length <= SHORT and shape.state <= WIDEST


def short_tile(shape: Shape) -> tuple[int, int, int, int]:
    """Channels, state dimensions a thread and along lanes, warps."""
    NK = min(32, triton.next_power_of_2(shape.state))
    NI = triton.next_power_of_2(triton.cdiv(shape.state, NK))
    warps = 8 if NI > 1 else 4
    lanes = max(1, 32 // max(1, NK // 4))  # along the channels
    return min(32, lanes * warps, triton.next_power_of_2(shape.per_unit)), NI, NK, warps


def short_bwd(
    inputs: Any, into: Any, steps: Any, sizes: Any, shape: Shape, batches: int, flags: dict[str, Any]
) -> None:
    """Launch the kernel on what `ssm_scan_bwd` gathered."""
    BD, NI, NK, warps = short_tile(shape)
    blocks = triton.cdiv(shape.per_unit, BD)
    _short_bwd[(triton.cdiv(shape.batch, batches), shape.units * blocks)](
        *inputs, *into, *steps, shape.batch, *sizes, batches, L=shape.length, BD=BD, NI=NI, NK=NK, num_warps=warps,
        **flags,
    )  # fmt: skip
