"""The scan of Mamba-2 in chunks of Q tokens: the backward, in the terms of `ssd_scan`.

The states are computed again. With G the gradient of the state that leaves a chunk and H the state that enters it:

    R_ts = dy_t · x_s,  V_ts = M_ts (C_t · B_s) R_ts
    dx_s = dt_s (Σ_t M_ts (C_t · B_s) dy_t + e_s G B_s) + D dy_s          e_s: decay from s to the end of the chunk
    dC_t = Σ_s M_ts dt_s R_ts B_s + f_t Hᵀ dy_t                           f_t: decay from its beginning to t
    dB_s = Σ_t M_ts dt_s R_ts C_t + e_s dt_s Gᵀ x_s

The gradient of a decay is the sum over all pairs s < t that it lies between. Inside a chunk that is a running sum of
row sums less column sums of V dt, whose diagonal, which no decay touches, stays out: it would drown what strong decays
leave.
Nothing is added in an order that may change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastlvm.kernels.triton.ssd_chunks import (
    PROGRAMS,
    Plan,
    chunks_of,
    near,
    plan,
    put,
    shares,
    span,
    strides,
    tile,
    wide,
)
from fastlvm.kernels.triton.ssd_scan import entering_states, outputs
from fastlvm.kernels.triton.ssd_steps import decay_between, decay_until, running_sums, steps_backward
from torch import Tensor


@triton.jit
def _states_bwd_kernel(
    C, grad, states, grad_final, grads, grad_initial, kept, high, low, table, count, length, per_row, heads, per_group,
    C_s, grad_s, states_s, final_s, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One tile [BP, BN] of the gradient of a head's state, from the last chunk of a sequence to the first.

    Writes the gradient G of the state that leaves each chunk, and exp(Σ a) <G, H> of each chunk by row of the state.
    """
    NP: tl.constexpr = (P + BP - 1) // BP
    NN: tl.constexpr = (N + BN - 1) // BN
    pid = tl.program_id(0)
    n = pid % NN * BN + tl.arange(0, BN)
    p = pid // NN % NP * BP + tl.arange(0, BP)
    h = wide(pid // (NN * NP) % heads)
    sequence = pid // (NN * NP) // heads
    here = p < P
    state = tl.zeros([BP, BN], tl.float32)
    if grad_final is not None:
        at_final = grad_final + wide(sequence) * final_s[0] + h * final_s[1]
        state = tile(at_final, p, here, n, (final_s[2], final_s[3]), N, BN).to(tl.float32)
    t = tl.arange(0, Q)
    first, end = chunks_of(sequence, table, per_row, count, PACKED)
    for i in range(end - first):
        k = end - 1 - i
        row, begin, tokens = span(k, table, length, per_row, Q, PACKED)
        of = wide(k) * heads + h
        if grads is not None:
            put(grads + of * (P * N), state, p, here, n, (N, 1), N, BN)
        decay = decay_until(high, low, of * Q + Q - 1)
        if kept is not None:
            at = states + wide(k) * states_s[0] + h * states_s[1]
            entered = tile(at, p, here, n, (states_s[2], states_s[3]), N, BN).to(tl.float32)
            at = kept + (pid % NN * wide(count) * heads + of) * P + p
            tl.store(at, tl.sum(state * entered, 1) * decay, mask=here)
        weight = decay_until(high, low, of * Q + t)
        at = grad + row * grad_s[0] + begin * grad_s[1] + h * grad_s[2]
        dy = tile(at, t, t < tokens, p, (grad_s[1], grad_s[3]), P, BP).to(tl.float32) * weight[:, None]  # [Q, BP]
        at = C + row * C_s[0] + begin * C_s[1] + h // per_group * C_s[2]
        c = tile(at, t, t < tokens, n, (C_s[1], C_s[3]), N, BN).to(DOT)  # [Q, BN]
        state = tl.dot(tl.trans(dy.to(DOT)), c, state * decay, input_precision=PRECISION)
    if grad_initial is not None:
        put(grad_initial + (wide(sequence) * heads + h) * (P * N), state, p, here, n, (N, 1), N, BN)


@triton.jit
def _inputs_bwd_kernel(
    B, C, D, grad, grads, steps, high, low, grad_x, table, length, per_row, heads, per_group, splits, B_s, C_s, D_s,
    grad_s, grads_s, grad_x_s, P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr,
    Q: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of T inputs of a chunk for HEADS heads of a group, which share B Cᵀ."""
    NP: tl.constexpr = (P + BP - 1) // BP
    NN: tl.constexpr = (N + BN - 1) // BN
    TILES: tl.constexpr = Q // T
    pid = tl.program_id(0)
    s = pid % TILES * T + tl.arange(0, T)
    p = pid // TILES % NP * BP + tl.arange(0, BP)
    split = pid // (TILES * NP) % splits
    k = pid // (TILES * NP) // splits
    parts = tl.cdiv(per_group, HEADS)
    g = wide(split // parts)
    begin_h = split // parts * per_group + split % parts * HEADS
    end_h = tl.minimum(begin_h + HEADS, (split // parts + 1) * per_group)
    row, begin, tokens = span(k, table, length, per_row, Q, PACKED)
    t = tl.arange(0, Q)
    lines_B, lines_C = row * B_s[0] + begin * B_s[1] + g * B_s[2], row * C_s[0] + begin * C_s[1] + g * C_s[2]
    products = tl.zeros([T, Q], tl.float32)  # B Cᵀ
    for j in tl.static_range(NN):
        n = j * BN + tl.arange(0, BN)
        b = tile(B + lines_B, s, s < tokens, n, (B_s[1], B_s[3]), N, BN).to(DOT)  # [T, BN]
        c = tile(C + lines_C, t, t < tokens, n, (C_s[1], C_s[3]), N, BN).to(DOT)  # [Q, BN]
        products = tl.dot(b, tl.trans(c), products, input_precision=PRECISION)

    for h in range(begin_h, end_h):
        of = wide(k) * heads + h
        since, until = (of * Q + s)[:, None], (of * Q + t)[None, :]
        decay = decay_between(high, low, since, until, EXACT)
        weights = tl.where(t[None, :] >= s[:, None], products * decay, 0.0).to(DOT)  # [T, Q]
        at_dy = grad + row * grad_s[0] + begin * grad_s[1] + wide(h) * grad_s[2]
        dy = tile(at_dy, t, t < tokens, p, (grad_s[1], grad_s[3]), P, BP).to(DOT)  # [Q, BP]
        dx = tl.zeros([T, BP], tl.float32)
        if grads is not None:
            for j in tl.static_range(NN):
                n = j * BN + tl.arange(0, BN)
                if NN > 1:
                    b = tile(B + lines_B, s, s < tokens, n, (B_s[1], B_s[3]), N, BN).to(DOT)
                at = grads + wide(k) * grads_s[0] + wide(h) * grads_s[1]
                state = tile(at, p, p < P, n, (grads_s[2], grads_s[3]), N, BN).to(DOT)  # [BP, BN]
                dx = tl.dot(b, tl.trans(state), dx, input_precision=PRECISION)
            dx *= decay_between(high, low, of * Q + s, of * Q + Q - 1, True)[:, None]
        dx = tl.dot(weights, dy, dx, input_precision=PRECISION) * tl.load(steps + of * Q + s)[:, None]
        if D is not None:
            own = tile(at_dy, s, s < tokens, p, (grad_s[1], grad_s[3]), P, BP).to(tl.float32)  # [T, BP]
            dx += own * tl.load(D + wide(h) * D_s[0] + p * D_s[1], mask=p < P, other=0.0).to(tl.float32)[None, :]
        at_dx = grad_x + row * grad_x_s[0] + begin * grad_x_s[1] + wide(h) * grad_x_s[2]
        put(at_dx, dx, s, s < tokens, p, (grad_x_s[1], grad_x_s[3]), P, BP)


@triton.jit
def _pairs_bwd_kernel(
    x, B, C, grad, steps, high, low, pairs, rows, columns, totals, skips, table, count, length, per_row, heads,
    per_group, splits, x_s, B_s, C_s, grad_s, P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, Q: tl.constexpr,
    T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile [T, T] of the pairs s <= t of a chunk, a row for s: M dt R summed over HEADS heads, and sums of V.

    `totals` and `columns` sum V over the tile's t, with and without its diagonal, `rows` sums V dt over its s.
    `skips` takes the sums of x dy over the tokens of each tile on the diagonal.
    """
    NP: tl.constexpr = (P + BP - 1) // BP
    NN: tl.constexpr = (N + BN - 1) // BN
    TILES: tl.constexpr = Q // T
    PAIRS: tl.constexpr = TILES * (TILES + 1) // 2
    pid = tl.program_id(0)
    pair = pid % PAIRS
    late = 0 * pair
    for i in tl.static_range(1, TILES):
        late += (pair >= i * (i + 1) // 2).to(tl.int32)
    early = pair - late * (late + 1) // 2
    s, t = early * T + tl.arange(0, T), late * T + tl.arange(0, T)
    split = pid // PAIRS % splits
    k = pid // PAIRS // splits
    parts = tl.cdiv(per_group, HEADS)
    g = wide(split // parts)
    begin_h = split // parts * per_group + split % parts * HEADS
    end_h = tl.minimum(begin_h + HEADS, (split // parts + 1) * per_group)
    row, begin, tokens = span(k, table, length, per_row, Q, PACKED)
    lines_B, lines_C = row * B_s[0] + begin * B_s[1] + g * B_s[2], row * C_s[0] + begin * C_s[1] + g * C_s[2]
    products = tl.zeros([T, T], tl.float32)  # B Cᵀ
    for j in tl.static_range(NN):
        n = j * BN + tl.arange(0, BN)
        b = tile(B + lines_B, s, s < tokens, n, (B_s[1], B_s[3]), N, BN).to(DOT)
        c = tile(C + lines_C, t, t < tokens, n, (C_s[1], C_s[3]), N, BN).to(DOT)
        products = tl.dot(b, tl.trans(c), products, input_precision=PRECISION)
    summed = tl.zeros([T, T], tl.float32)
    every = wide(count) * heads

    for h in range(begin_h, end_h):
        of = wide(k) * heads + h
        at_x = x + row * x_s[0] + begin * x_s[1] + wide(h) * x_s[2]
        at_dy = grad + row * grad_s[0] + begin * grad_s[1] + wide(h) * grad_s[2]
        inner = tl.zeros([T, T], tl.float32)  # x dyᵀ
        for i in tl.static_range(NP):
            p = i * BP + tl.arange(0, BP)
            inputs = tile(at_x, s, s < tokens, p, (x_s[1], x_s[3]), P, BP).to(DOT)
            dy = tile(at_dy, t, t < tokens, p, (grad_s[1], grad_s[3]), P, BP).to(DOT)
            inner = tl.dot(inputs, tl.trans(dy), inner, input_precision=PRECISION)
            if skips is not None and early == late:
                at_skip = skips + ((wide(k) * TILES + early) * heads + h) * P + p
                tl.store(at_skip, tl.sum(inputs.to(tl.float32) * dy.to(tl.float32), 0), mask=p < P)
        decay = decay_between(high, low, (of * Q + s)[:, None], (of * Q + t)[None, :], EXACT)
        step = tl.load(steps + of * Q + s)
        inner = tl.where(t[None, :] >= s[:, None], inner * decay, 0.0)
        summed += inner * step[:, None]
        inner *= products
        at_s, at_t = (late * every + of) * Q + s, (early * every + of) * Q + t
        tl.store(totals + at_s, tl.sum(inner, 1))
        inner = tl.where(t[None, :] > s[:, None], inner, 0.0)
        tl.store(columns + at_s, tl.sum(inner, 1))
        tl.store(rows + at_t, tl.sum(inner * step[:, None], 0))
    tl.store(pairs + ((wide(k) * splits + split) * Q + s[:, None]) * Q + t[None, :], summed)


@triton.jit
def _matrix_bwd_kernel(
    value, states, matrix, other, steps, high, low, products_bwd, out, sums, table, count, length, per_row, heads,
    per_group, groups, splits, parts, value_s, states_s, matrix_s, other_s, out_s, P: tl.constexpr, N: tl.constexpr,
    HEADS: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, INPUT: tl.constexpr,
):  # fmt: skip
    """Gradient of `matrix`, B (INPUT) or C, for a chunk and HEADS heads of a group: BN columns.

    `value` is x with the states' gradients G, or dy with the states H; `other` is C or B. `sums` takes the products
    of what comes from the states with `matrix`, for the decays.
    """
    NP: tl.constexpr = (P + BP - 1) // BP
    NN: tl.constexpr = (N + BN - 1) // BN
    pid = tl.program_id(0)
    n = pid % NN * BN + tl.arange(0, BN)
    part = pid // NN % parts
    g = pid // (NN * parts) % groups
    k = pid // (NN * parts) // groups
    begin_h = g * per_group + part * HEADS
    end_h = tl.minimum(begin_h + HEADS, (g + 1) * per_group)
    row, begin, tokens = span(k, table, length, per_row, Q, PACKED)
    t = tl.arange(0, Q)
    live = t < tokens
    total = tl.zeros([Q, BN], tl.float32)
    if states is not None:
        at_matrix = matrix + row * matrix_s[0] + begin * matrix_s[1] + wide(g) * matrix_s[2]
        own = tile(at_matrix, t, live, n, (matrix_s[1], matrix_s[3]), N, BN)  # [Q, BN]
        for h in range(begin_h, end_h):
            of = wide(k) * heads + h
            at_value = value + row * value_s[0] + begin * value_s[1] + wide(h) * value_s[2]
            at_state = states + wide(k) * states_s[0] + wide(h) * states_s[1]
            product = tl.zeros([Q, BN], tl.float32)
            for i in tl.static_range(NP):
                p = i * BP + tl.arange(0, BP)
                v = tile(at_value, t, live, p, (value_s[1], value_s[3]), P, BP).to(DOT)  # [Q, BP]
                state = tile(at_state, p, p < P, n, (states_s[2], states_s[3]), N, BN).to(DOT)  # [BP, BN]
                product = tl.dot(v, state, product, input_precision=PRECISION)
            if INPUT:
                weight = decay_between(high, low, of * Q + t, of * Q + Q - 1, True)
            else:
                weight = decay_until(high, low, of * Q + t)
            at = sums + (pid % NN * wide(count) * heads + of) * Q + t
            tl.store(at, tl.sum(product * own.to(tl.float32), 1) * weight)
            if INPUT:
                weight *= tl.load(steps + of * Q + t)
            total += product * weight[:, None]
    if out is not None:
        at_other = other + row * other_s[0] + begin * other_s[1] + wide(g) * other_s[2]
        for first in range(0, Q, BQ):
            q = first + tl.arange(0, BQ)
            pairs = tl.zeros([Q, BQ], tl.float32)
            for i in range(part, splits, parts):
                at = products_bwd + ((wide(k) * groups + g) * splits + i) * (Q * Q)
                if INPUT:
                    pairs += tl.load(at + t[:, None] * Q + q[None, :], mask=(t // T)[:, None] <= q // T, other=0.0)
                else:
                    pairs += tl.load(at + t[:, None] + q[None, :] * Q, mask=(t // T)[:, None] >= q // T, other=0.0)
            m = tile(at_other, q, q < tokens, n, (other_s[1], other_s[3]), N, BN).to(DOT)  # [BQ, BN]
            total = tl.dot(pairs.to(DOT), m, total, input_precision=PRECISION)
        at = out + part * out_s[0] + row * out_s[1] + begin * out_s[2] + wide(g) * out_s[3]
        put(at, total, t, live, n, (out_s[2], out_s[4]), N, BN)


def backward(
    grad_out: Tensor | None, grad_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, initial: Tensor | None,
    offsets: Sequence[int] | None, buffers: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Write the gradients that have a buffer: of x, dt, A, B, C, D, z, dt_bias, initial state; the last contiguous."""
    results = near(*buffers)
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial = results
    if grad_out is None:
        grad_out = torch.zeros_like(x)
    x, dt, B, C, z, initial, grad_out, grad_final = near(x, dt, B, C, z, initial, grad_out, grad_final)
    _, length, heads, dim = x.shape
    groups, size = B.shape[2:]
    cut = plan(x, B, C, offsets)
    sums = running_sums(dt, A, dt_bias, dt_softplus, cut)
    single = cut.per_row == 1
    states = initial if single else entering_states(x, B, initial, sums, cut, True, None)
    grad = grad_out
    if z is not None:
        grad = torch.empty_like(x)
        outputs(x, B, C, D, z, states, sums, cut, grad, grad_out, grad_z)

    wide_n, grads, kept = triton.cdiv(size, min(cut.BN, 64)), None, None
    needed = states is not None and not (single and grad_final is None)
    if needed:
        kept = x.new_empty((wide_n, cut.count, heads, dim), dtype=torch.float32)
    grads = grad_final if single else x.new_empty((cut.count, heads, dim, size), dtype=cut.dot)
    if needed or grad_initial is not None:
        _states_backward(C, grad, states, grad_final, None if single else grads, grad_initial, kept, sums, cut)

    def rows(*leading: int) -> Tensor:
        return x.new_empty((*leading, cut.count, heads, cut.Q), dtype=torch.float32)

    tiles = cut.Q // cut.T
    across, columns, totals = rows(tiles), rows(tiles), rows(tiles)
    inner = tiles * triton.cdiv(dim, cut.BP)
    share, parts = shares(heads // groups, cut.count * inner * groups)
    skips = None if grad_D is None else x.new_empty((cut.count * tiles, heads, dim), dtype=torch.float32)
    programs = cut.count * inner * groups * parts
    if programs and grad_x is not None:
        _inputs_bwd_kernel[(programs,)](
            B, C, D, grad, grads, *sums, grad_x, cut.table, length, cut.per_row, heads, heads // groups,
            groups * parts, B.stride(), C.stride(), strides(D, 2), grad.stride(), strides(grads),
            strides(grad_x), P=dim, N=size, HEADS=share, T=cut.T, BP=cut.BP, BN=cut.BN, EXACT=not cut.half,
            **cut.dots, **cut.where, **cut.within,
        )  # fmt: skip
    inner = tiles * (tiles + 1) // 2
    share, parts = shares(heads // groups, cut.count * inner * groups)
    pairs = x.new_empty((cut.count, groups, parts, cut.Q, cut.Q), dtype=torch.float32)
    programs = cut.count * inner * groups * parts
    if programs:
        _pairs_bwd_kernel[(programs,)](
            x, B, C, grad, *sums, pairs, across, columns, totals, skips, cut.table, cut.count, length, cut.per_row,
            heads, heads // groups, groups * parts, x.stride(), B.stride(), C.stride(), grad.stride(), P=dim, N=size,
            HEADS=share, T=cut.T, BP=cut.BP, BN=cut.BN, EXACT=not cut.half, **cut.dots, **cut.where, **cut.within,
        )  # fmt: skip
    if grad_D is not None and skips is not None:
        total = skips.sum(0)
        grad_D.copy_(total.sum(1) if grad_D.ndim == 1 else total)

    from_before = None if states is None else rows(wide_n)
    from_after = None if grads is None else rows(wide_n)
    if grad_C is not None or from_before is not None:
        _matrix_backward(grad, states, C, B, pairs, grad_C, from_before, sums, cut, False)
    if grad_B is not None or from_after is not None:
        _matrix_backward(x, grads, B, C, pairs, grad_B, from_after, sums, cut, True)

    if grad_dt is not None or grad_A is not None or grad_bias is not None:
        parts = (across, columns, totals, from_before, from_after, kept)
        steps_backward(dt, A, dt_bias, dt_softplus, sums[0], parts, (grad_dt, grad_A, grad_bias), dim, cut)
    for buffer, result in zip(buffers, results, strict=True):
        if buffer is not None and buffer is not result:
            buffer.copy_(result)


def _states_backward(
    C: Tensor, grad: Tensor, states: Tensor | None, grad_final: Tensor | None, grads: Tensor | None,
    grad_initial: Tensor | None, kept: Tensor | None, sums: tuple[Tensor, ...], cut: Plan,
) -> None:  # fmt: skip
    _, length, heads, dim = grad.shape
    groups, size = C.shape[2:]
    BN = min(cut.BN, 64)
    programs = cut.sequences * heads * triton.cdiv(dim, cut.BP) * triton.cdiv(size, BN)
    if programs:
        _states_bwd_kernel[(programs,)](
            C, grad, states, grad_final, grads, grad_initial, kept, *sums[1:], cut.table, cut.count, length,
            cut.per_row, heads, heads // groups, C.stride(), grad.stride(), strides(states), strides(grad_final),
            P=dim, N=size, BP=cut.BP, BN=BN, **cut.dots, **cut.where, **cut.across,
        )  # fmt: skip


def _matrix_backward(
    value: Tensor, states: Tensor | None, matrix: Tensor, other: Tensor, pairs: Tensor, out: Tensor | None,
    products: Tensor | None, sums: tuple[Tensor, ...], cut: Plan, of_input: bool,
) -> None:  # fmt: skip
    """Gradient of B (of_input) or C: shares of the heads side by side where there is little else."""
    _, length, heads, dim = value.shape
    groups, size = matrix.shape[2:]
    BN = min(cut.BN, 64)
    programs = cut.count * groups * triton.cdiv(size, BN)
    if not programs or not heads:
        if out is not None:
            out.zero_()
        return
    share, parts = shares(heads // groups, programs, PROGRAMS // 4 if states is not None else 1)
    target = out
    if out is not None and parts > 1:
        target = out.new_empty((parts, *out.shape), dtype=torch.float32)
    elif out is not None:
        target = out[None]
    _matrix_bwd_kernel[(programs * parts,)](
        value, states, matrix, other, *sums, pairs, target, products, cut.table, cut.count, length, cut.per_row,
        heads, heads // groups, groups, pairs.shape[2], parts, value.stride(), strides(states), matrix.stride(),
        other.stride(), strides(target, 5), P=dim, N=size, HEADS=share, T=cut.T,
        BP=cut.BP, BN=BN, BQ=min(cut.Q, 32), **cut.dots, **cut.where, INPUT=of_input, **cut.within,
    )  # fmt: skip
    if out is not None and target is not None and parts > 1:
        out.copy_(target.sum(0))
