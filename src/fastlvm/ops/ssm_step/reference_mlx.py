"""One token of the selective scan in plain mlx: a scan of length 1."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _mlx_call, _plain_mlx
from fastlvm.ops.ssm_scan import reference_mlx


def run(state: Any, *args: Any) -> Any:
    """Output [b, D]; the state is written."""
    *inputs, delta_softplus, state_indices = args

    def forward(state: Any, x: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> tuple[Any, Any]:
        x, delta, B, C = (M[..., None] for M in (x, delta, B, C))
        gate = None if z is None else z[..., None]
        before = _plain_mlx.take(state, state_indices)
        out, after = reference_mlx.scan(x, delta, A, B, C, D, gate, bias, delta_softplus, before)
        out = _plain_mlx.blank(out[..., 0], state_indices)
        return out, _plain_mlx.put(state, state_indices, after)

    return _mlx_call.step("ssm_step", "ssm_scan", state, inputs, forward)
