"""The causal convolution for mlx arrays: the compiled kernels on their memory."""

from __future__ import annotations

from fastlvm.ops._mlx import describe, runner, supports

__all__ = ["describe", "run", "supports"]

run = runner("causal_conv1d")
