"""One token of the selective scan on the memory of mlx arrays. Imported when the first mlx array arrives."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _mlx_call
from fastlvm.ops._extension import _C


def run(state: Any, *args: Any) -> Any:
    *inputs, delta_softplus, state_indices = args

    def forward(state: Any, *inputs: Any) -> tuple[Any, Any]:
        after = _mlx_call.copied(state)
        out, to_out = _mlx_call.empty_like(inputs[0])
        _C.ssm_step(*map(_mlx_call.memory, (after, *inputs)), delta_softplus, state_indices, to_out)
        return out, after

    return _mlx_call.step("ssm_step", "ssm_scan", state, inputs, forward)
