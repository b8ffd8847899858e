"""The scan of Mamba-2 in plain mlx: the formulas of `reference`, by products of matrices within chunks of time.

Dao and Gu (2024), section 6: within a chunk the scan is a lower triangular matrix of products of decays, and from chunk
to chunk a recurrence of their states, which is such a product again. The logarithm of each product of decays is a sum
of its own, not a difference of two sums, which would lose the small ones. Longer sequences go segment by segment, and
their gradients keep the inputs and the states between segments alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from fastlvm.ops import _mlx_call, _plain_mlx
from fastlvm.ops._mlx_call import Arrays

# With chunks of c steps, decays take c numbers and states P N / c numbers a step and head: least near √(P N), 64 to 90.
_CHUNK = 64
_SEGMENT = 16 * _CHUNK  # large enough to fill a GPU, and of few enough chunks to bring their states together at once


def scan(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    dt_bias: Any,
    dt_softplus: bool,
    initial_state: Any,
    cu_seqlens: Any = None,
) -> tuple[Any, Any]:
    """Output [B, L, H, P] in x's dtype and final state [B, H, P, N]; computes in float32, in float64 for float64.

    Longer than a segment it is more than mx.export_function takes.
    """
    if cu_seqlens is not None:

        def alone(times: slice, sequence: slice | None) -> tuple[Any, Any]:
            gate = None if z is None else z[:, times]
            state = None if initial_state is None or sequence is None else initial_state[sequence]
            part = (x[:, times], dt[:, times], A, B[:, times], C[:, times])
            return scan(*part, D, gate, dt_bias, dt_softplus, state)

        return _plain_mlx.each_sequence("ssd_scan", cu_seqlens, x.shape[1], 1, alone)

    dtype = _mlx_call.state_dtype(x)
    batch, length, heads, dim = x.shape
    shape = (batch, heads, dim, B.shape[3])
    H = mx.zeros(shape, dtype) if initial_state is None else initial_state.astype(dtype)
    if not x.size:
        return mx.zeros(x.shape, x.dtype), H
    weights = tuple(None if each is None else each.astype(dtype) for each in (A, D, dt_bias))
    run = _segment if length <= _SEGMENT or not B.shape[3] else _segments
    return run((x, dt, B, C, z), weights, H, dt_softplus)


def _segments(timed: Arrays, weights: Arrays, H: Any, dt_softplus: bool) -> tuple[Any, Any]:
    """One segment after the other; the backward computes each again, from its inputs and the state before it."""
    arrays = (*timed, *weights, H)
    given, cut = [each is not None for each in arrays], sum(each is not None for each in timed)
    spans = [slice(begin, begin + _SEGMENT) for begin in range(0, timed[0].shape[1], _SEGMENT)]

    def segment(*present: Any) -> list[Any]:
        each = iter(present)
        *whole, state = (next(each) if there else None for there in given)
        return list(_segment(whole[: len(timed)], whole[len(timed) :], state, dt_softplus))

    def inputs(present: Arrays, times: slice, state: Any, ready: Arrays) -> list[Any]:
        part = (*(each[:, times] for each in present[:cut]), *present[cut:-1])
        return [*_plain_mlx.after(part, ready), state]

    def forward(*present: Any) -> tuple[Any, ...]:
        outs: list[Any] = []
        states = [present[-1]]
        for times in spans:
            out, state = segment(*inputs(present, times, states[-1], [*outs[-1:], states[-1]]))
            outs.append(out)
            states.append(state)
        return (mx.concatenate(outs, axis=1), states[-1], *states[1:-1])

    def backward(present: Arrays, cotangents: Arrays, results: Arrays) -> tuple[Any, ...]:
        dout, dstate, *dbetween = cotangents
        found: list[Any] = []
        parts: list[Any] = []
        for n, times in reversed(list(enumerate(spans))):
            given, before = [dout[:, times], dstate], results[n + 1] if n else present[-1]
            *found, dstate = mx.vjp(segment, inputs(present, times, before, [*given, *found]), given)[1]
            dstate = dstate + dbetween[n - 1] if n else dstate
            parts.insert(0, found)
        each = [list(gradients) for gradients in zip(*parts, strict=True)]
        return (*(mx.concatenate(g, axis=1) for g in each[:cut]), *(sum(g[1:], g[0]) for g in each[cut:]), dstate)

    call: Any = mx.custom_function(forward)
    call.vjp(backward)
    out, state, *_ = call(*(each for each in arrays if each is not None))
    return out, state


def _segment(timed: Arrays, weights: Arrays, H: Any, dt_softplus: bool) -> tuple[Any, Any]:
    """Output and state after it, from arrays with time, and parameters and a state in the compute dtype."""
    (x, dt, B, C, z), (A, D, dt_bias) = timed, weights
    u, size = x.astype(H.dtype), sizes(dt, dt_bias, dt_softplus, H.dtype)
    y = mx.zeros_like(u)
    if B.shape[3]:
        B, C = B.astype(H.dtype), C.astype(H.dtype)
        y, H = _chunks(size * A, size[..., None] * u, B, C, H)
    return finished(y, u, D, z).astype(x.dtype), H


def sizes(dt: Any, dt_bias: Any, dt_softplus: bool, dtype: Any) -> Any:
    """Of the steps, in the compute dtype."""
    size = dt.astype(dtype)
    if dt_bias is not None:
        size = size + dt_bias.astype(dtype)
    return _plain_mlx.softplus(size) if dt_softplus else size


def finished(y: Any, u: Any, D: Any, z: Any) -> Any:
    """The states' part of the output [..., H, P] with the skip from the inputs, and gated."""
    if D is not None:
        y = y + (D.astype(y.dtype)[:, None] if D.ndim == 1 else D.astype(y.dtype)) * u
    return y if z is None else y * _plain_mlx.silu(z.astype(y.dtype))


