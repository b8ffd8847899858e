"""The scan of Mamba-2 in chunks of Q tokens, for tensor cores: the forward.

Inside a chunk the scan is a product of matrices, `Y = ((C Bᵀ) ∘ M) (dt X)` with `M_ts = exp(a_s+1 + .. + a_t)`; a state
[P, N] that is handed from chunk to chunk stands for all that came before (Dao and Gu, 2024, section 6). Three kernels:
step sizes and running sums of the decays; the states that enter the chunks; the outputs. One sequence that fits a chunk
takes a single one.

A running sum is kept in base 2 and as two floats, high and low: the difference of two of them is then right where both
are large, next to a step that forgets everything. Between the kernels, rows [·, heads, Q] of all chunks hold what
belongs to a token; past the end of a sequence their step size is 0 and the running sum stands still.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastlvm.kernels.triton.math import LOG2E, exp2, sigmoid, softplus
from torch import Tensor

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
PROGRAMS = 1024  # enough for every multiprocessor of a large GPU, several times


@triton.jit
def wide(i):
    """i in 64 bits, whatever it is: a number known while compiling has no `.to`."""
    return tl.full([], 0, tl.int64) + i


@triton.jit
def span(k, table, length, per_row, Q: tl.constexpr, PACKED: tl.constexpr):
    """Row of the batch, first token and number of tokens of chunk k."""
    if PACKED:
        row, begin = 0 * k, tl.load(table + 2 * k)
        count = tl.load(table + 2 * k + 1)
    else:
        row, begin = k // per_row, k % per_row * Q
        count = tl.minimum(length - begin, Q)
    return wide(row), wide(begin), count


@triton.jit
def chunks_of(sequence, table, per_row, count, PACKED: tl.constexpr):
    """First chunk of a sequence, and of the next one."""
    if PACKED:
        first, end = tl.load(table + 2 * count + sequence), tl.load(table + 2 * count + sequence + 1)
    else:
        first, end = sequence * per_row, sequence * per_row + per_row
    return first, end


@triton.jit
def tile(at, rows, live, columns, strides, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, columns] at `at`: 0 where a row is not live and from column WIDTH on."""
    mask = live[:, None]
    if WIDTH % BLOCK:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(at + rows[:, None] * strides[0] + columns[None, :] * strides[1], mask=mask, other=0.0)


