"""Training with mlx: the loop, the files and the objective of `fastlvm.training`, with mlx's gradients and optimizers.

Nothing here imports torch.
"""

from __future__ import annotations

from fastlvm.training.mlx.trainer import train

__all__ = ["train"]
