"""The layers that mix positions, and the table of all layers."""

from __future__ import annotations

import dataclasses

import numpy as np

from fastlvm.predictor.layers import (
    Flatten,
    Gelu,
    L2Norm,
    Last,
    Layer,
    LayerNorm,
    Linear,
    Mixture,
    Native,
    Positions,
    RecencyMixture,
    Residual,
    RmsNorm,
    Shape,
    Weights,
    matrix,
    takes_sequence,
    wants,
)


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

    def vectors(self) -> dict[str, tuple[int, ...]]:
        inner = self.d_inner
        named: dict[str, tuple[int, ...]] = {
            "norm.weight": (self.dim,),
            "conv.weight": (inner, self.d_conv),
            "conv.bias": (inner,),
            "dt_proj.bias": (inner,),
            "A_log": (inner, self.d_state),
            "D": (inner,),
        }
        return {f"{self.prefix}.{name}": shape for name, shape in named.items()}

    def matrices(self) -> dict[str, tuple[int, int]]:
        inner = self.d_inner
        named = {
            "in_proj.weight": (2 * inner, self.dim),
            "x_proj.weight": (self.dt_rank + 2 * self.d_state, inner),
            "dt_proj.weight": (inner, self.dt_rank),
            "out_proj.weight": (self.dim, inner),
        }
        return {f"{self.prefix}.{name}": shape for name, shape in named.items()}

    def after(self, shape: Shape, context: Shape) -> Shape:
        wants(shape.dim, self.dim)
        takes_sequence(shape)
        return shape

    def operations(self, shape: Shape) -> int:
        # A state: Δ·A, its exp, times h, Δ·u·B, its sum with the former, and times C, summed.
        each = 2 * self.d_conv + 7 * self.d_state
        return super().operations(shape) + (shape.positions or 1) * self.d_inner * each

    def native(self, weights: Weights) -> Native:
        at = self.prefix
        return "mamba_block", {
            "norm": (weights[f"{at}.norm.weight"], None, self.eps),
            "in_proj": matrix(weights, f"{at}.in_proj.weight"),
            "conv_weight": weights[f"{at}.conv.weight"],
            "conv_bias": weights[f"{at}.conv.bias"],
            "x_proj": matrix(weights, f"{at}.x_proj.weight"),
            "dt_proj": matrix(weights, f"{at}.dt_proj.weight", f"{at}.dt_proj.bias"),
            "A": _negative_exp(weights[f"{at}.A_log"]),
            "D": weights[f"{at}.D"],
            "out_proj": matrix(weights, f"{at}.out_proj.weight"),
            "d_conv": self.d_conv,
            "d_state": self.d_state,
        }


@dataclasses.dataclass(frozen=True)
class Mamba2Block(Layer):
    """h + block(rms_norm(h)), block being Mamba-2's layer from a zero state.

    norm → in_proj to [z | x B C | dt] → causal convolution of x B C, SiLU → SSD, D skip → rms_norm(y silu(z)) →
    out_proj.
    """

    prefix: str
    dim: int
    n_heads: int
    head_dim: int
    n_groups: int
    d_state: int
    d_conv: int
    eps: float

    @property
    def _channels(self) -> int:
        return self.n_heads * self.head_dim + 2 * self.n_groups * self.d_state

    def vectors(self) -> dict[str, tuple[int, ...]]:
        named: dict[str, tuple[int, ...]] = {
            "norm.weight": (self.dim,),
            "conv.weight": (self._channels, self.d_conv),
            "conv.bias": (self._channels,),
            "dt_bias": (self.n_heads,),
            "A_log": (self.n_heads,),
            "D": (self.n_heads,),
            "gate_norm.weight": (self.n_heads * self.head_dim,),
        }
        return {f"{self.prefix}.{name}": shape for name, shape in named.items()}

    def matrices(self) -> dict[str, tuple[int, int]]:
        inner = self.n_heads * self.head_dim
        return {
            f"{self.prefix}.in_proj.weight": (inner + self._channels + self.n_heads, self.dim),
            f"{self.prefix}.out_proj.weight": (self.dim, inner),
        }

    def after(self, shape: Shape, context: Shape) -> Shape:
        wants(shape.dim, self.dim)
        takes_sequence(shape)
        if self.n_heads % self.n_groups:
            raise ValueError(f"has {self.n_groups} groups, which do not divide its {self.n_heads} heads")
        return shape

    def operations(self, shape: Shape) -> int:
        mixed = 2 * self.d_conv * self._channels + 5 * self.n_heads * self.head_dim * self.d_state
        return super().operations(shape) + (shape.positions or 1) * mixed

    def native(self, weights: Weights) -> Native:
        at = self.prefix
        return "mamba2_block", {
            "norm": (weights[f"{at}.norm.weight"], None, self.eps),
            "gate_norm": (weights[f"{at}.gate_norm.weight"], None, self.eps),
            "in_proj": matrix(weights, f"{at}.in_proj.weight"),
            "conv_weight": weights[f"{at}.conv.weight"],
            "conv_bias": weights[f"{at}.conv.bias"],
            "A": _negative_exp(weights[f"{at}.A_log"]),
            "D": weights[f"{at}.D"],
            "dt_bias": weights[f"{at}.dt_bias"],
            "out_proj": matrix(weights, f"{at}.out_proj.weight"),
            "n_heads": self.n_heads,
            "head_dim": self.head_dim,
            "n_groups": self.n_groups,
            "d_state": self.d_state,
            "d_conv": self.d_conv,
        }


