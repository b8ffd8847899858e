"""The selective scan on an Apple GPU in mlx's graph, with its gradient. Imported with the first call there."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _plain
from fastlvm.ops.ssm_scan import metal, mlx_op


def run(*args: Any) -> tuple[Any, Any]:
    u, _, A, B, C, *_, delta_softplus, _, cu_seqlens, return_final_state = args
    if cu_seqlens is not None:
        _plain.checked_offsets("ssm_scan", cu_seqlens, u.shape[-1])
    keeps = metal.Shape.of(u, A, B, C, cu_seqlens).keeps

    def whole(*inputs: Any) -> tuple[Any, ...]:
        return (*inputs[:-1], delta_softplus, inputs[-1], cu_seqlens)

    def forward(*inputs: Any) -> tuple[Any, ...]:
        # Kept whether or not there will be a gradient, which mlx does not say: one state in 128 steps is little to
        # write, and the backward would have to run the whole scan again.
        arguments: Any = (*whole(*inputs), return_final_state, True)
        return tuple(x for x in metal.scan(*arguments) if x is not None)

    def backward(cotangents: Any, results: Any, *inputs: Any) -> list[Any]:
        grad_out, grad_final = (*cotangents, None)[:2]
        arguments: Any = (grad_out, grad_final, *whole(*inputs), results[-1] if keeps else None)
        return list(metal.scan_bwd(*arguments))

    return mlx_op.differentiable(args, forward, backward, metal="ssm_scan", kept=int(keeps))
