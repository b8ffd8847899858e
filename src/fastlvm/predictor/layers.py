"""The layer types an artifact may list: their fields, the tensors they read, the shapes they pass on.

A model is a list of these. The stream `h` starts as the context [n, context, dim], goes through the layers in turn and
has to end as [n, dim]; csrc/predictor computes it. A new layer type is one class, its line in `LAYERS`, and its forward
in csrc/predictor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastlvm.errors import InputError, shown

Weights = Mapping[str, np.ndarray]
Native = tuple[str, dict[str, Any]]  # a layer as _C.Model takes it
SCALE = "_scale"  # after a matrix's name: of int8 weights, what a step of 1 is worth, float32 [outputs]


class Shape(NamedTuple):
    """What flows between two layers: [n, positions, dim], or [n, dim] where positions is None."""

    positions: int | None
    dim: int


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer's fields as config.json holds them: whole numbers ≥ 1, positive numbers, flags and tensor prefixes."""

    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight this layer reads as float32."""
        return {}

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name and shape [outputs, inputs] of every weight that may be packed in a lower precision."""
        return {}

    def after(self, shape: Shape, context: Shape) -> Shape:
        """Shape of the stream after this layer; ValueError where the layer cannot take `shape`."""
        return shape

    def operations(self, shape: Shape) -> int:
        """Multiplications, additions and exps of one context that arrives as `shape`: of what has matrices or mixes."""
        return (shape.positions or 1) * sum(2 * outputs * inputs for outputs, inputs in self.matrices().values())

    def native(self, weights: Weights) -> Native:
        """The layer with its weights, for _C.Model."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Linear(Layer):
    """h · weightᵀ + bias over the last dimension."""

    prefix: str
    inputs: int
    outputs: int
    bias: bool = True

    def vectors(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.prefix}.bias": (self.outputs,)} if self.bias else {}

    def matrices(self) -> dict[str, tuple[int, int]]:
        return {f"{self.prefix}.weight": (self.outputs, self.inputs)}

    def after(self, shape: Shape, context: Shape) -> Shape:
        wants(shape.dim, self.inputs)
        return Shape(shape.positions, self.outputs)

    def native(self, weights: Weights) -> Native:
        bias = f"{self.prefix}.bias" if self.bias else None
        return "linear", {"weight": matrix(weights, f"{self.prefix}.weight", bias)}


@dataclasses.dataclass(frozen=True)
class RmsNorm(Layer):
    """h / sqrt(mean(h²) + eps) · weight over the last dimension."""

    prefix: str
    dim: int
    eps: float

    def vectors(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.prefix}.weight": (self.dim,)}

    def after(self, shape: Shape, context: Shape) -> Shape:
        wants(shape.dim, self.dim)
        return shape

    def native(self, weights: Weights) -> Native:
        return "norm", {"norm": (weights[f"{self.prefix}.weight"], None, self.eps)}


@dataclasses.dataclass(frozen=True)
class LayerNorm(RmsNorm):
    """(h - mean(h)) / sqrt(var(h) + eps) · weight + bias over the last dimension."""

    def vectors(self) -> dict[str, tuple[int, ...]]:
        return {**super().vectors(), f"{self.prefix}.bias": (self.dim,)}

    def native(self, weights: Weights) -> Native:
        return "norm", {"norm": (weights[f"{self.prefix}.weight"], weights[f"{self.prefix}.bias"], self.eps)}


@dataclasses.dataclass(frozen=True)
class Gelu(Layer):
    """h Φ(h), Φ being the standard normal distribution."""

    def native(self, weights: Weights) -> Native:
        return "gelu", {}


@dataclasses.dataclass(frozen=True)
class Positions(Layer):
    """h + weightₜ at position t, oldest first."""

    prefix: str
    context: int
    dim: int

    def vectors(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.prefix}.weight": (self.context, self.dim)}

    def after(self, shape: Shape, context: Shape) -> Shape:
        wants(shape.dim, self.dim)
        takes_sequence(shape)
        if self.context != shape.positions:
            raise ValueError(f"has {self.context} positions, and {shape.positions} arrive")
        return shape

    def native(self, weights: Weights) -> Native:
        return "positions", {"context": self.context, "dim": self.dim, "table": weights[f"{self.prefix}.weight"]}


@dataclasses.dataclass(frozen=True)
class Last(Layer):
    """The newest position: [n, positions, dim] → [n, dim]."""

    def after(self, shape: Shape, context: Shape) -> Shape:
        takes_sequence(shape)
        return Shape(None, shape.dim)

    def native(self, weights: Weights) -> Native:
        return "last", {}


@dataclasses.dataclass(frozen=True)
class Flatten(Layer):
    """[n, positions, dim] → [n, context · dim]: all positions in a row, newest first; zeros where some are missing."""

    context: int

    def after(self, shape: Shape, context: Shape) -> Shape:
        takes_sequence(shape)
        if self.context != shape.positions:
            raise ValueError(f"has {self.context} positions, and {shape.positions} arrive")
        return Shape(None, self.context * shape.dim)

    def native(self, weights: Weights) -> Native:
        return "flatten", {}


@dataclasses.dataclass(frozen=True)
class RecencyMixture(Layer):
    """h + Σ softmax(logits)ₜ · contextₜ, oldest position first: the stream becomes a correction of that mixture."""

    prefix: str
    context: int

    def vectors(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.prefix}.logits": (self.context,)}

    def after(self, shape: Shape, context: Shape) -> Shape:
        if shape != Shape(None, context.dim) or self.context != context.positions:
            raise ValueError(f"adds {self.context} vectors of {context.dim} to one such vector: the shapes differ")
        return shape

    def native(self, weights: Weights) -> Native:
        return "recency_mixture", {"logits": weights[f"{self.prefix}.logits"]}


@dataclasses.dataclass(frozen=True)
class Mixture(RecencyMixture):
    """Σ softmax(logits)ₜ · contextₜ alone, whatever arrives."""

    def after(self, shape: Shape, context: Shape) -> Shape:
        takes_sequence(shape)
        return super().after(Shape(None, shape.dim), context)

    def native(self, weights: Weights) -> Native:
        return "mixture", super().native(weights)[1]


@dataclasses.dataclass(frozen=True)
class L2Norm(Layer):
    """h / |h| over the last dimension."""

    def native(self, weights: Weights) -> Native:
        return "l2_norm", {}


@dataclasses.dataclass(frozen=True)
class Residual(Layer):
    """h + layers(h)."""

    layers: tuple[Layer, ...]

    def vectors(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for layer in self.layers for name, shape in layer.vectors().items()}

    def matrices(self) -> dict[str, tuple[int, int]]:
        return {name: shape for layer in self.layers for name, shape in layer.matrices().items()}

    def after(self, shape: Shape, context: Shape) -> Shape:
        inner = shape
        for layer in self.layers:
            inner = layer.after(inner, context)
        if inner != shape:
            raise ValueError(f"adds {list(inner)} to {list(shape)}")
        return shape

    def operations(self, shape: Shape) -> int:
        total = 0
        for layer in self.layers:
            total += layer.operations(shape)
            shape = layer.after(shape, shape)
        return total

    def native(self, weights: Weights) -> Native:
        return "residual", {"layers": [layer.native(weights) for layer in self.layers]}


def matrix(weights: Weights, name: str, bias: str | None = None) -> tuple[Any, Any, Any]:
    """(weight, scale or None, bias or None), as _C.Model takes a matrix."""
    return weights[name], weights.get(name + SCALE), None if bias is None else weights[bias]


def read_layer(entry: Any, where: str, depth: int = 0) -> Layer:
    """The layer of one entry of the list; InputError naming `where` for an unknown type or a wrong field."""
    from fastlvm.predictor.blocks import LAYERS

    kind = entry.get("type") if isinstance(entry, dict) else None
    if not isinstance(kind, str) or kind not in LAYERS:
        raise InputError(f"{where} has type {shown(kind)}, and this version knows {', '.join(LAYERS)}: update fastlvm")
    cls = LAYERS[kind]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {name: value for name, value in entry.items() if name != "type"}
    for name in values.keys() - fields.keys():
        raise InputError(
            f"{where} ({kind}) has a field {shown(name)}, and its fields are {', '.join(fields) or 'none'}"
        )
    for name, field in fields.items():
        if name not in values and field.default is not dataclasses.MISSING:
            continue
        wanted, holds = _FIELD[str(field.type)]
        if not holds(values.get(name)):
            raise InputError(f"{where} ({kind}) has {name} = {shown(values.get(name))}, and {wanted} is wanted")
    if cls is Residual:
        if depth:
            raise InputError(f"{where} is a residual branch within one: write them one after the other")
        inner = (read_layer(part, f"{where}.{i}", depth + 1) for i, part in enumerate(values["layers"]))
        return Residual(tuple(inner))
    return cls(**values)


def write_layer(layer: Layer) -> dict[str, Any]:
    """The list entry that `read_layer` turns into `layer` again."""
    from fastlvm.predictor.blocks import LAYERS

    kind = next(name for name, cls in LAYERS.items() if cls is type(layer))
    if isinstance(layer, Residual):
        return {"type": kind, "layers": [write_layer(part) for part in layer.layers]}
    return {"type": kind, **dataclasses.asdict(layer)}


MOST = 1 << 20  # of a whole number
LONGEST = 100  # characters of a name

_FIELD: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": (
        f"a whole number from 1 to {MOST}",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= MOST,
    ),
    "float": ("a number above 0", lambda v: isinstance(v, float) and 0 < v < math.inf),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "str": ("a name", lambda v: isinstance(v, str) and v.isprintable() and 0 < len(v) <= LONGEST),
    "tuple[Layer, ...]": ("a list of at least one layer", lambda v: isinstance(v, list) and len(v) > 0),
}


def wants(got: int, wanted: int) -> None:
    if got != wanted:
        raise ValueError(f"takes {wanted} features, and {got} arrive")


def takes_sequence(shape: Shape) -> None:
    if shape.positions is None:
        raise ValueError("takes a sequence, and one vector arrives")
