"""The causal convolution on an Apple GPU in mlx's graph, with its gradient. Imported with the first call there."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _plain
from fastlvm.ops.causal_conv1d import metal, mlx_op


def run(*args: Any) -> tuple[Any, Any]:
    x, _, _, activation, _, cu_seqlens = args
    if cu_seqlens is not None:
        _plain.checked_offsets("causal_conv1d", cu_seqlens, x.shape[-1])

    def whole(x: Any, weight: Any, bias: Any, initial_state: Any) -> tuple[Any, ...]:
        return x, weight, bias, activation, initial_state, cu_seqlens

    def forward(*inputs: Any) -> tuple[Any, Any]:
        arguments: Any = (*whole(*inputs), True)
        return metal.conv(*arguments)

    def backward(cotangents: Any, results: Any, *inputs: Any) -> list[Any]:
        return list(metal.conv_bwd(*cotangents, *whole(*inputs)))

    return mlx_op.differentiable(args, forward, backward, metal="causal_conv1d")
