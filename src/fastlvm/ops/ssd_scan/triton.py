"""The scan of Mamba-2 on a GPU: kernels in Triton, forward and backward, for torch tensors."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _triton
from fastlvm.ops._triton import describe, yields

__all__ = ["describe", "run", "supports", "yields"]


def supports(x: Any, *args: Any) -> tuple[bool, str]:
    return _triton.supports(x)


def run(*args: Any) -> tuple[Any, Any]:
    from fastlvm.ops.ssd_scan import triton_op

    return triton_op.run(*args)