def _chunks(log_decay: Any, inputs: Any, B: Any, C: Any, H: Any) -> tuple[Any, Any]:
    """The sums over time alone: [B, L, H, P] and [B, H, P, N].

    From logarithms [B, L, H], inputs [B, L, H, P], and B and C [B, L, G, N]. The R heads of a group have their products
    with B and C as one, and are apart only in their decays.
    """
    (batch, length, heads, dim), (groups, state) = inputs.shape, B.shape[2:]
    split = (batch, length, groups, heads // groups)
    a, u, B, C = (_split(x) for x in (log_decay.reshape(split), inputs.reshape(*split, dim), B, C))
    a = mx.transpose(a, (0, 1, 3, 4, 2))  # [B, K, G, R, c]
    u = mx.transpose(u, (0, 1, 3, 4, 2, 5))  # [B, K, G, R, c, P]
    B, C = mx.swapaxes(B, 2, 3), mx.swapaxes(C, 2, 3)  # [B, K, G, c, N]
    count, size = a.shape[1], a.shape[-1]
    decay = _decay(a)
    scores = mx.where(_triangle(size), B @ mx.swapaxes(C, -1, -2), 0)  # [B, K, G, c, c], at [.., j, i]
    within = mx.swapaxes(scores[:, :, :, None] * decay, -1, -2) @ u
    left = mx.swapaxes(u * decay[..., -1:], -1, -2)  # [B, K, G, R, P, c]
    grown = left.reshape(batch, count, groups, -1, size) @ B  # [B, K, G, R P, N]
    grown = grown.reshape(*a.shape[:-1], -1)  # [B, K, G, R, P N]
    states = _carried(a.sum(-1), grown, H.reshape(batch, 1, *a.shape[2:-1], -1))
    before = states[:, :-1].reshape(batch, count, groups, -1, state)
    across = (C @ mx.swapaxes(before, -1, -2)).reshape(batch, count, groups, size, -1, dim)  # [B, K, G, c, R, P]
    across = mx.swapaxes(across, 3, 4) * mx.exp(mx.cumsum(a, axis=-1))[..., None]
    y = mx.transpose(within + across, (0, 1, 4, 2, 3, 5)).reshape(batch, count * size, heads, dim)
    return y[:, :length], states[:, -1].reshape(H.shape)


def _decay(a: Any) -> Any:
    """[..., c, c] from logarithms [..., c]: what is left at i of j, at [.., j, i]; 1 where i comes before j."""
    return mx.exp(mx.cumsum(mx.where(_triangle(a.shape[-1], 1), a[..., None, :], 0), axis=-1))


@cache
def _triangle(size: int, begin: int = 0) -> Any:
    """[c, c], whether i is no less than j + begin, at [j, i]."""
    return mx.array(np.triu(np.ones((size, size), np.bool_), begin))


def _carried(a: Any, grown: Any, initial: Any) -> Any:
    """The states before every chunk and after the last [B, K + 1, G, R, P N]; a is [B, K, G, R], initial a state."""
    a = mx.moveaxis(mx.concatenate([mx.zeros_like(a[:, :1]), a], axis=1), 1, -1)  # [B, G, R, K + 1]
    decay = mx.where(_triangle(a.shape[-1]), _decay(a), 0)
    given = mx.moveaxis(mx.concatenate([initial, grown], axis=1), 1, -2)  # [B, G, R, K + 1, P N]
    return mx.moveaxis(mx.swapaxes(decay, -1, -2) @ given, -2, 1)


def _split(x: Any) -> Any:
    """[B, L, ...] as [B, K, c, ...], zeros at the end."""
    length = x.shape[1]
    size = min(_CHUNK, length)
    lacking = -length % size
    if lacking:
        x = mx.concatenate([x, mx.zeros((x.shape[0], lacking, *x.shape[2:]), x.dtype)], axis=1)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])
