"""The layer types an artifact may list: their fields, the tensors they read, the shapes they pass on, their forward.

A model is a list of these. The stream `h` starts as the context [n, context, dim], goes through the layers in turn and
has to end as [n, dim]. A new layer type is one class here and its line in `LAYERS`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastlvm import _C
from fastlvm.data import Space
from fastlvm.errors import InputError
from fastlvm.ops import causal_conv1d, ssm_scan

Weights = Mapping[str, np.ndarray]
Step = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (h, context) -> h; neither input is written to
TINY = 1e-12


class Shape(NamedTuple):
    """What flows between two layers: [n, positions, dim], or [n, dim] where positions is None."""

    positions: int | None
    dim: int


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer's fields as config.json holds them: whole numbers ≥ 1, positive numbers, flags and tensor prefixes."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight this layer reads."""
        return {}

    def after(self, shape: Shape, context: Shape) -> Shape:
        """Shape of the stream after this layer; ValueError where the layer cannot take `shape`."""
        return shape

    def step(self, weights: Weights) -> Step:
        """The layer's forward, its weights prepared once."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Linear(Layer):
    """h · weightᵀ + bias over the last dimension."""

    prefix: str
    inputs: int
    outputs: int
    bias: bool = True

    def tensors(self) -> dict[str, tuple[int, ...]]:
        named: dict[str, tuple[int, ...]] = {f"{self.prefix}.weight": (self.outputs, self.inputs)}
        if self.bias:
            named[f"{self.prefix}.bias"] = (self.outputs,)
        return named

    def after(self, shape: Shape, context: Shape) -> Shape:
        _wants(shape.dim, self.inputs)
        return Shape(shape.positions, self.outputs)

    def step(self, weights: Weights) -> Step:
        weight = weights[f"{self.prefix}.weight"]
        bias = weights[f"{self.prefix}.bias"] if self.bias else None

        def run(h: np.ndarray, context: np.ndarray) -> np.ndarray:
            out = _linear(h, weight)
            if bias is not None:
                out += bias
            return out

        return run


@dataclasses.dataclass(frozen=True)
class RmsNorm(Layer):
    """h / sqrt(mean(h²) + eps) · weight over the last dimension."""

    prefix: str
    dim: int
    eps: float

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.prefix}.weight": (self.dim,)}

    def after(self, shape: Shape, context: Shape) -> Shape:
        _wants(shape.dim, self.dim)
        return shape

    def step(self, weights: Weights) -> Step:
        weight, eps = weights[f"{self.prefix}.weight"], np.float32(self.eps)
        return lambda h, context: _rms_norm(h, weight, eps)


@dataclasses.dataclass(frozen=True)
class MambaBlock(Layer):
    """h + block(rms_norm(h)), block being Mamba's selective state-space layer from a zero state.

    norm → in_proj → causal convolution, SiLU → (δ, B, C) → scan, D skip, SiLU gate → out_proj.
    """

    prefix: str
    dim: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    eps: float

    def tensors(self) -> dict[str, tuple[int, ...]]:
        inner = self.d_inner
        named: dict[str, tuple[int, ...]] = {
            "norm.weight": (self.dim,),
            "in_proj.weight": (2 * inner, self.dim),
            "conv.weight": (inner, self.d_conv),
            "conv.bias": (inner,),
            "x_proj.weight": (self.dt_rank + 2 * self.d_state, inner),
            "dt_proj.weight": (inner, self.dt_rank),
            "dt_proj.bias": (inner,),
            "A_log": (inner, self.d_state),
            "D": (inner,),
            "out_proj.weight": (self.dim, inner),
        }
        return {f"{self.prefix}.{name}": shape for name, shape in named.items()}

    def after(self, shape: Shape, context: Shape) -> Shape:
        _wants(shape.dim, self.dim)
        if shape.positions is None:
            raise ValueError("takes a sequence, and one vector arrives")
        return shape

    def step(self, weights: Weights) -> Step:
        inner, rank, state, eps = self.d_inner, self.dt_rank, self.d_state, np.float32(self.eps)
        w = {name[len(self.prefix) + 1 :]: weights[name] for name in self.tensors()}
        with np.errstate(over="ignore"):  # a damaged weight is for the golden windows to find
            A = -np.exp(w["A_log"])

        def run(h: np.ndarray, context: np.ndarray) -> np.ndarray:
            xz = _linear(_rms_norm(h, w["norm.weight"], eps), w["in_proj.weight"])  # [n, L, 2·d_inner]
            x = _swap(xz[..., :inner])  # [n, d_inner, L], a view, as all below
            x = causal_conv1d(x, w["conv.weight"], w["conv.bias"], activation="silu", backend="cpu")
            projected = _linear(_swap(x), w["x_proj.weight"])  # [n, L, dt_rank | d_state | d_state]
            delta = _linear(projected[..., :rank], w["dt_proj.weight"])  # its bias enters inside the scan
            y = ssm_scan(
                x,
                _swap(delta),
                A,
                _swap(projected[..., rank : rank + state]),
                _swap(projected[..., rank + state :]),
                w["D"],
                _swap(xz[..., inner:]),
                w["dt_proj.bias"],
                delta_softplus=True,
                backend="cpu",
            )
            return h + _linear(_swap(y), w["out_proj.weight"])

        return run


@dataclasses.dataclass(frozen=True)
class Last(Layer):
    """The newest position: [n, positions, dim] → [n, dim]."""

    def after(self, shape: Shape, context: Shape) -> Shape:
        if shape.positions is None:
            raise ValueError("takes a sequence, and one vector arrives")
        return Shape(None, shape.dim)

    def step(self, weights: Weights) -> Step:
        return lambda h, context: h[:, -1]


@dataclasses.dataclass(frozen=True)
class RecencyMixture(Layer):
    """h + Σ softmax(logits)ₜ · contextₜ, oldest position first: the stream becomes a correction of that mixture."""

    prefix: str
    context: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.prefix}.logits": (self.context,)}

    def after(self, shape: Shape, context: Shape) -> Shape:
        if shape != Shape(None, context.dim) or self.context != context.positions:
            raise ValueError(f"adds {self.context} vectors of {context.dim} to one such vector: the shapes differ")
        return shape

    def step(self, weights: Weights) -> Step:
        logits = weights[f"{self.prefix}.logits"]
        mix = np.exp(logits - logits.max())
        mix /= mix.sum()
        return lambda h, context: h + mix @ context


@dataclasses.dataclass(frozen=True)
class L2Norm(Layer):
    """h / |h| over the last dimension."""

    def step(self, weights: Weights) -> Step:
        return lambda h, context: l2_norm(h)


LAYERS: dict[str, type[Layer]] = {
    "linear": Linear,
    "rms_norm": RmsNorm,
    "mamba_block": MambaBlock,
    "last": Last,
    "recency_mixture": RecencyMixture,
    "l2_norm": L2Norm,
}


def read_layer(entry: Any, where: str) -> Layer:
    """The layer of one entry of the list; InputError naming `where` for an unknown type or a wrong field."""
    kind = entry.get("type") if isinstance(entry, dict) else None
    if not isinstance(kind, str) or kind not in LAYERS:
        raise InputError(f"{where} has type {kind!r}, and this version knows {', '.join(LAYERS)}: update fastlvm")
    cls = LAYERS[kind]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {name: value for name, value in entry.items() if name != "type"}
    for name in values.keys() - fields.keys():
        raise InputError(f"{where} ({kind}) has a field {name!r}, and its fields are {', '.join(fields) or 'none'}")
    for name, field in fields.items():
        if name not in values and field.default is not dataclasses.MISSING:
            continue
        wanted, holds = _FIELD[str(field.type)]
        if not holds(values.get(name)):
            raise InputError(f"{where} ({kind}) has {name} = {values.get(name)!r}, and {wanted} is wanted")
    return cls(**values)


def write_layer(layer: Layer) -> dict[str, Any]:
    """The list entry that `read_layer` turns into `layer` again."""
    kind = next(name for name, cls in LAYERS.items() if cls is type(layer))
    return {"type": kind, **dataclasses.asdict(layer)}


def l2_norm(v: np.ndarray) -> np.ndarray:
    """v / |v| over the last dimension, as torch's normalize does it."""
    return v / np.maximum(np.sqrt(np.einsum("...d,...d->...", v, v))[..., None], np.float32(TINY))


