"""The selective scan for mlx arrays: the compiled kernels on their memory, on the GPU the Metal kernels."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _mlx
from fastlvm.ops._mlx import describe_with_metal as describe

__all__ = ["describe", "run", "supports"]

run = _mlx.runner("ssm_scan")


def supports(*args: Any) -> tuple[bool, str]:
    return _mlx.supports_with_metal(*args, offsets=args[-1])
