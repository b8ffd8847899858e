"""The causal convolution on GPUs: Triton kernels, forward and backward, for torch tensors."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _triton
from fastlvm.ops._triton import describe, yields

__all__ = ["describe", "run", "supports", "yields"]

_MOST_TAPS = 16  # the kernels unroll them


def supports(
    x: Any, weight: Any, bias: Any, activation: str | None, initial_state: Any, cu_seqlens: Any
) -> tuple[bool, str]:
    ok, reason = _triton.supports(x, weight, bias, initial_state)
    if ok and weight.shape[1] > _MOST_TAPS:
        return False, f"a filter of {weight.shape[1]} taps has no kernel; wants {_MOST_TAPS} or less"
    return ok, reason


def run(x: Any, weight: Any, bias: Any, activation: str | None, initial_state: Any, cu_seqlens: Any) -> tuple[Any, Any]:
    from fastlvm.ops.causal_conv1d import triton_op

    return triton_op.run(x, weight, bias, activation is not None, initial_state, cu_seqlens)
