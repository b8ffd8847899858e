"""The scan of Mamba-2 in plain mlx: the formulas of `reference`, by products of matrices within chunks of time.

Dao and Gu (2024), section 6: within a chunk the scan is a lower triangular matrix of products of decays, and from chunk
to chunk a recurrence of their states. The logarithm of each product is a sum of its own, not a difference of two sums,
which would lose the small ones.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from fastlvm.ops import _mlx_call, _plain_mlx

_CHUNK = 64


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
    """Output [B, L, H, P] in x's dtype and final state [B, H, P, N]; computes in float32, in float64 for float64."""
    if cu_seqlens is not None:

        def alone(times: slice, sequence: slice | None) -> tuple[Any, Any]:
            gate = None if z is None else z[:, times]
            state = None if initial_state is None or sequence is None else initial_state[sequence]
            part = (x[:, times], dt[:, times], A, B[:, times], C[:, times])
            return scan(*part, D, gate, dt_bias, dt_softplus, state)

        return _plain_mlx.each_sequence("ssd_scan", cu_seqlens, x.shape[1], 1, alone)

    dtype = _mlx_call.state_dtype(x)
    batch, _, heads, dim = x.shape
    u, step = x.astype(dtype), dt.astype(dtype)
    if dt_bias is not None:
        step = step + dt_bias.astype(dtype)
    if dt_softplus:
        step = _plain_mlx.softplus(step)
    shape = (batch, heads, dim, B.shape[3])
    H = mx.zeros(shape, dtype) if initial_state is None else initial_state.astype(dtype)
    y = mx.zeros(x.shape, dtype)
    if not x.size:
        return y.astype(x.dtype), H
    if B.shape[3]:
        B, C = (_plain_mlx.per_channel(M.astype(dtype), heads, 2) for M in (B, C))  # [B, L, H, N]
        y, H = _chunks(step * A.astype(dtype), step[..., None] * u, B, C, H)
    if D is not None:
        y = y + (D.astype(dtype)[:, None] if D.ndim == 1 else D.astype(dtype)) * u
    if z is not None:
        y = y * _plain_mlx.silu(z.astype(dtype))
    return y.astype(x.dtype), H


def _chunks(log_decay: Any, inputs: Any, B: Any, C: Any, H: Any) -> tuple[Any, Any]:
    """The sums over time alone: [B, L, H, P] and [B, H, P, N], from logarithms [B, L, H] and inputs [B, L, H, P]."""
    length = inputs.shape[1]
    a, u, B, C = (_split(x) for x in (log_decay, inputs, B, C))  # [B, K, H, c, ...]
    below = mx.tril(mx.ones((a.shape[-1], a.shape[-1]), dtype=mx.bool_), -1)
    sums = mx.cumsum(mx.where(below, a[..., None], 0), axis=-2)  # of a over (j, i], at [.., i, j]
    decay = mx.where(mx.logical_not(below.T), mx.exp(sums), 0)  # [B, K, H, c, c]
    within = ((C @ mx.swapaxes(B, -1, -2)) * decay) @ u
    grown = mx.swapaxes(u * decay[..., -1, :, None], -1, -2) @ B  # [B, K, H, P, N]
    whole = mx.exp(a.sum(-1))[..., None, None]
    ends = _plain_mlx.recurrence(mx.moveaxis(whole, 1, 0), mx.moveaxis(grown, 1, 0), H)  # [K, B, H, P, N]
    before = mx.moveaxis(mx.concatenate([H[None], ends[:-1]]), 0, 1)
    across = mx.exp(mx.cumsum(a, axis=-1))[..., None] * (C @ mx.swapaxes(before, -1, -2))
    y = mx.swapaxes(within + across, 2, 3)  # [B, K, c, H, P]
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length], ends[-1]


def _split(x: Any) -> Any:
    """[B, L, H, ...] as [B, K, H, c, ...], zeros at the end."""
    length = x.shape[1]
    size = min(_CHUNK, length)
    lacking = -length % size
    if lacking:
        x = mx.concatenate([x, mx.zeros((x.shape[0], lacking, *x.shape[2:]), x.dtype)], axis=1)
    return mx.swapaxes(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 2, 3)
