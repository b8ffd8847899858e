"""A module's weights as numpy arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from fastlvm.errors import IntegrityError


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    """Copies of all weights, float32, by the names that the torch module has for them."""
    flat: dict[str, mx.array] = tree_flatten(module.parameters(), destination={})  # type: ignore[assignment]
    return {name: np.array(array) for name, array in flat.items()}


def load_weights(module: nn.Module, tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Put `tensors` into `module`; a missing, unknown or wrongly shaped one is an IntegrityError."""
    try:
        module.load_weights([(name, mx.array(array, mx.float32)) for name, array in tensors.items()])
    except ValueError as error:
        raise IntegrityError(f"{path} does not hold this model's weights ({error}): train again") from error
    mx.eval(module.parameters())