@dataclasses.dataclass(frozen=True)
class Attention(Layer):
    """[q | k | v] → values: causal, every position attends to the `window` newest up to itself."""

    dim: int
    heads: int
    window: int

    def after(self, shape: Shape, context: Shape) -> Shape:
        wants(shape.dim, 3 * self.dim)
        takes_sequence(shape)
        if self.dim % self.heads:
            raise ValueError(f"has {self.heads} heads, which do not divide its {self.dim} features")
        return Shape(shape.positions, self.dim)

    def operations(self, shape: Shape) -> int:
        pairs = sum(min(t + 1, self.window) for t in range(shape.positions or 1))
        return pairs * (4 * self.dim + self.heads)  # scores, values, exps

    def native(self, weights: Weights) -> Native:
        return "attention", {"heads": self.heads, "window": self.window}


@dataclasses.dataclass(frozen=True)
class Gru(Layer):
    """torch.nn.GRU of one layer, from a zero state: what its cells hold at every position."""

    prefix: str
    inputs: int
    hidden: int
    suffix: str = "l0"  # of the tensors' names, as torch numbers layers

    def vectors(self) -> dict[str, tuple[int, ...]]:
        gates = self._gates * self.hidden
        return {f"{self.prefix}.bias_{part}_{self.suffix}": (gates,) for part in ("ih", "hh")}

    def matrices(self) -> dict[str, tuple[int, int]]:
        gates = self._gates * self.hidden
        return {
            f"{self.prefix}.weight_ih_{self.suffix}": (gates, self.inputs),
            f"{self.prefix}.weight_hh_{self.suffix}": (gates, self.hidden),
        }

    def after(self, shape: Shape, context: Shape) -> Shape:
        wants(shape.dim, self.inputs)
        takes_sequence(shape)
        return Shape(shape.positions, self.hidden)

    def native(self, weights: Weights) -> Native:
        def part(name: str) -> tuple:
            return matrix(
                weights, f"{self.prefix}.weight_{name}_{self.suffix}", f"{self.prefix}.bias_{name}_{self.suffix}"
            )

        return self._kind, {"input": part("ih"), "recurrent": part("hh")}

    @property
    def _gates(self) -> int:
        return 3

    @property
    def _kind(self) -> str:
        return "gru"


@dataclasses.dataclass(frozen=True)
class Lstm(Gru):
    """torch.nn.LSTM of one layer, from a zero state: what its cells put out at every position."""

    @property
    def _gates(self) -> int:
        return 4

    @property
    def _kind(self) -> str:
        return "lstm"


@dataclasses.dataclass(frozen=True)
class ContextAttention(Layer):
    """[n, positions, dim] → [mean | attended], [n, 2 dim]: the mean, and Σ softmax(q · kₜ / √inner)ₜ hₜ.

    q = query(mean), kₜ = key(hₜ), both [inner]. The order of the positions does not count.
    """

    prefix: str
    dim: int
    inner: int

    def vectors(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.prefix}.{part}.bias": (self.inner,) for part in ("query", "key")}

    def matrices(self) -> dict[str, tuple[int, int]]:
        return {f"{self.prefix}.{part}.weight": (self.inner, self.dim) for part in ("query", "key")}

    def after(self, shape: Shape, context: Shape) -> Shape:
        wants(shape.dim, self.dim)
        takes_sequence(shape)
        return Shape(None, 2 * self.dim)

    def operations(self, shape: Shape) -> int:
        positions = shape.positions or 1
        once = 2 * self.inner * self.dim  # of a matrix and a vector
        return (positions + 1) * once + positions * (2 * self.inner + 3 * self.dim)

    def native(self, weights: Weights) -> Native:
        return "context_attention", {
            part: matrix(weights, f"{self.prefix}.{part}.weight", f"{self.prefix}.{part}.bias")
            for part in ("query", "key")
        }


LAYERS: dict[str, type[Layer]] = {
    "linear": Linear,
    "rms_norm": RmsNorm,
    "layer_norm": LayerNorm,
    "mamba_block": MambaBlock,
    "mamba2_block": Mamba2Block,
    "attention": Attention,
    "gru": Gru,
    "lstm": Lstm,
    "gelu": Gelu,
    "positions": Positions,
    "context_attention": ContextAttention,
    "residual": Residual,
    "last": Last,
    "flatten": Flatten,
    "recency_mixture": RecencyMixture,
    "mixture": Mixture,
    "l2_norm": L2Norm,
}


def _negative_exp(A_log: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # a damaged weight is for the golden windows to find
        return -np.exp(A_log)
