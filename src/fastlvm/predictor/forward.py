"""A model as a list of layers over a set of weights: checked once, packed by csrc/predictor, run without the GIL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastlvm.data import Space
from fastlvm.errors import InputError, brief, shown
from fastlvm.ops._extension import _C
from fastlvm.predictor.layers import SCALE, Layer, Native, Shape, read_layer


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

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name and shape of the weights that may be packed in a lower precision."""
        return {name: shape for layer in self.layers for name, shape in layer.matrices().items()}

    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the weights that are float32 in any case."""
        return {name: shape for layer in self.layers for name, shape in layer.vectors().items()}

    def operations(self) -> int:
        """Multiplications, additions and exps of the prediction of one context."""
        total, shape = 0, self.shape
        for layer in self.layers:
            total += layer.operations(shape)
            shape = layer.after(shape, self.shape)
        return total

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight of the model."""
        return {**self.matrices(), **self.vectors()}

    def check_shapes(self, found: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InputError unless `found` holds the model's tensors and no others, in their shapes.

        Any matrix may have its scale beside it.
        """
        wanted = self.tensors()
        scales = {name + SCALE: shape[:1] for name, shape in self.matrices().items()}
        for name in wanted:
            if name not in found:
                raise InputError(f"tensor {name} is missing")
        for name, shape in {**wanted, **scales}.items():
            if name in found and tuple(found[name]) != shape:
                raise InputError(f"tensor {name} has shape {shown(list(found[name]))}, and {list(shape)} is wanted")
        for name in found.keys() - wanted.keys() - scales.keys():
            raise InputError(f"tensor {brief(name)} belongs to none of the model's layers")


class Forward:
    """Context vectors float32 [n, context, dim] → predictions float32 [n, dim], each from a zero state.

    The vectors are those of the space already or, with `space`, raw ones that it takes in first. `names` are the
    layers' types, the space's included, and `nbytes` is the size of the packed weights.
    """

    def __init__(
        self, plan: Plan, weights: Mapping[str, np.ndarray], space: Space | None = None, threads: int | None = None
    ) -> None:
        """weights: as `pack` gives them. threads: of this model; None: as many as all kernels use.

        Raises InputError for a missing, spare, wrongly shaped or not finite tensor, or one of another dtype.
        """
        plan.check_shapes({name: array.shape for name, array in weights.items()})
        matrices = plan.matrices()
        for name, array in weights.items():
            _check_tensor(name, array, name in matrices, name + SCALE in weights)
        self.plan = plan
        self.threads = threads or 0
        positions, dim = plan.shape
        layers = into_space(space) if space is not None else []
        layers += [layer.native(weights) for layer in plan.layers]
        self.names = [kind for kind, _ in layers]
        self.model = _C.Model(positions, dim, layers)
        self.nbytes: int = self.model.nbytes

    def __call__(self, context: np.ndarray) -> np.ndarray:
        out = np.empty((len(context), self.model.out_dim), np.float32)
        self.model.run(context, out, self.threads)
        return out

    def profile(self, context: np.ndarray, repeats: int) -> np.ndarray:
        """Mean microseconds float64 [len(names), len(_C.PHASES)] of a call, by layer and what it spends them on."""
        out = np.empty((len(context), self.model.out_dim), np.float32)
        nanoseconds = np.zeros((len(self.names), len(_C.PHASES)), np.int64)
        for _ in range(repeats):
            self.model.run(context, out, self.threads, nanoseconds)
        return nanoseconds / (1e3 * repeats)


def into_space(space: Space) -> list[Native]:
    """Layers that do what `space.apply` does, after which the context is what they leave."""
    return [*space.layers(), ("context", {})]


def _check_tensor(name: str, array: np.ndarray, is_matrix: bool, has_scale: bool) -> None:
    allowed = {"float32": False, "uint16": False, "int8": True} if is_matrix else {"float32": False}
    if array.dtype.name not in allowed:
        raise InputError(f"tensor {name} is {array.dtype}, and {' or '.join(allowed)} is wanted")
    if is_matrix and allowed[array.dtype.name] != has_scale:
        raise InputError(f"tensor {name} is {array.dtype} {'with' if has_scale else 'without'} a scale beside it")
    finite = np.isfinite(array) if array.dtype != np.uint16 else (array & np.uint16(0x7F80)) != np.uint16(0x7F80)
    if not finite.all():
        raise InputError(f"tensor {name} holds NaN or an infinite value")