@triton.jit
def put(at, value, rows, live, columns, strides, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write [rows, columns] where `tile` reads them."""
    mask = live[:, None]
    if WIDTH % BLOCK:
        mask = mask & (columns < WIDTH)[None, :]
    tl.store(at + rows[:, None] * strides[0] + columns[None, :] * strides[1], value, mask=mask)


@triton.jit
def cumulated(step, rate):
    """Running sums of the decays `step` [Q, ...] · `rate` in base 2, high and low."""
    total = tl.cumsum(step.to(tl.float64) * (rate.to(tl.float64) * LOG2E), 0)
    high = total.to(tl.float32)
    return high, (total - high.to(tl.float64)).to(tl.float32)


@triton.jit
def decay_between(high, low, since, until, EXACT: tl.constexpr):
    """exp of the decays after the one at `since` up to the one at `until`, which are places in the running sums.

    Not EXACT is within half a unit of a 16-bit number, where a chunk's decays do not multiply to less than 2^-4096.
    """
    log = tl.load(high + until) - tl.load(high + since)
    if EXACT:
        log += tl.load(low + until) - tl.load(low + since)
    return exp2(log)


@triton.jit
def decay_until(high, low, until):
    """exp of the decays from the beginning of the chunk on."""
    return exp2(tl.load(high + until) + tl.load(low + until))


@triton.jit
def _steps_kernel(
    dt, dt_bias, A, steps, high, low, table, length, per_row, heads, bias_s, A_s, dt_s,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(heads, BH)
    k, h = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    row, begin, count = span(k, table, length, per_row, Q, PACKED)
    t, here = tl.arange(0, Q), h < heads
    live = (t < count)[:, None] & here[None, :]
    step = tl.load(
        dt + row * dt_s[0] + begin * dt_s[1] + t[:, None] * dt_s[1] + h[None, :] * dt_s[2], mask=live, other=0.0
    ).to(tl.float32)
    if dt_bias is not None:
        step += tl.load(dt_bias + h * bias_s, mask=here, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        step = softplus(step)
    step = tl.where(live, step, 0.0)  # [Q, BH]
    rate = tl.load(A + h * A_s, mask=here, other=0.0)
    above, below = cumulated(step, rate[None, :])
    at = (wide(k) * heads + h)[None, :] * Q + t[:, None]
    tl.store(steps + at, step, mask=here[None, :])
    tl.store(high + at, above, mask=here[None, :])
    tl.store(low + at, below, mask=here[None, :])


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


class Plan(NamedTuple):
    """How a call is cut: `count` chunks of Q tokens, rows of `per_row` chunks or, packed, a table of them."""

    Q: int
    T: int  # tokens a program has for itself
    BP: int
    BN: int
    half: bool
    dot: torch.dtype
    precision: str
    count: int
    per_row: int
    sequences: int
    table: Tensor | None  # int32: begin and length of every chunk, then the first chunk of every sequence, then `count`
    across: dict[str, Any]  # how the kernels are launched that go from chunk to chunk
    within: dict[str, Any]  # and those that go from head to head

    @property
    def dots(self) -> dict[str, Any]:
        return {"Q": self.Q, "DOT": _TYPES[self.dot], "PRECISION": self.precision}

    @property
    def where(self) -> dict[str, Any]:
        return {"PACKED": self.table is not None}


def plan(x: Tensor, B: Tensor, C: Tensor, offsets: Sequence[int] | None) -> Plan:
    """The plan for a call; `offsets` are those of packed sequences."""
    batch, length, _, dim = x.shape
    half = x.dtype != torch.float32 and x.dtype == B.dtype == C.dtype
    target, arch = "interpreter", None
    if not triton.knobs.runtime.interpret:
        device = triton.runtime.driver.active.get_current_target()
        target, arch = device.backend, device.arch
    if half:
        dot, precision = x.dtype, "ieee"
        Q, T, BP, BN = 128, 64, 64, 128
    else:
        dot, precision = torch.float32, "tf32x3" if target == "cuda" else "ieee"
        Q, T, BP, BN = 64, 32, 32, 32
    if target == "hip":  # 64 KiB of shared memory
        Q, BN = min(Q, 64), min(BN, 64)
    if target == "interpreter" and dot == torch.bfloat16:
        dot = torch.float32  # it multiplies the bits of bfloat16 as integers
    across, within = {"num_warps": 4, "num_stages": 2}, {"num_warps": 4, "num_stages": 2}
    if half and arch == 90:  # three programs on a multiprocessor; without the limit there is room for two
        across["maxnreg"] = 168
    if max(dim, B.shape[3]) > (256 if arch in (90, 100) else 128):  # no room in shared memory for two stages
        within["num_stages"] = 1
    longest = length if offsets is None else max((b - a for a, b in pairwise(offsets)), default=0)
    Q = min(Q, _block(longest))
    T, BP, BN = min(T, Q), min(BP, _block(dim)), min(BN, _block(B.shape[3]))
    if offsets is None:
        per_row = triton.cdiv(length, Q)
        return Plan(Q, T, BP, BN, half, dot, precision, batch * per_row, per_row, batch, None, across, within)
    chunks, firsts = [], [0]
    for begin, end in pairwise(offsets):
        chunks += [n for at in range(begin, end, Q) for n in (at, min(Q, end - at))]
        firsts.append(len(chunks) // 2)
    table = torch.tensor(chunks + firsts, dtype=torch.int32).to(x.device, non_blocking=True)
    return Plan(Q, T, BP, BN, half, dot, precision, firsts[-1], 0, len(offsets) - 1, table, across, within)


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def reachable(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, copied where the offsets inside one tile may pass 32 bits."""

    def far(x: Tensor) -> bool:
        return any(stride * min(size, 512) >= 2**30 for stride, size in zip(x.stride()[1:], x.shape[1:], strict=True))

    return [x.contiguous() if x is not None and far(x) else x for x in tensors]


def shares(heads: int, programs: int, wanted: int = PROGRAMS) -> tuple[int, int]:
    """How many of the heads of a group a program takes, and how many programs that is for each of `programs`."""
    parts = min(max(heads, 1), triton.cdiv(wanted, max(programs, 1)))
    share = max(1, triton.cdiv(heads, parts))
    return share, triton.cdiv(heads, share)


def strides(x: Tensor | None, rank: int = 4) -> tuple[int, ...]:
    """Strides of x, 0 for those it lacks."""
    own = () if x is None else x.stride()
    return (*own, *[0] * (rank - len(own)))


def running_sums(dt: Tensor, A: Tensor, dt_bias: Tensor | None, dt_softplus: bool, cut: Plan) -> tuple[Tensor, ...]:
    """Step sizes and the running sums of the decays, high and low: [chunks, H, Q] each."""
    _, length, heads = dt.shape
    buffers = tuple(dt.new_empty((cut.count, heads, cut.Q), dtype=torch.float32) for _ in range(3))
    block = min(16, triton.next_power_of_2(max(heads, 1)))
    programs = cut.count * triton.cdiv(heads, block)
    if programs:
        _steps_kernel[(programs,)](
            dt, dt_bias, A, *buffers, cut.table, length, cut.per_row, heads, *strides(dt_bias, 1), *A.stride(),
            dt.stride(), SOFTPLUS=dt_softplus, Q=cut.Q, BH=block, **cut.where, num_warps=4,
        )  # fmt: skip
    return buffers


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
    x, dt, B, C, z, initial = reachable(x, dt, B, C, z, initial)
    batch, length, heads, dim = x.shape
    groups, size = B.shape[2:]
    cut = plan(x, B, C, offsets)
    if cut.per_row == 1:
        programs = batch * heads * triton.cdiv(dim, cut.BP)
        if programs:
            _single_kernel[(programs,)](
                x, dt, A, B, C, D, z, dt_bias, initial, out, final, length, heads, heads // groups, x.stride(),
                dt.stride(), *A.stride(), B.stride(), C.stride(), strides(D, 2), strides(z), *strides(dt_bias, 1),
                strides(initial), out.stride(), P=dim, N=size, BP=cut.BP, BN=cut.BN, SOFTPLUS=dt_softplus,
                SPLIT=cut.half and final is not None, **cut.dots, num_warps=8 if cut.Q == 128 else 4,
            )  # fmt: skip
        return
    sums = running_sums(dt, A, dt_bias, dt_softplus, cut)
    states = entering_states(x, B, initial, sums, cut, True, final)
    outputs(x, B, C, D, z, states, sums, cut, out)
