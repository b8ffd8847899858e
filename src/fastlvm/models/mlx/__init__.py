"""The predictors as `mlx.nn` modules: the same configurations, and the same weights by name and shape, without torch.

A checkpoint of either framework loads in the other. The ops are those of `fastlvm.ops`: on mlx's CPU device the
compiled kernels on the arrays' own memory.
"""

from __future__ import annotations

from fastlvm.models.mlx.build import create, load, save
from fastlvm.models.mlx.weights import load_weights, weights

__all__ = ["create", "load", "load_weights", "save", "weights"]
