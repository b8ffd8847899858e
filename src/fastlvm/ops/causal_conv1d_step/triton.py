"""One token of the causal convolution on GPUs: a Triton kernel for torch tensors.

The indices stay on the device, where checking their values would cost a synchronisation. So one of S or more raises no
error as on the CPU: it touches no memory and gives NaN in its row. What two rows with one index leave is undefined.
"""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _triton
from fastlvm.ops._triton import describe, yields

__all__ = ["describe", "run", "supports", "yields"]

_MOST_HELD = 1024  # the kernel holds all inputs of a channel at once


def supports(
    x: Any, state: Any, weight: Any, bias: Any, activation: str | None, state_indices: Any
) -> tuple[bool, str]:
    ok, reason = _triton.supports(x, state, weight, bias)
    if ok and state.shape[2] > _MOST_HELD:
        return False, f"a state of {state.shape[2]} inputs has no kernel; wants {_MOST_HELD} or fewer"
    return ok, reason


def run(x: Any, state: Any, weight: Any, bias: Any, activation: str | None, state_indices: Any) -> Any:
    from fastlvm.ops.causal_conv1d_step import triton_op

    return triton_op.run(x, state, weight, bias, activation is not None, state_indices)
