"""The selective scan on a GPU: kernels in Triton, forward and backward, for torch tensors."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _triton
from fastlvm.ops._triton import describe, yields

__all__ = ["describe", "run", "supports", "yields"]


def supports(u: Any, *args: Any) -> tuple[bool, str]:
    return _triton.supports(u)


def run(*args: Any) -> tuple[Any, Any]:
    from fastlvm.ops.ssm_scan import triton_op

    return triton_op.run(*args)
