"""One token of the selective scan on a GPU: a kernel in Triton, for torch tensors.

The values of `state_indices` stay on the device, where no error can be raised: the row of an index of S or more is NaN,
and no state is touched. That no state is named twice is the caller's word.
"""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _step, _triton
from fastlvm.ops._triton import describe, yields

__all__ = ["describe", "run", "supports", "yields"]


def supports(state: Any, *args: Any) -> tuple[bool, str]:
    return _triton.supports(state)


def run(state: Any, *args: Any) -> Any:
    from fastlvm.ops.ssm_step import triton_op

    _step.check_apart("ssm_step", state)
    return triton_op.run(state, *args)