_FIELD: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number of at least 1", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1),
    "float": ("a number above 0", lambda v: isinstance(v, float) and 0 < v < math.inf),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "str": ("a name", lambda v: isinstance(v, str) and v != ""),
}


def _wants(got: int, wanted: int) -> None:
    if got != wanted:
        raise ValueError(f"takes {wanted} features, and {got} arrive")


def _swap(x: np.ndarray) -> np.ndarray:
    """[n, L, D] ↔ [n, D, L], a view."""
    return x.transpose(0, 2, 1)


def _linear(h: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[..., inputs] → [..., outputs]. Not numpy's product: its BLAS keeps threads spinning where the kernels' run."""
    rows = np.ascontiguousarray(h.reshape(-1, h.shape[-1]), dtype=np.float32)
    out = np.empty((len(rows), len(weight)), np.float32)
    _C.linear(rows, weight, out)
    return out.reshape(*h.shape[:-1], len(weight))


def into_space(space: Space) -> Callable[[np.ndarray], np.ndarray]:
    """`space.apply` for float32 [..., dim], without numpy's matrix product."""
    if space.id == Space.identity(space.dim).id:
        return space.apply
    weight = np.ascontiguousarray(space.matrix.T)
    return lambda v: l2_norm(_linear(v - space.mean, weight))


def _rms_norm(h: np.ndarray, weight: np.ndarray, eps: np.float32) -> np.ndarray:
    mean = np.einsum("...d,...d->...", h, h)[..., None] / np.float32(h.shape[-1])
    return h / np.sqrt(mean + eps) * weight
