"""One token of the causal convolution on the memory of mlx arrays. Imported when the first mlx array arrives."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _mlx_call
from fastlvm.ops._extension import _C


def run(x: Any, state: Any, weight: Any, bias: Any, activation: str | None, state_indices: Any) -> Any:
    def forward(state: Any, *inputs: Any) -> tuple[Any, Any]:
        after = _mlx_call.copied(state)
        out, to_out = _mlx_call.empty_like(inputs[0])
        x, held, *rest = map(_mlx_call.memory, (inputs[0], after, *inputs[1:]))
        _C.causal_conv1d_step(x, held, *rest, activation is not None, state_indices, to_out)
        return out, after

    return _mlx_call.step("causal_conv1d_step", "causal_conv1d", state, (x, weight, bias), forward)
