"""The selective scan backward, in two regimes.

short: a program holds channels × state in registers and walks time, unrolled, for several batch entries in turn.
long: a program walks a sequence in chunks of time, the last one first; inside a chunk, for one state dimension after
the other, both recurrences are associative scans over time (Blelloch, "Prefix Sums and Their Applications", 1990).

With g_t the gradient of y_t and ḣ_t that of h_t, from the last step to the first:

    ḣ_t = C_t g_t + a_{t+1} ḣ_{t+1}          a_t = exp(Δ_t A)
    dC_t = Σ_d g_t h_t                       dB_t = Σ_d ḣ_t Δ_t u_t
    dΔ_t = Σ_n ḣ_t (a_t h_{t-1} A + B_t u_t) du_t = Δ_t Σ_n ḣ_t B_t + D g_t
    dA = Σ_t ḣ_t a_t h_{t-1} Δ_t             dD = Σ_t g_t u_t

Sums over channels and over the batch are written by each program into its own part of a buffer and added up afterwards:
the same numbers in the same order every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import LOG2E, exp2, sigmoid, softplus
from .ssm_scan import CHUNK, Packed, Shape, carried, every_other, optional, ssm_scan, strides, woven
from .ssm_scan_bwd_short import AGAIN, LN2, ONCE, is_short, short_bwd, short_tile

BUSY = 1056  # programs of a warp: two for each scheduler of the device
SUMS = 2 << 30  # bytes of the sums over channels, from where on programs take more channels in turn


@triton.jit
def _columns(x, K: tl.constexpr):
    """[S, BD, K] as its K columns [S, BD]."""
    if K == 1:
        return (x.reshape(x.shape[0], x.shape[1]),)
    else:
        even, odd = tl.split(x.reshape(x.shape[0], x.shape[1], K // 2, 2))
        return woven(_columns(even, K // 2), _columns(odd, K // 2), K // 2)


@triton.jit
def _tile_of(columns, K: tl.constexpr):
    """K columns [S, BD] as [S, BD, K]."""
    if K == 1:
        return columns[0].reshape(columns[0].shape[0], columns[0].shape[1], 1)
    else:
        even = _tile_of(every_other(columns, 0, K // 2), K // 2)
        odd = _tile_of(every_other(columns, 1, K // 2), K // 2)
        return tl.join(even, odd).reshape(even.shape[0], even.shape[1], K)


@triton.jit
def _block(M, batch, d, t, s_b, s_d, s_l, mask, K: tl.constexpr, KIND: tl.constexpr):
    """Columns of u, delta, z or a gradient at channels d [1, BD, 1] and times t [S, 1, K], in float32."""
    tile = tl.load(M + batch * s_b + d * s_d + t * s_l, mask, 0.0, eviction_policy=KIND)
    return _columns(tile.to(tl.float32), K)


@triton.jit
def _row(M, batch, channel, n, t, s_b, s_g, s_n, s_l, per_group, mask, CONSTANT: tl.constexpr):
    """State n of B or C at times t, as it lies in memory."""
    group = channel if CONSTANT else channel // per_group
    return tl.load(M + batch * s_b + group * s_g + n * s_n + t * s_l, mask, 0.0)


@triton.jit
def _entering(kept, given, seq, d, n, s_b, s_d, s_n, mask, is_kept):
    """State n, or its gradient, [1, BD], as another chunk left it or as it was given; zero by default."""
    x = tl.zeros([1, mask.shape[1]], tl.float32)
    if is_kept:
        x = tl.load(kept + n, mask, 0.0)
    elif given is not None:
        x = tl.load(given + seq * s_b + d * s_d + n * s_n, mask, 0.0).to(tl.float32)
    return x


@triton.jit
def _compose(a, b, a_next, b_next):
    """h -> a h + b, then h -> a_next h + b_next."""
    return a * a_next, a_next * b + b_next


@triton.jit
def _long_bwd(
    u, delta, A, B, C, D, z, delta_bias, h0, dout, dhT, carry, back, offsets,
    du, ddelta, dA, dB, dC, dD, dz, dbias, dh0,
    u_b, u_d, u_l, dt_b, dt_d, dt_l, A_d, A_n, B_b, B_g, B_n, B_l, C_b, C_g, C_n, C_l, D_d, z_b, z_d, z_l, bias_d,
    h_b, h_d, h_n, do_b, do_d, do_l, dhT_b, dhT_d, dhT_n,
    du_b, du_d, du_l, ddt_b, ddt_d, ddt_l, dz_b, dz_d, dz_l,
    length, total, channels, N, per_unit, blocks, per_B, per_C, chunks_each,
    SOFTPLUS: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
    BD: tl.constexpr, S: tl.constexpr, K: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    # Lanes lie along the last axis first, K steps a thread, then along S, and warps along the channels.
    T: tl.constexpr = S * K
    seq = tl.program_id(1).to(tl.int64)
    b, begin, row = seq, 0, seq * chunks_each
    if offsets is not None:
        b = seq * 0
        begin = tl.load(offsets + seq).to(tl.int32)
        length = tl.load(offsets + seq + 1).to(tl.int32) - begin
        row = begin // CHUNK + seq
    batch = 1 if offsets is not None else tl.num_programs(1)
    block = tl.program_id(0)
    lead = ((block // blocks) * per_unit).to(tl.int64)
    lane = tl.arange(0, S)[:, None]
    step3 = (lane * K)[:, :, None] + tl.arange(0, K)[None, None, :]  # [S, 1, K]
    before = tl.maximum(lane - 1, 0) + tl.zeros([S, BD], tl.int32)
    after = tl.minimum(lane + 1, S - 1) + tl.zeros([S, BD], tl.int32)
    chunks = tl.cdiv(length, T)
    if dh0 is not None and offsets is not None:
        if chunks == 0:  # a sequence without a step ends in the state it began with
            for n in range(N * TURNS):
                in_unit = ((block % blocks) * TURNS + n // N) * BD + tl.arange(0, BD)
                in_d = (in_unit < per_unit)[None, :]
                d = (lead + in_unit)[None, :]
                x = _entering(back, dhT, seq, d, n % N, dhT_b, dhT_d, dhT_n, in_d, False)
                tl.store(dh0 + (seq * channels + d) * N + n % N, x, in_d)
    for turn in range(TURNS * chunks):  # channels after channels, for each the chunks from the last to the first
        k_chunk = turn % chunks
        c = chunks - 1 - k_chunk
        in_unit = ((block % blocks) * TURNS + turn // chunks) * BD + tl.arange(0, BD)
        in_d = (in_unit < per_unit)[None, :]
        d = (lead + in_unit)[None, :]  # [1, BD]
        in_d3, d3 = in_d[:, :, None], d[:, :, None]
        bias, skip = 0.0, 0.0
        if delta_bias is not None:
            bias = tl.load(delta_bias + d * bias_d, in_d, 0.0).to(tl.float32)
        if D is not None:
            skip = tl.load(D + d * D_d, in_d, 0.0).to(tl.float32)
        start = c * T
        t3 = (begin + start + step3).to(tl.int64)
        here3 = in_d3 & (start + step3 < length)
        xs = _block(u, b, d3, t3, u_b, u_d, u_l, here3, K, ONCE)
        raws = _block(delta, b, d3, t3, dt_b, dt_d, dt_l, here3, K, ONCE)
        next_t = start + lane * K + K
        next_dt = tl.load(
            delta + b * dt_b + d * dt_d + (begin + next_t).to(tl.int64) * dt_l, in_d & (next_t < length), 0.0
        )
        next_dt = next_dt.to(tl.float32) + bias
        if SOFTPLUS:
            next_dt = softplus(next_dt)
        next_dt = tl.where(next_t < length, next_dt, 0.0)
        dts = ()
        dxs = ()
        gs = ()
        ys = ()
        through_B = ()
        through_A = ()
        all_dt = tl.zeros([S, BD], tl.float32)
        if dout is not None:
            douts = _block(dout, b, d3, t3, do_b, do_d, do_l, here3, K, ONCE)
        if z is not None:
            gates = _block(z, b, d3, t3, z_b, z_d, z_l, here3, K, ONCE)
        for k in tl.static_range(K):
            dt = raws[k] + bias
            if SOFTPLUS:
                dt = softplus(dt)
            dt = tl.where(start + lane * K + k < length, dt, 0.0)  # steps past the end keep the state
            all_dt += dt
            dts = dts + (dt,)
            dxs = dxs + (dt * xs[k],)
            if dout is not None:
                g = douts[k]
                if z is not None:
                    g = g * gates[k] * sigmoid(gates[k])
                gs = gs + (g,)
            else:
                gs = gs + (xs[k] * 0.0,)
            ys = ys + (skip * xs[k],)
            through_B = through_B + (tl.zeros([S, BD], tl.float32),)
            through_A = through_A + (tl.zeros([S, BD], tl.float32),)
        all_after = all_dt - dts[0] + next_dt
        at = (seq * channels + d) * N  # in buffers [B or S, D, N]
        part = ((row + c) * channels + d) * N  # in buffers [rows, D, N], a row for every chunk
        entering = carry + part
        # What a state dimension needs is on its way while the one before it is computed.
        a_next = tl.load(A + d * A_d, in_d, 0.0).to(tl.float32)
        h_next = _entering(entering, h0, seq, d, 0, h_b, h_d, h_n, in_d, c > 0)
        dh_next = _entering(back + at, dhT, seq, d, 0, dhT_b, dhT_d, dhT_n, in_d, k_chunk > 0)
        B_next = _row(B, b, d3 if B_CONSTANT else lead + d3 * 0, 0, t3, B_b, B_g, B_n, B_l, per_B, here3, B_CONSTANT)
        C_next = _row(C, b, d3 if C_CONSTANT else lead + d3 * 0, 0, t3, C_b, C_g, C_n, C_l, per_C, here3, C_CONSTANT)
        for n in range(N):
            place = at + n
            a, h_in, dh_out = a_next * LOG2E, h_next, dh_next  # [1, BD]
            Bs = _columns(B_next.to(tl.float32), K)
            Cs = _columns(C_next.to(tl.float32), K)
            m = tl.minimum(n + 1, N - 1)
            a_next = tl.load(A + d * A_d + m * A_n, in_d, 0.0).to(tl.float32)
            h_next = _entering(entering, h0, seq, d, m, h_b, h_d, h_n, in_d, c > 0)
            dh_next = _entering(back + at, dhT, seq, d, m, dhT_b, dhT_d, dhT_n, in_d, k_chunk > 0)
            B_next = _row(
                B, b, d3 if B_CONSTANT else lead + d3 * 0, m, t3, B_b, B_g, B_n, B_l, per_B, here3, B_CONSTANT
            )
            C_next = _row(
                C, b, d3 if C_CONSTANT else lead + d3 * 0, m, t3, C_b, C_g, C_n, C_l, per_C, here3, C_CONSTANT
            )

            into = ((block.to(tl.int64) * batch + b) * N + n) * total + t3
            added = (start + step3 < length) & (turn >= chunks)  # to what other channels left
            if TURNS > 1 and dB is not None and not B_CONSTANT:
                old_dB = tl.load(dB + into, added, 0.0).to(tl.float32)
            else:
                old_dB = 0.0
            if TURNS > 1 and dC is not None and not C_CONSTANT:
                old_dC = tl.load(dC + into, added, 0.0).to(tl.float32)
            else:
                old_dC = 0.0

            # What the lane makes of a zero state, the states and the gradients that enter the lanes, then all of them.
            decays = ()
            end = tl.zeros([S, BD], tl.float32)
            for k in tl.static_range(K):
                decay = exp2(dts[k] * a)
                end = decay * end + dxs[k] * Bs[k]
                decays = decays + (decay,)
            first = tl.zeros([S, BD], tl.float32)
            last_decay = exp2(next_dt * a)
            for k in tl.static_range(K - 1, -1, -1):
                first = Cs[k] * gs[k] + (last_decay if k == K - 1 else decays[k + 1]) * first
            whole = exp2(all_dt * a)
            end = tl.where(lane == 0, whole * h_in + end, end)
            _, ends = tl.associative_scan((whole, end), 0, _compose)
            h = tl.where(lane == 0, h_in, tl.gather(ends, before, 0))
            whole = exp2(all_after * a)
            first = tl.where(lane == S - 1, whole * dh_out + first, first)
            _, firsts = tl.associative_scan((whole, first), 0, _compose, reverse=True)
            dh = tl.where(lane == S - 1, dh_out, tl.gather(firsts, after, 0))
            tl.store(back + place + lane * 0, firsts, in_d & (lane == 0))
            if dh0 is not None:
                if c == 0:
                    tl.store(dh0 + place + lane * 0, decays[0] * firsts, in_d & (lane == 0))

            states = ()
            for k in tl.static_range(K):
                h = decays[k] * h + dxs[k] * Bs[k]
                states = states + (h,)
            more_y = ()
            dCs = ()
            for k in tl.static_range(K):
                more_y = more_y + (ys[k] + states[k] * Cs[k],)
                dCs = dCs + (states[k] * gs[k],)
            ys = more_y
            sum_A = tl.zeros([S, BD], tl.float32)
            more_A = ()
            more_B = ()
            dBs = ()
            for j in tl.static_range(K):  # from the last step to the first
                dh = Cs[K - 1 - j] * gs[K - 1 - j] + (last_decay if j == 0 else decays[K - j]) * dh
                moved = dh * (states[K - 1 - j] - dxs[K - 1 - j] * Bs[K - 1 - j])
                sum_A += moved * dts[K - 1 - j]
                more_A = (through_A[K - 1 - j] + moved * a,) + more_A
                more_B = (through_B[K - 1 - j] + dh * Bs[K - 1 - j],) + more_B
                dBs = (dh * dxs[K - 1 - j],) + dBs
            through_A = more_A
            through_B = more_B
            if dA is not None:
                tl.store(dA + part + n, tl.sum(sum_A, 0, keep_dims=True), in_d)
            if dB is not None:
                tile = _tile_of(dBs, K)
                if B_CONSTANT:
                    tl.store(dB + part + n, tl.sum(tl.sum(tile, 2), 0, keep_dims=True), in_d)
                else:
                    tl.store(dB + into, old_dB + tl.sum(tile, 1, keep_dims=True), start + step3 < length)
            if dC is not None:
                tile = _tile_of(dCs, K)
                if C_CONSTANT:
                    tl.store(dC + part + n, tl.sum(tl.sum(tile, 2), 0, keep_dims=True), in_d)
                else:
                    tl.store(dC + into, old_dC + tl.sum(tile, 1, keep_dims=True), start + step3 < length)
        xs = _block(u, b, d3, t3, u_b, u_d, u_l, here3, K, AGAIN)
        raws = _block(delta, b, d3, t3, dt_b, dt_d, dt_l, here3, K, AGAIN)
        if dout is not None:
            douts = _block(dout, b, d3, t3, do_b, do_d, do_l, here3, K, AGAIN)
        if z is not None:
            gates = _block(z, b, d3, t3, z_b, z_d, z_l, here3, K, AGAIN)
        sum_D = tl.zeros([S, BD], tl.float32)
        sum_bias = tl.zeros([S, BD], tl.float32)
        dus = ()
        ddts = ()
        dzs = ()
        for k in tl.static_range(K):
            dus = dus + (dts[k] * through_B[k] + skip * gs[k],)
            ddt = xs[k] * through_B[k] + LN2 * through_A[k]
            if SOFTPLUS:
                raw = raws[k] + bias
                ddt *= tl.where(raw > 20.0, 1.0, sigmoid(raw))
            ddt = tl.where(start + lane * K + k < length, ddt, 0.0)
            ddts = ddts + (ddt,)
            sum_bias += ddt
            sum_D += gs[k] * xs[k]
            if z is not None and dout is not None:
                sig = sigmoid(gates[k])
                dzs = dzs + (douts[k] * ys[k] * sig * (1.0 + gates[k] * (1.0 - sig)),)
            else:
                dzs = dzs + (gs[k],)
        if du is not None:
            tl.store(du + b * du_b + d3 * du_d + t3 * du_l, _tile_of(dus, K), here3)
        if ddelta is not None:
            tl.store(ddelta + b * ddt_b + d3 * ddt_d + t3 * ddt_l, _tile_of(ddts, K), here3)
        if dz is not None:
            tl.store(dz + b * dz_b + d3 * dz_d + t3 * dz_l, _tile_of(dzs, K), here3)
        if dD is not None:
            tl.store(dD + (row + c) * channels + d, tl.sum(sum_D, 0, keep_dims=True), in_d)
        if dbias is not None:
            tl.store(dbias + (row + c) * channels + d, tl.sum(sum_bias, 0, keep_dims=True), in_d)
        tl.debug_barrier()  # the next turn reads what this one wrote


def ssm_scan_bwd(
    grad_out: Tensor | None, grad_final_state: Tensor | None,
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None, packed: Packed | None,
    carry: Tensor | None, grads: list[Tensor | None],
) -> None:  # fmt: skip
    """Write the gradients of u, delta, A, B, C, D, z, delta_bias and initial_state into `grads`, None for one unwanted.

    Those of u, delta and z have the layout of their input, the others are fp32 and contiguous. `carry` is what the
    forward left.
    """
    shape = Shape.of(u, A, B, C, packed)
    if not (shape.sequences and shape.channels and shape.length and shape.state):
        return _trivial_bwd(grad_out, grad_final_state, u, D, z, grads)
    du, ddelta, dA, dB, dC, dD, dz, dbias, dh0 = grads
    steps = (
        *u.stride(), *delta.stride(), *A.stride(), *strides(B), *strides(C), *optional(D, 1), *optional(z, 3),
        *optional(delta_bias, 1), *optional(initial_state, 3), *optional(grad_out, 3), *optional(grad_final_state, 3),
        *optional(du, 3), *optional(ddelta, 3), *optional(dz, 3),
    )  # fmt: skip
    flags: dict[str, Any] = {"SOFTPLUS": delta_softplus, "B_CONSTANT": B.ndim == 2, "C_CONSTANT": C.ndim == 2}
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state, grad_out, grad_final_state)
    short = is_short(shape, packed)
    if short:
        blocks = triton.cdiv(shape.per_unit, short_tile(shape)[0])
        batches = max(1, min(16, shape.batch * shape.units * blocks // 1024))
        parts = triton.cdiv(shape.batch, batches)
    else:
        BD, S, K, TURNS, warps = long_tile(shape, 2 if B.dtype == torch.bfloat16 else 4)
        blocks = triton.cdiv(shape.per_unit, BD * TURNS)
        parts = carried(shape.batch, shape.length, None if packed is None else shape.sequences)
    if not short and carry is None and shape.longest > CHUNK.value:  # the forward kept nothing: once more
        carry = u.new_empty((parts, shape.channels, shape.state), dtype=torch.float32)
        args = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, packed)
        ssm_scan(*args, torch.empty_like(u), None, carry)
    sums = _Sums(shape, parts, shape.units * blocks, short, u, packed is not None)
    into = (du, ddelta, sums.states(dA), sums.matrix(dB, B), sums.matrix(dC, C), sums.channels(dD), dz)
    into = (*into, sums.channels(dbias), dh0)
    sizes = (shape.channels, shape.state, shape.per_unit, blocks, *shape.per_group)
    if short:
        short_bwd(inputs, into, steps, sizes, shape, batches, flags)
    else:
        back = u.new_empty((shape.sequences, shape.channels, shape.state), dtype=torch.float32)
        offsets = None if packed is None else packed.offsets
        carry = back if carry is None else carry  # of one chunk it is never read
        _long_bwd[(shape.units * blocks, shape.sequences)](
            *inputs, carry, back, offsets, *into, *steps, shape.longest, shape.length, *sizes,
            triton.cdiv(shape.length, CHUNK.value), BD=BD, S=S, K=K, TURNS=TURNS, num_warps=warps, **flags,
        )  # fmt: skip
    sums.add()


def _trivial_bwd(grad_out, grad_final_state, u, D, z, grads) -> None:
    """No step, or no state: the final state is the initial one, the output what the skip lets through."""
    du, _, _, _, _, dD, dz, _, dh0 = grads
    for grad in grads:
        if grad is not None:
            grad.zero_()
    if dh0 is not None and grad_final_state is not None:
        dh0.copy_(grad_final_state)
    if grad_out is None or D is None or not u.numel():
        return
    g = grad_out.float()
    skip = D.float()[:, None]
    if z is not None:
        s = torch.sigmoid(z.float())
        if dz is not None:
            dz.copy_(g * skip * u.float() * s * (1 + z.float() * (1 - s)))
        g = g * z.float() * s
    if du is not None:
        du.copy_(g * skip)
    if dD is not None:
        dD.copy_((g * u.float()).sum((0, 2)))


def long_tile(shape: Shape, bytes_each: int) -> tuple[int, int, int, int, int]:
    """Channels, lanes, steps a lane, turns, and warps. A chunk is shorter than `CHUNK` where it holds every sequence.

    In each turn a program takes other channels and adds to the sums over channels that it has already.
    """
    K = 8  # 16-byte loads of 16-bit numbers
    S = min(CHUNK.value // K, max(2, triton.next_power_of_2(triton.cdiv(shape.longest, K))))
    BD = min(2 * (CHUNK.value // K // S), triton.next_power_of_2(shape.per_unit))
    programs = shape.sequences * shape.units * triton.cdiv(shape.per_unit, BD)
    sums = 2 * bytes_each * shape.units * triton.cdiv(shape.per_unit, BD) * shape.batch * shape.length * shape.state
    return BD, S, K, max(1, min(triton.cdiv(sums, SUMS), programs // BUSY)), 1


class _Sums:
    """Buffers for what every program adds up for itself, and their sums into the gradients."""

    def __init__(self, shape: Shape, parts: int, blocks: int, by_step: bool, u: Tensor, gaps: bool):
        self.shape, self.parts, self.blocks, self.by_step, self.u = shape, parts, blocks, by_step, u
        self.gaps = gaps  # not all parts are written
        self.pending: list[tuple[Tensor, Tensor]] = []

    def _buffer(self, grad: Tensor | None, *size: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        if grad is None:
            return None
        buffer = (self.u.new_zeros if self.gaps else self.u.new_empty)(size, dtype=dtype)
        self.pending.append((grad, buffer))
        return buffer

    def states(self, grad: Tensor | None) -> Tensor | None:
        return self._buffer(grad, self.parts, self.shape.channels, self.shape.state)

    def channels(self, grad: Tensor | None) -> Tensor | None:
        return self._buffer(grad, self.shape.batch if self.by_step else self.parts, self.shape.channels)

    def matrix(self, grad: Tensor | None, M: Tensor) -> Tensor | None:
        """For dB or dC: as `states` where M is constant in time, else every block of channels its own [B, L, N]."""
        if M.ndim == 2:
            return self.states(grad)
        times = (self.shape.length, self.shape.state)
        # A rounding to bfloat16 of every part is less than that of their sum; those of other dtypes stay whole.
        dtype = torch.bfloat16 if M.dtype == torch.bfloat16 and not self.by_step else torch.float32
        size = (self.blocks, self.shape.batch, *(times if self.by_step else times[::-1]))
        return self._buffer(grad, *size, dtype=dtype)

    def add(self) -> None:
        for grad, buffer in self.pending:
            if buffer.ndim < 4:
                torch.sum(buffer, 0, out=grad)
                continue
            groups = grad.shape[1] if grad.ndim == 4 else 1
            whole = (
                buffer.unflatten(0, (groups, -1)).sum(1, dtype=torch.float32).transpose(0, 1)
            )  # [B, G, L, N] or [B, G, N, L]
            whole = whole.transpose(2, 3) if self.by_step else whole
            grad.copy_(whole.reshape(grad.shape))
