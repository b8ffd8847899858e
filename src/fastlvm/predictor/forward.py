"""A model as a list of layers over a set of weights: checked once, then run in float32 on numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastlvm.errors import InputError
from fastlvm.predictor.layers import Layer, Shape, read_layer

BATCH = 256  # windows at a time: bounds the memory of a large call


class Plan:
    """The checked layer list of a model from [n, context, dim] to [n, dim]; no weights yet."""

    def __init__(self, entries: Any, context: int, dim: int) -> None:
        """Raises InputError for an unknown layer, a wrong field, or layers that do not fit each other."""
        if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
            raise InputError(f"layers is {type(entries).__name__}, and a list of at least one layer is wanted")
        self.layers: list[Layer] = []
        start = shape = Shape(context, dim)
        for number, entry in enumerate(entries):
            layer = read_layer(entry, f"layer {number}")
            try:
                shape = layer.after(shape, start)
            except ValueError as error:
                raise InputError(f"layer {number} ({entry['type']}) {error}: the list is not one model") from None
            self.layers.append(layer)
        if shape != Shape(None, dim):
            raise InputError(f"the last layer leaves {list(shape)}, and one vector of {dim} is wanted")
        self.shape = start

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight of the model."""
        return {name: shape for layer in self.layers for name, shape in layer.tensors().items()}

    def check_shapes(self, found: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InputError unless `found` holds the model's tensors and no others, in their shapes."""
        wanted = self.tensors()
        for name, shape in wanted.items():
            if name not in found:
                raise InputError(f"tensor {name} is missing")
            if tuple(found[name]) != shape:
                raise InputError(f"tensor {name} has shape {list(found[name])}, and {list(shape)} is wanted")
        for name in found.keys() - wanted.keys():
            raise InputError(f"tensor {name} belongs to none of the model's layers")


class Forward:
    """Context vectors float32 [n, context, dim] in the space → predictions float32 [n, dim], each from a zero state."""

    def __init__(self, plan: Plan, weights: Mapping[str, np.ndarray]) -> None:
        """Raises InputError for a missing, spare, wrongly shaped or not finite tensor, or one that is not float32."""
        plan.check_shapes({name: array.shape for name, array in weights.items()})
        for name, array in weights.items():
            if array.dtype != np.float32:
                raise InputError(f"tensor {name} is {array.dtype}, and float32 is wanted")
            if not np.isfinite(array).all():
                raise InputError(f"tensor {name} holds NaN or an infinite value")
        self.plan = plan
        self._steps = [layer.step(weights) for layer in plan.layers]

    def __call__(self, context: np.ndarray) -> np.ndarray:
        n, dim = len(context), self.plan.shape.dim
        if n <= BATCH:
            return self._run(context)
        out = np.empty((n, dim), np.float32)
        for start in range(0, n, BATCH):
            out[start : start + BATCH] = self._run(context[start : start + BATCH])
        return out

    def _run(self, context: np.ndarray) -> np.ndarray:
        h = context
        for step in self._steps:
            h = step(h, context)
        return h
