"""The scan of Mamba-2 for mlx arrays: the compiled kernels on their memory."""

from __future__ import annotations

from fastlvm.ops._mlx import describe, runner, supports

__all__ = ["describe", "run", "supports"]

run = runner("ssd_scan")
