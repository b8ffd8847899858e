"""The selective scan on the memory of mlx arrays, with its gradient. Imported when the first mlx array arrives."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _mlx_call
from fastlvm.ops._extension import _C
from fastlvm.ops.ssm_scan import reference_mlx

_ALIKE = (0, 1, 6)  # u, delta and z


def run(*args: Any) -> tuple[Any, Any]:
    *_, delta_softplus, _, cu_seqlens, return_final_state = args

    def forward(*inputs: Any) -> tuple[Any, ...]:
        u, A = inputs[0], inputs[2]
        out, to_out = _mlx_call.empty_like(u)
        final_state = None
        if return_final_state:
            shape = (_mlx_call.sequences(u, cu_seqlens), *A.shape)
            final_state = _mlx_call.empty(shape, _mlx_call.state_dtype(u))
        *given, initial_state = map(_mlx_call.memory, inputs)
        _C.ssm_scan(*given, delta_softplus, initial_state, to_out, final_state, cu_seqlens)
        return (out, final_state) if return_final_state else (out,)

    def backward(cotangents: Any, results: Any, *inputs: Any) -> list[Any]:
        buffers = _mlx_call.gradient_buffers(inputs, _ALIKE)
        grads = [_mlx_call.memory(g) for g in (*cotangents, None)[:2]]
        *given, initial_state = map(_mlx_call.memory, inputs)
        to_gradients = _mlx_call.written(buffers)
        _C.ssm_scan_bwd(*grads, *given, delta_softplus, initial_state, *to_gradients, cu_seqlens)
        return _mlx_call.gradients(inputs, buffers)

    return differentiable(args, forward, backward)


def differentiable(args: Any, forward: Any, backward: Any, **kernels: Any) -> tuple[Any, Any]:
    """Output and final state or None of a call of `run`, by `_mlx_call.differentiable`."""
    *arrays, delta_softplus, initial_state, cu_seqlens, return_final_state = args

    def formula(*inputs: Any) -> tuple[Any, ...]:
        whole = (*inputs[:-1], delta_softplus, inputs[-1], cu_seqlens)
        return reference_mlx.scan(*whole)[: 2 if return_final_state else 1]

    results = _mlx_call.differentiable((*arrays, initial_state), forward, backward, formula, **kernels)
    return (results[0], results[1]) if return_final_state else (results[0], None)
