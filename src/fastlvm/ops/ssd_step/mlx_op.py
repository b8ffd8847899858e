"""One token of Mamba-2 on the memory of mlx arrays. Imported when the first mlx array arrives."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _mlx_call
from fastlvm.ops._extension import _C


def run(state: Any, *args: Any) -> Any:
    *inputs, dt_softplus, state_indices = args

    def forward(state: Any, *inputs: Any) -> tuple[Any, Any]:
        after = _mlx_call.copied(state)
        out, to_out = _mlx_call.empty_like(inputs[0])
        _C.ssd_step(*map(_mlx_call.memory, (after, *inputs)), dt_softplus, state_indices, to_out)
        return out, after

    return _mlx_call.step("ssd_step", "ssd_scan", state, inputs, forward)
