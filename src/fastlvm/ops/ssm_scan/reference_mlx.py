"""The selective scan in plain mlx: the formulas of `reference`, over all of time at once.

Every state is in memory, [L, B, D, N], and mlx keeps a few such arrays for a gradient.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from fastlvm.ops import _mlx_call, _plain_mlx


def scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    delta_bias: Any,
    delta_softplus: bool,
    initial_state: Any,
    cu_seqlens: Any = None,
) -> tuple[Any, Any]:
    """Output [B, D, L] in u's dtype and final state [B, D, N]; computes in float32, in float64 for float64."""
    if cu_seqlens is not None:

        def alone(times: slice, sequence: slice | None) -> tuple[Any, Any]:
            def part(M: Any) -> Any:
                return M if M is None or M.ndim == 2 else M[..., times]

            state = None if initial_state is None or sequence is None else initial_state[sequence]
            return scan(part(u), part(delta), A, part(B), part(C), D, part(z), delta_bias, delta_softplus, state)

        return _plain_mlx.each_sequence("ssm_scan", cu_seqlens, u.shape[-1], -1, alone)

    dtype = _mlx_call.state_dtype(u)
    batch, channels, _ = u.shape
    x, step = u.astype(dtype), delta.astype(dtype)
    if delta_bias is not None:
        step = step + delta_bias.astype(dtype)[:, None]
    if delta_softplus:
        step = _plain_mlx.softplus(step)
    h = mx.zeros((batch, channels, A.shape[1]), dtype) if initial_state is None else initial_state.astype(dtype)
    y = mx.zeros(u.shape, dtype)
    if not u.size:
        return y.astype(u.dtype), h
    if A.shape[1]:
        decay = mx.exp(_time_first(step)[..., None] * A.astype(dtype))  # [L, B, D, N]
        inputs = _time_first(step * x)[..., None] * _states_last(B.astype(dtype), channels)
        states = _plain_mlx.recurrence(decay, inputs, h)
        y = mx.moveaxis((states * _states_last(C.astype(dtype), channels)).sum(-1), 0, -1)
        h = states[-1]
    if D is not None:
        y = y + D.astype(dtype)[:, None] * x
    if z is not None:
        y = y * _plain_mlx.silu(z.astype(dtype))
    return y.astype(u.dtype), h


def _time_first(x: Any) -> Any:
    return mx.moveaxis(x, -1, 0)


def _states_last(M: Any, channels: int) -> Any:
    """B or C in any of its layouts as [L or 1, B or 1, D or 1, N]."""
    if M.ndim == 2:  # (D, N): constant in time
        return M[None, None]
    if M.ndim == 3:  # (B, N, L): shared by all channels
        return _time_first(M)[:, :, None]
    return _time_first(_plain_mlx.per_channel(M, channels, 1))  # (B, G, N, L): a run of D / G channels a group
