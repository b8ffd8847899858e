"""One token of the causal depthwise convolution in plain mlx: the formula of `reference`."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from fastlvm.ops import _mlx_call, _plain_mlx


def run(x: Any, state: Any, weight: Any, bias: Any, activation: str | None, state_indices: Any) -> Any:
    """Output [b, D]; the state is written."""

    def forward(state: Any, x: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
        dtype = _mlx_call.state_dtype(x)
        past = _plain_mlx.take(state, state_indices).astype(dtype)  # [b, D, W-1 or more]
        line = mx.concatenate([past, x.astype(dtype)[..., None]], axis=-1)
        y = (line[..., line.shape[-1] - weight.shape[1] :] * weight.astype(dtype)).sum(-1)
        if bias is not None:
            y = y + bias.astype(dtype)
        if activation is not None:
            y = _plain_mlx.silu(y)
        out = _plain_mlx.blank(y, state_indices).astype(x.dtype)
        return out, _plain_mlx.put(state, state_indices, line[..., 1:])

    return _mlx_call.step("causal_conv1d_step", "causal_conv1d", state, (x, weight, bias), forward)
