"""One token of Mamba-2 in plain mlx: the formulas of `reference`, as a small graph."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from fastlvm.ops import _mlx_call, _plain_mlx
from fastlvm.ops.ssd_scan.reference_mlx import finished, sizes


def run(state: Any, *args: Any) -> Any:
    """Output [b, h, p]; the state is written."""
    *inputs, dt_softplus, state_indices = args

    def forward(state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> tuple[Any, Any]:
        dtype = _mlx_call.state_dtype(x)
        u, size = x.astype(dtype), sizes(dt, bias, dt_softplus, dtype)
        B, C = (_plain_mlx.per_channel(M.astype(dtype), x.shape[1], 1)[:, :, None] for M in (B, C))  # [b, h, 1, n]
        H = _plain_mlx.take(state, state_indices).astype(dtype)  # [b, h, p, n]
        H = mx.exp(size * A.astype(dtype))[..., None, None] * H + (size[..., None] * u)[..., None] * B
        out = finished((H * C).sum(-1), u, D, z).astype(x.dtype)
        return _plain_mlx.blank(out, state_indices), _plain_mlx.put(state, state_indices, H)

    return _mlx_call.step("ssd_step", "ssd_scan", state, inputs, forward)
