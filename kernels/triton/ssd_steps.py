"""The step sizes of the scan of Mamba-2 and the running sums of its decays, and their backward.

A running sum is kept in base 2 and as two floats, high and low: the difference of two of them is then right where both
are large, next to a step that forgets everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastlvm.kernels.triton.math import LOG2E, exp2, sigmoid, softplus
from fastlvm.kernels.triton.ssd_chunks import Plan, span, strides, wide
from torch import Tensor


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
def _steps_bwd_kernel(
    dt, dt_bias, A, steps, rows, columns, totals, from_before, from_after, kept, grad_dt, grad_A, grad_bias, table,
    count, length, per_row, heads, bias_s, A_s, dt_s, grad_dt_s, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr,
    Q: tl.constexpr, T: tl.constexpr, BH: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Gradients of the step sizes of a chunk for BH heads, and what it adds to those of A and the bias."""
    blocks = tl.cdiv(heads, BH)
    k, h = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    row, begin, tokens = span(k, table, length, per_row, Q, PACKED)
    t, here = tl.arange(0, Q), (h < heads)[:, None]
    of = (wide(k) * heads + h)[:, None]
    at = of * Q + t[None, :]  # [BH, Q]
    every = wide(count) * heads * Q
    step = tl.load(steps + at, mask=here, other=0.0)
    pairs, own = tl.zeros([BH, Q], tl.float32), tl.zeros([BH, Q], tl.float32)
    for i in tl.static_range(Q // T):  # tiles of pairs whose other token is in tile i
        later, sooner = here & (t < (i + 1) * T)[None, :], here & (t >= i * T)[None, :]
        own += tl.load(totals + i * every + at, mask=later, other=0.0)
        pairs -= step * tl.load(columns + i * every + at, mask=later, other=0.0)
        pairs += tl.load(rows + i * every + at, mask=sooner, other=0.0)
    if from_before is not None:
        for i in tl.static_range(SUMS):
            pairs += tl.load(from_before + i * every + at, mask=here, other=0.0)
    decay = tl.cumsum(pairs, 1, reverse=True)
    if from_after is not None:
        before = here & (t > 0)[None, :]
        passed = tl.zeros([BH, Q], tl.float32)
        for i in tl.static_range(SUMS):
            own += tl.load(from_after + i * every + at, mask=here, other=0.0)
            passed += tl.load(from_after + i * every + at - 1, mask=before, other=0.0)
        decay += tl.cumsum(passed * tl.load(steps + at - 1, mask=before, other=0.0), 1)
    if kept is not None:
        p = tl.arange(0, WIDE)[None, :]
        whole = tl.zeros([BH], tl.float32)
        for i in tl.static_range(SUMS):
            at_kept = kept + (i * wide(count) * heads + of) * P + p
            whole += tl.sum(tl.load(at_kept, mask=here & (p < P), other=0.0), 1)
        decay += whole[:, None]
    live = here & (t < tokens)[None, :]
    rate = tl.load(A + h * A_s, mask=h < heads, other=0.0).to(tl.float32)
    grad = tl.where(live, rate[:, None] * decay + own, 0.0)
    if SOFTPLUS:
        at_dt = dt + row * dt_s[0] + begin * dt_s[1] + t[None, :] * dt_s[1] + h[:, None] * dt_s[2]
        raw = tl.load(at_dt, mask=live, other=0.0).to(tl.float32)
        if dt_bias is not None:
            raw += tl.load(dt_bias + h * bias_s, mask=h < heads, other=0.0).to(tl.float32)[:, None]
        grad = tl.where(raw > 20.0, grad, grad * sigmoid(raw))
    if grad_dt is not None:
        at_dt = grad_dt + row * grad_dt_s[0] + begin * grad_dt_s[1] + t[None, :] * grad_dt_s[1]
        tl.store(at_dt + h[:, None] * grad_dt_s[2], grad, mask=live)
    at = wide(k) * heads + h
    tl.store(grad_A + at, tl.sum(tl.where(live, decay * step, 0.0), 1), mask=h < heads)
    tl.store(grad_bias + at, tl.sum(grad, 1), mask=h < heads)


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


def steps_backward(
    dt: Tensor, A: Tensor, dt_bias: Tensor | None, dt_softplus: bool, steps: Tensor, parts: Sequence[Tensor | None],
    buffers: Sequence[Tensor | None], dim: int, cut: Plan,
) -> None:  # fmt: skip
    """Write the gradients of dt, A and dt_bias that have a buffer, from the `parts` the other kernels left."""
    _, length, heads = dt.shape
    grad_dt, *grads = buffers
    per_chunk = dt.new_empty((2, cut.count, heads), dtype=torch.float32)
    block = min(8, triton.next_power_of_2(max(heads, 1)))
    programs = cut.count * triton.cdiv(heads, block)
    from_before, from_after, kept = parts[3:]
    tiles = max(1, *(0 if m is None else len(m) for m in (from_before, from_after, kept)))
    if programs:
        _steps_bwd_kernel[(programs,)](
            dt, dt_bias, A, steps, *parts, grad_dt, *per_chunk, cut.table, cut.count, length, cut.per_row, heads,
            *strides(dt_bias, 1), *A.stride(), dt.stride(), strides(grad_dt, 3), SOFTPLUS=dt_softplus, Q=cut.Q,
            T=cut.T, BH=block, P=dim, WIDE=triton.next_power_of_2(max(dim, 1)), SUMS=tiles, **cut.where, num_warps=4,
        )  # fmt: skip
    for buffer, total in zip(grads, per_chunk.sum(1), strict=True):
        if buffer is not None:
            buffer.copy_(total)
