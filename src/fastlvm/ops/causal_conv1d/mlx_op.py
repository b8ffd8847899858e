"""The causal convolution on the memory of mlx arrays, with its gradient. Imported when the first mlx array arrives."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _mlx_call
from fastlvm.ops._extension import _C
from fastlvm.ops.causal_conv1d import reference_mlx

_ALIKE = (0,)  # x


def run(*args: Any) -> tuple[Any, Any]:
    *_, activation, _, cu_seqlens = args
    silu = activation is not None

    def forward(*inputs: Any) -> tuple[Any, Any]:
        x, weight, *_ = inputs
        out, to_out = _mlx_call.empty_like(x)
        shape = (_mlx_call.sequences(x, cu_seqlens), x.shape[1], weight.shape[1] - 1)
        final_state = _mlx_call.empty(shape, x.dtype)
        *given, initial_state = map(_mlx_call.memory, inputs)
        _C.causal_conv1d(*given, silu, initial_state, to_out, _mlx_call.memory(final_state), cu_seqlens)
        return out, final_state

    def backward(cotangents: Any, results: Any, *inputs: Any) -> list[Any]:
        buffers = _mlx_call.gradient_buffers(inputs, _ALIKE)
        grads = map(_mlx_call.memory, cotangents)
        *given, initial_state = map(_mlx_call.memory, inputs)
        _C.causal_conv1d_bwd(*grads, *given, silu, initial_state, *_mlx_call.written(buffers), cu_seqlens)
        return _mlx_call.gradients(inputs, buffers)

    return differentiable(args, forward, backward)


def differentiable(args: Any, forward: Any, backward: Any, **kernels: Any) -> tuple[Any, Any]:
    """Output and final state of a call of `run`, by `_mlx_call.differentiable`."""
    x, weight, bias, activation, initial_state, cu_seqlens = args

    def formula(x: Any, weight: Any, bias: Any, initial_state: Any) -> tuple[Any, Any]:
        return reference_mlx.conv(x, weight, bias, activation, initial_state, cu_seqlens)

    inputs = (x, weight, bias, initial_state)
    out, final_state = _mlx_call.differentiable(inputs, forward, backward, formula, **kernels)
    return out, final_state
