"""The scan of Mamba-2 in chunks of Q tokens, for tensor cores: the forward.

Inside a chunk the scan is a product of matrices, `Y = ((C Bᵀ) ∘ M) (dt X)` with `M_ts = exp(a_s+1 + .. + a_t)`; a state
[P, N] that is handed from chunk to chunk stands for all that came before (Dao and Gu, 2024, section 6). Three kernels:
step sizes and running sums of the decays; the states that enter the chunks; the outputs. One sequence that fits a chunk
takes a single one.

Between the kernels, rows [chunks, heads, Q] hold what belongs to a token; past the end of a sequence their step size is
0 and the running sum of the decays stands still.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from fastlvm.kernels.triton.math import exp2, sigmoid, softplus
from fastlvm.kernels.triton.ssd_chunks import Plan, chunks_of, near, plan, put, shares, span, strides, tile, wide
from fastlvm.kernels.triton.ssd_steps import cumulated, decay_between, decay_until, running_sums
from torch import Tensor


@triton.jit
def _states_kernel(
    x, B, initial, states, final, steps, high, low, table, count, length, per_row, heads, per_group,
    x_s, B_s, initial_s, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile [BP, BN] of a head's state through the chunks of a sequence."""
    NP: tl.constexpr = (P + BP - 1) // BP
    NN: tl.constexpr = (N + BN - 1) // BN
    pid = tl.program_id(0)
    n = pid % NN * BN + tl.arange(0, BN)
    p = pid // NN % NP * BP + tl.arange(0, BP)
    h = pid // (NN * NP) % heads
    sequence = pid // (NN * NP) // heads
    here = p < P
    state = tl.zeros([BP, BN], tl.float32)
    if initial is not None:
        at_initial = initial + wide(sequence) * initial_s[0] + wide(h) * initial_s[1]
        state = tile(at_initial, p, here, n, (initial_s[2], initial_s[3]), N, BN).to(tl.float32)
    t = tl.arange(0, Q)
    first, end = chunks_of(sequence, table, per_row, count, PACKED)
    for k in range(first, end):
        row, begin, tokens = span(k, table, length, per_row, Q, PACKED)
        of = wide(k) * heads + h
        if states is not None:
            put(states + of * (P * N), state.to(DOT), p, here, n, (N, 1), N, BN)
        since, until = of * Q + t, of * Q + Q - 1
        weight = decay_between(high, low, since, until, True) * tl.load(steps + since)
        at = x + row * x_s[0] + begin * x_s[1] + wide(h) * x_s[2]
        inputs = tile(at, t, t < tokens, p, (x_s[1], x_s[3]), P, BP).to(tl.float32) * weight[:, None]  # [Q, BP]
        at = B + row * B_s[0] + begin * B_s[1] + wide(h // per_group) * B_s[2]
        b = tile(at, t, t < tokens, n, (B_s[1], B_s[3]), N, BN).to(DOT)  # [Q, BN]
        rounded = inputs.to(DOT)
        state *= decay_until(high, low, until)
        state = tl.dot(tl.trans(rounded), b, state, input_precision=PRECISION)
        if SPLIT:  # what rounding took, in a second product
            rest = (inputs - rounded.to(tl.float32)).to(DOT)
            state = tl.dot(tl.trans(rest), b, state, input_precision=PRECISION)
    if final is not None:
        at = final + (wide(sequence) * heads + h) * (P * N)
        put(at, state, p, here, n, (N, 1), N, BN)


@triton.jit
def _scan_kernel(
    x, B, C, D, z, states, steps, high, low, out, grad_out, grad_z, table, length, per_row, heads, per_group, splits,
    x_s, B_s, C_s, D_s, z_s, states_s, out_s, grad_out_s, grad_z_s, P: tl.constexpr, N: tl.constexpr,
    HEADS: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Outputs of T tokens of a chunk, for HEADS heads of a group, which share C Bᵀ.

    With `grad_out` what a gate needs in the backward: `out` is the gradient before the gate, `grad_z` that of z.
    """
    NP: tl.constexpr = (P + BP - 1) // BP
    NN: tl.constexpr = (N + BN - 1) // BN
    TILES: tl.constexpr = Q // T
    pid = tl.program_id(0)
    t = pid % TILES * T + tl.arange(0, T)
    p = pid // TILES % NP * BP + tl.arange(0, BP)
    split = pid // (TILES * NP) % splits
    k = pid // (TILES * NP) // splits
    parts = tl.cdiv(per_group, HEADS)
    g = wide(split // parts)
    begin_h = split // parts * per_group + split % parts * HEADS
    end_h = tl.minimum(begin_h + HEADS, (split // parts + 1) * per_group)

    row, begin, count = span(k, table, length, per_row, Q, PACKED)
    s = tl.arange(0, Q)
    lines, lines_C = row * B_s[0] + begin * B_s[1] + g * B_s[2], row * C_s[0] + begin * C_s[1] + g * C_s[2]
    products = tl.zeros([T, Q], tl.float32)  # C Bᵀ
    for i in tl.static_range(NN):
        n = i * BN + tl.arange(0, BN)
        c = tile(C + lines_C, t, t < count, n, (C_s[1], C_s[3]), N, BN).to(DOT)  # [T, BN]
        b = tile(B + lines, s, s < count, n, (B_s[1], B_s[3]), N, BN).to(DOT)  # [Q, BN]
        products = tl.dot(c, tl.trans(b), products, input_precision=PRECISION)

    for h in range(begin_h, end_h):
        of = wide(k) * heads + h
        since, until = (of * Q + s)[None, :], (of * Q + t)[:, None]
        weights = products * tl.load(steps + since) * decay_between(high, low, since, until, EXACT)
        weights = tl.where(t[:, None] >= s[None, :], weights, 0.0).to(DOT)  # [T, Q]
        at_x = x + row * x_s[0] + begin * x_s[1] + wide(h) * x_s[2]
        inputs = tile(at_x, s, s < count, p, (x_s[1], x_s[3]), P, BP).to(DOT)  # [Q, BP]
        y = tl.zeros([T, BP], tl.float32)
        if states is not None:
            for i in tl.static_range(NN):
                n = i * BN + tl.arange(0, BN)
                if NN > 1:
                    c = tile(C + lines_C, t, t < count, n, (C_s[1], C_s[3]), N, BN).to(DOT)
                at_state = states + wide(k) * states_s[0] + wide(h) * states_s[1]
                state = tile(at_state, p, p < P, n, (states_s[2], states_s[3]), N, BN).to(DOT)  # [BP, BN]
                y = tl.dot(c, tl.trans(state), y, input_precision=PRECISION)
            y *= decay_until(high, low, of * Q + t)[:, None]
        y = tl.dot(weights, inputs, y, input_precision=PRECISION)
        _finish_output(
            y, at_x, D, z, out, grad_out, grad_z, row, begin, wide(h), t, t < count, p, x_s, D_s, z_s, out_s,
            grad_out_s, grad_z_s, P, BP,
        )  # fmt: skip


@triton.jit
def _finish_output(
    y, at_x, D, z, out, grad_out, grad_z, row, begin, h, t, live, p, x_s, D_s, z_s, out_s, grad_out_s, grad_z_s,
    P: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Skip and gate of y [T, BP], and where it goes."""
    if D is not None:
        skip = tl.load(D + h * D_s[0] + p * D_s[1], mask=p < P, other=0.0).to(tl.float32)
        y += skip[None, :] * tile(at_x, t, live, p, (x_s[1], x_s[3]), P, BP).to(tl.float32)
    at = out + row * out_s[0] + begin * out_s[1] + h * out_s[2]
    if z is not None:
        gate = tile(z + row * z_s[0] + begin * z_s[1] + h * z_s[2], t, live, p, (z_s[1], z_s[3]), P, BP).to(tl.float32)
        open_ = sigmoid(gate)
        if grad_out is None:
            y *= gate * open_
        else:
            at_grad = grad_out + row * grad_out_s[0] + begin * grad_out_s[1] + h * grad_out_s[2]
            grad = tile(at_grad, t, live, p, (grad_out_s[1], grad_out_s[3]), P, BP).to(tl.float32)
            if grad_z is not None:
                at_z = grad_z + row * grad_z_s[0] + begin * grad_z_s[1] + h * grad_z_s[2]
                slope = open_ * (1.0 + gate * (1.0 - open_))
                put(at_z, grad * y * slope, t, live, p, (grad_z_s[1], grad_z_s[3]), P, BP)
            y = grad * (gate * open_)
    put(at, y, t, live, p, (out_s[1], out_s[3]), P, BP)


@triton.jit
def _single_kernel(
    x, dt, A, B, C, D, z, dt_bias, initial, out, final, length, heads, per_group, x_s, dt_s, A_s, B_s, C_s, D_s, z_s,
    bias_s, initial_s, out_s, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, SOFTPLUS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """All of a head whose sequence fits one chunk: outputs [Q, BP] and, where wanted, the final state."""
    NP: tl.constexpr = (P + BP - 1) // BP
    NN: tl.constexpr = (N + BN - 1) // BN
    pid = tl.program_id(0)
    p = pid % NP * BP + tl.arange(0, BP)
    h = wide(pid // NP % heads)
    row = wide(pid // NP // heads)
    g = h // per_group
    t = tl.arange(0, Q)
    live = t < length
    step = tl.load(dt + row * dt_s[0] + t * dt_s[1] + h * dt_s[2], mask=live, other=0.0).to(tl.float32)
    if dt_bias is not None:
        step += tl.load(dt_bias + h * bias_s).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    step = tl.where(live, step, 0.0)
    high, low = cumulated(step, tl.load(A + h * A_s))
    at_x = x + row * x_s[0] + h * x_s[2]
    inputs = tile(at_x, t, live, p, (x_s[1], x_s[3]), P, BP)  # [Q, BP]
    products = tl.zeros([Q, Q], tl.float32)
    y = tl.zeros([Q, BP], tl.float32)
    for i in tl.static_range(NN):
        n = i * BN + tl.arange(0, BN)
        c = tile(C + row * C_s[0] + g * C_s[2], t, live, n, (C_s[1], C_s[3]), N, BN).to(DOT)
        b = tile(B + row * B_s[0] + g * B_s[2], t, live, n, (B_s[1], B_s[3]), N, BN).to(DOT)
        products = tl.dot(c, tl.trans(b), products, input_precision=PRECISION)
        if initial is not None:
            at = initial + row * initial_s[0] + h * initial_s[1]
            state = tile(at, p, p < P, n, (initial_s[2], initial_s[3]), N, BN).to(DOT)  # [BP, BN]
            y = tl.dot(c, tl.trans(state), y, input_precision=PRECISION)
    y *= exp2(high + low)[:, None]
    decay = exp2((high[:, None] - high[None, :]) + (low[:, None] - low[None, :]))
    weights = products * step[None, :] * decay
    weights = tl.where(t[:, None] >= t[None, :], weights, 0.0).to(DOT)
    y = tl.dot(weights, inputs.to(DOT), y, input_precision=PRECISION)
    none = (0, 0, 0, 0)
    _finish_output(
        y, at_x, D, z, out, None, None, row, 0, h, t, live, p, x_s, D_s, z_s, out_s, none, none, P, BP
    )  # fmt: skip
    if final is not None:
        # Past the end the running sum stands still: the last one is that of the last token.
        last = tl.sum(tl.where(t == Q - 1, high, 0.0), 0)
        last_low = tl.sum(tl.where(t == Q - 1, low, 0.0), 0)
        weighted = inputs.to(tl.float32) * (step * exp2((last - high) + (last_low - low)))[:, None]
        rounded = weighted.to(DOT)
        for i in tl.static_range(NN):
            n = i * BN + tl.arange(0, BN)
            state = tl.zeros([BP, BN], tl.float32)
            if initial is not None:
                at = initial + row * initial_s[0] + h * initial_s[1]
                state = tile(at, p, p < P, n, (initial_s[2], initial_s[3]), N, BN).to(tl.float32)
                state *= exp2(last + last_low)
            b = tile(B + row * B_s[0] + g * B_s[2], t, live, n, (B_s[1], B_s[3]), N, BN).to(DOT)
            state = tl.dot(tl.trans(rounded), b, state, input_precision=PRECISION)
            if SPLIT:
                rest = (weighted - rounded.to(tl.float32)).to(DOT)
                state = tl.dot(tl.trans(rest), b, state, input_precision=PRECISION)
            put(final + (row * heads + h) * (P * N), state, p, p < P, n, (N, 1), N, BN)


def entering_states(
    x: Tensor, B: Tensor, initial: Tensor | None, sums: tuple[Tensor, ...], cut: Plan, keep: bool, final: Tensor | None
) -> Tensor | None:
    """The state [chunks, H, P, N] that enters every chunk, if kept; writes the final ones [B or S, H, P, N]."""
    _, length, heads, dim = x.shape
    groups, size = B.shape[2:]
    states = x.new_empty((cut.count, heads, dim, size), dtype=cut.dot) if keep else None
    BN = min(cut.BN, 64)
    programs = cut.sequences * heads * triton.cdiv(dim, cut.BP) * triton.cdiv(size, BN)
    if programs:
        _states_kernel[(programs,)](
            x, B, initial, states, final, *sums, cut.table, cut.count, length, cut.per_row, heads, heads // groups,
            x.stride(), B.stride(), strides(initial), P=dim, N=size, BP=cut.BP, BN=BN,
            SPLIT=cut.half and final is not None, **cut.dots, **cut.where, **cut.across,
        )  # fmt: skip
    return states


def outputs(
    x: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, states: Tensor | None,
    sums: tuple[Tensor, ...], cut: Plan, out: Tensor, grad_out: Tensor | None = None, grad_z: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the outputs, or with `grad_out` their gradient before the gate and that of the gate."""
    _, length, heads, dim = x.shape
    groups, size = B.shape[2:]
    inner = cut.Q // cut.T * triton.cdiv(dim, cut.BP)
    share, parts = shares(heads // groups, cut.count * inner * groups)
    splits = groups * parts
    programs = cut.count * inner * splits
    if programs:
        _scan_kernel[(programs,)](
            x, B, C, D, z, states, *sums, out, grad_out, grad_z, cut.table, length, cut.per_row, heads,
            heads // groups, splits, x.stride(), B.stride(), C.stride(), strides(D, 2), strides(z), strides(states),
            out.stride(), strides(grad_out), strides(grad_z), P=dim, N=size, HEADS=share, T=cut.T, BP=cut.BP, BN=cut.BN,
            EXACT=not cut.half, **cut.dots, **cut.where, **cut.within,
        )  # fmt: skip


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, initial: Tensor | None, offsets: Sequence[int] | None,
    out: Tensor, final: Tensor | None,
) -> None:  # fmt: skip
    """Write `out` [B, L, H, P] and, unless it is None, `final` [B or S, H, P, N], contiguous and float32."""
    x, dt, B, C, z, initial, result = near(x, dt, B, C, z, initial, out)
    batch, length, heads, dim = x.shape
    groups, size = B.shape[2:]
    cut = plan(x, B, C, offsets)
    if cut.per_row == 1:
        programs = batch * heads * triton.cdiv(dim, cut.BP)
        if programs:
            _single_kernel[(programs,)](
                x, dt, A, B, C, D, z, dt_bias, initial, result, final, length, heads, heads // groups, x.stride(),
                dt.stride(), *A.stride(), B.stride(), C.stride(), strides(D, 2), strides(z), *strides(dt_bias, 1),
                strides(initial), result.stride(), P=dim, N=size, BP=cut.BP, BN=cut.BN, SOFTPLUS=dt_softplus,
                SPLIT=cut.half and final is not None, **cut.dots, num_warps=8 if cut.Q == 128 else 4,
            )  # fmt: skip
    else:
        sums = running_sums(dt, A, dt_bias, dt_softplus, cut)
        states = entering_states(x, B, initial, sums, cut, True, final)
        outputs(x, B, C, D, z, states, sums, cut, result)
    if result is not out:
        out.copy_(result)
