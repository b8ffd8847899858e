"""One token of the selective scan for mlx arrays: compiled kernels on their memory, on the GPU the Metal kernel."""

from __future__ import annotations

from fastlvm.ops._mlx import describe_with_metal as describe
from fastlvm.ops._mlx import runner
from fastlvm.ops._mlx import supports_with_metal as supports

__all__ = ["describe", "run", "supports"]

run = runner("ssm_step")
