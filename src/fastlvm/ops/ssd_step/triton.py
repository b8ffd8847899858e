"""One token of Mamba-2 on a GPU: a kernel in Triton, for torch tensors.

`state_indices` stay on the GPU, where their values cannot be checked without waiting for it: an index of S or more
touches no state and fills its row of the output with NaN, and what two equal indices do to their state is undefined.
"""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _triton
from fastlvm.ops._triton import describe, yields

__all__ = ["describe", "run", "supports", "yields"]


def supports(state: Any, *args: Any) -> tuple[bool, str]:
    return _triton.supports(state)


def run(*args: Any) -> Any:
    from fastlvm.ops.ssd_step import triton_op

    return triton_op.run(*args)
