"""One token of the selective scan on an Apple GPU in mlx's graph. Imported with the first call there."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _mlx_call
from fastlvm.ops.ssm_step import metal


def run(state: Any, *args: Any) -> Any:
    *inputs, delta_softplus, state_indices = args

    def forward(state: Any, *inputs: Any) -> tuple[Any, Any]:
        whole: Any = (state, *inputs, delta_softplus, state_indices)
        return metal.step(*whole)

    return _mlx_call.step("ssm_step", "ssm_scan", state, inputs, forward, metal=True)
