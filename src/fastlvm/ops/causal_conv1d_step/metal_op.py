"""One token of the causal convolution on an Apple GPU in mlx's graph. Imported with the first call there."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _mlx_call
from fastlvm.ops.causal_conv1d_step import metal


def run(x: Any, state: Any, weight: Any, bias: Any, activation: str | None, state_indices: Any) -> Any:
    def forward(state: Any, x: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
        return metal.step(x, state, weight, bias, activation, state_indices)

    return _mlx_call.step("causal_conv1d_step", "causal_conv1d", state, (x, weight, bias), forward, metal=True)
