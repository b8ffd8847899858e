"""One token of Mamba-2 in plain mlx: a scan of length 1."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _mlx_call, _plain_mlx
from fastlvm.ops.ssd_scan import reference_mlx


def run(state: Any, *args: Any) -> Any:
    """Output [b, h, p]; the state is written."""
    *inputs, dt_softplus, state_indices = args

    def forward(state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> tuple[Any, Any]:
        x, dt, B, C = (M[:, None] for M in (x, dt, B, C))
        gate = None if z is None else z[:, None]
        before = _plain_mlx.take(state, state_indices)
        out, after = reference_mlx.scan(x, dt, A, B, C, D, gate, bias, dt_softplus, before)
        out = _plain_mlx.blank(out[:, 0], state_indices)
        return out, _plain_mlx.put(state, state_indices, after)

    return _mlx_call.step("ssd_step", "ssd_scan", state, inputs, forward)
