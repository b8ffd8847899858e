"""The causal depthwise convolution in plain mlx: the formula of `reference`."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from fastlvm.ops import _mlx_call, _plain_mlx


def conv(
    x: Any, weight: Any, bias: Any, activation: str | None, initial_state: Any, cu_seqlens: Any = None
) -> tuple[Any, Any]:
    """Output [B, D, L] and final state [B, D, W-1], in x's dtype; computes in float32, in float64 for float64."""
    if cu_seqlens is not None:

        def alone(times: slice, sequence: slice | None) -> tuple[Any, Any]:
            state = None if initial_state is None or sequence is None else initial_state[sequence]
            return conv(x[..., times], weight, bias, activation, state)

        return _plain_mlx.each_sequence("causal_conv1d", cu_seqlens, x.shape[-1], -1, alone)

    dtype = _mlx_call.state_dtype(x)
    batch, channels, length = x.shape
    width = weight.shape[1]
    if initial_state is None:
        initial_state = mx.zeros((batch, channels, width - 1), x.dtype)
    line = mx.concatenate([initial_state.astype(dtype), x.astype(dtype)], axis=-1)  # [B, D, W-1+L]
    if not x.size:
        return mx.zeros(x.shape, x.dtype), line[..., length:].astype(x.dtype)
    y = mx.zeros(x.shape, dtype)
    for k in range(width):
        y = y + weight.astype(dtype)[:, k, None] * line[..., k : k + length]
    if bias is not None:
        y = y + bias.astype(dtype)[:, None]
    if activation is not None:
        y = _plain_mlx.silu(y)
    return y.astype(x.dtype), line[..., length:].astype(x.dtype)
