"""The causal convolution for mlx arrays: the compiled kernels on their memory, on the GPU the Metal kernels."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _metal, _mlx
from fastlvm.ops._mlx import describe_with_metal as describe

__all__ = ["describe", "run", "supports"]

run = _mlx.runner("causal_conv1d")


def supports(x: Any, weight: Any, *args: Any) -> tuple[bool, str]:
    if _mlx.on_gpu(x) and weight.shape[1] > _metal.MOST_TAPS:
        return False, _metal.too_wide(weight)
    return _mlx.supports_with_metal(x, weight, *args, offsets=args[-1])
