"""A model's layer list as steps on a GPU: what goes from one to the next is the stream, in float32.

Norms go into the product that follows, GELU, bias and residual into the one before; a Mamba block is four launches.
What is rare is plain torch. Nothing here waits for the device, so that a CUDA graph can hold all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastlvm.data import Space
from fastlvm.errors import InputError
from fastlvm.kernels.triton import causal_conv1d
from fastlvm.kernels.triton import layers as kernels
from fastlvm.predictor import blocks, layers

if TYPE_CHECKING:
    from fastlvm.predictor.forward import Plan

SPLITS = 4  # of the inputs of a product with few rows and too few outputs to fill a GPU
MOST_ROWS = 256  # vectors from which on cuBLAS multiplies
FULL = 6e4  # the greatest |A| that float16 holds well
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Step = Callable[[Tensor, Tensor], Tensor]  # the stream [n, positions, dim] or [n, dim], the context [n, positions, dim]


class Weights:
    """The model's tensors, float32 in main memory, as they go to the device: matrices in `dtype`, the rest as it is."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.nbytes = 0
        self._tensors = tensors

    def matrix(self, name: str) -> Tensor:
        return self.place(self._tensors[name], self.dtype)

    def vector(self, name: str) -> Tensor:
        return self.place(self._tensors[name])

    def place(self, tensor: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        placed = (
            (tensor if isinstance(tensor, Tensor) else torch.from_numpy(np.array(tensor)))
            .detach()
            .to(self.device, dtype, copy=True)
            .contiguous()
        )
        self.nbytes += placed.numel() * placed.element_size()
        return placed


class Norm(NamedTuple):
    """An RMSNorm before a product."""

    weight: Tensor
    eps: float


class Program:
    """Contexts float32 [n, positions, dim] on the device → predictions float32 [n, dim], of length 1.

    The contexts are raw: a length far from 1 is divided out, and a vector that has none makes a prediction of NaN. They
    may lie in pinned memory of the host.
    """

    def __init__(
        self, plan: Plan, tensors: Mapping[str, Tensor], space: Space, device: torch.device, dtype: torch.dtype
    ) -> None:
        """tensors: float32, by the plan's names. Raises InputError for a layer that has no form here."""
        weights = Weights(tensors, device, dtype)
        exact = Weights({}, device, torch.float32)  # the space's matrices stay float32
        self._space = _space(space, exact)
        entering = ("unit",) if self._space else ("unit", "l2")
        compiler = _Compiler(weights, plan.shape.positions or 1)
        rest = list(plan.layers)
        first = rest.pop(0) if not self._space and type(rest[0]) is layers.RmsNorm else None
        norm = None if first is None else compiler.norm(first)
        scale = {} if norm is None else {"kind": "rms", "weight": norm.weight, "eps": norm.eps}
        self._enter = lambda raw: kernels.norms(raw, entering, **scale, device=device)
        self._steps = compiler.steps(rest)
        self.nbytes = weights.nbytes + exact.nbytes

    def __call__(self, raw: Tensor) -> Tensor:
        shape = raw.shape
        context, h = self._enter(raw.reshape(-1, shape[-1]))
        for move in self._space:
            context = h = move(context)
        context, h = context.view(shape), h.view(shape)
        for step in self._steps:
            h = step(h, context)
        return h


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] · b [k, m] of one dtype, summed and left in float32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """x [..., inputs] → [..., outputs], float32, by whom is quicker."""
    flat = x.flatten(0, -2)
    other = None if residual is None else residual.flatten(0, -2)
    if len(flat) <= MOST_ROWS:
        scale = {} if norm is None else {"norm": norm.weight, "eps": norm.eps}
        out = kernels.linear(flat, weight, bias, **scale, gelu=gelu, residual=other)
    else:
        if norm is not None:
            _, flat = kernels.norms(flat, (), "rms", norm.weight, None, norm.eps)
        out = product(flat.to(weight.dtype), weight.t())
        if bias is not None:
            out += bias
        if gelu:
            out = F.gelu(out)
        if other is not None:
            out += other
    return out.view(*x.shape[:-1], -1)


def _space(space: Space, weights: Weights) -> list[Callable[[Tensor], Tensor]]:
    """What `space.apply` does to unit vectors [rows, dim]; nothing where it only normalises."""
    listed = space.layers()
    if [kind for kind, _ in listed] == ["l2_norm"]:
        return []

    def read(kind: str, fields: dict[str, Any], residual: bool = False) -> Callable[[Tensor], Tensor]:
        if kind == "linear":
            matrix, _, bias = fields["weight"]
            weight, offset = weights.place(matrix), weights.place(bias)
            return lambda x: linear(x, weight, offset)
        if kind == "l2_norm":
            return lambda x: kernels.norms(x, ("l2",))[0]
        if kind == "gelu":
            return F.gelu
        assert kind == "residual"
        inner = [read(*layer) for layer in fields["layers"]]

        def branch(x: Tensor) -> Tensor:
            h = x
            for move in inner:
                h = move(h)
            return x + h

        return branch

    return [read(*layer) for layer in listed]


class _Compiler:
    """Turns layers into steps. positions: of a context."""

    def __init__(self, weights: Weights, positions: int) -> None:
        self.weights, self.positions = weights, positions

    def steps(self, listed: Sequence[layers.Layer]) -> list[Step]:
        found: list[Step] = []
        rest = list(listed)
        while rest:
            step, used = self._next(rest)
            found.append(step)
            del rest[:used]
        return found

    def norm(self, layer: Any) -> Norm:
        return Norm(self.weights.vector(f"{layer.prefix}.weight"), layer.eps)

    def _next(self, rest: list[layers.Layer]) -> tuple[Step, int]:
        """The step of the first layers of a list, and how many they are."""
        kinds = [type(layer) for layer in rest[:3]]
        first: Any = rest[0]
        if kinds[0] is layers.Linear or kinds[:2] == [layers.RmsNorm, layers.Linear]:
            return self._linear(rest)
        if kinds[0] is blocks.MambaBlock:
            last = kinds[1:2] == [layers.Last]
            return self._mamba(first, last), 1 + last
        if kinds[0] in (layers.RecencyMixture, layers.Mixture):
            l2 = kinds[1:2] == [layers.L2Norm]
            return self._mixture(first, l2), 1 + l2
        build = _BUILD.get(kinds[0])
        if build is None:
            name = layers.write_layer(first)["type"]
            raise InputError(f'a {name} layer has no form on a GPU: load the artifact with device="cpu"')
        return build(self, first), 1

    def _linear(self, rest: list[layers.Layer], branch: bool = False) -> tuple[Step, int]:
        """norm?, linear, gelu? as one step; with `branch` the result is added to what the step's second argument is."""
        first: Any = rest[0]
        norm = self.norm(first) if type(first) is layers.RmsNorm else None
        at = 1 if norm is None else 2
        layer: Any = rest[at - 1]
        weight = self.weights.matrix(f"{layer.prefix}.weight")
        bias = self.weights.vector(f"{layer.prefix}.bias") if layer.bias else None
        gelu = len(rest) > at and type(rest[at]) is layers.Gelu
        if branch:
            return lambda h, x: linear(h, weight, bias, norm, gelu, residual=x), at + gelu
        return lambda h, _: linear(h, weight, bias, norm, gelu), at + gelu

    def _mamba(self, layer: blocks.MambaBlock, last: bool) -> Step:
        """Four launches; with `last` only each context's newest token is put out, [n, dim]."""
        weights, at = self.weights, layer.prefix
        norm = self.norm(blocks_norm(layer))
        conv = kernels.Conv(weights.vector(f"{at}.conv.weight"), weights.vector(f"{at}.conv.bias"))
        into, low, dt, out = (weights.matrix(f"{at}.{name}_proj.weight") for name in ("in", "x", "dt", "out"))
        dt_bias, D = weights.vector(f"{at}.dt_proj.bias"), weights.vector(f"{at}.D")
        A = -weights.vector(f"{at}.A_log").exp() / math.log(2)
        if weights.dtype != torch.float32 and float(A.abs().max()) <= FULL:
            A = A.half()  # as the native predictor holds it beside packed matrices
        positions = self.positions

        def step(h: Tensor, _: Tensor) -> Tensor:
            xz = linear(h, into, norm=norm).flatten(0, -2)
            y = kernels.scan(xz, _convolved(xz, conv, low, positions), conv, dt, dt_bias, A, D, positions, last)
            if last:
                return linear(y, out, residual=h[:, -1])
            return linear(y.view(*h.shape[:-1], -1), out, residual=h)

        return step

    def _mamba2(self, layer: blocks.Mamba2Block) -> Step:
        weights, at = self.weights, layer.prefix
        norm, gate = self.norm(blocks_norm(layer)), Norm(weights.vector(f"{at}.gate_norm.weight"), layer.eps)
        into, out = (weights.matrix(f"{at}.{name}_proj.weight") for name in ("in", "out"))
        conv, conv_bias = weights.vector(f"{at}.conv.weight"), weights.vector(f"{at}.conv.bias")
        dt_bias, D = weights.vector(f"{at}.dt_bias"), weights.vector(f"{at}.D")
        A = -weights.vector(f"{at}.A_log").exp()
        inner, each = layer.n_heads * layer.head_dim, layer.n_heads // layer.n_groups
        shared, width = layer.n_groups * layer.d_state, layer.d_conv
        positions = torch.arange(self.positions, device=weights.device)
        later = positions[:, None] < positions  # [t, s]

        def step(h: Tensor, _: Tensor) -> Tensor:
            z, x_b_c, dt = linear(h, into, norm=norm).split([inner, inner + 2 * shared, layer.n_heads], dim=-1)
            padded = F.pad(x_b_c, (0, 0, width - 1, 0))
            mixed = sum(padded[:, tap : tap + h.shape[1]] * conv[:, tap] for tap in range(width))
            x, B, C = F.silu(mixed + conv_bias).split([inner, shared, shared], dim=-1)
            x = x.unflatten(-1, (layer.n_heads, layer.head_dim))  # [n, L, heads, head_dim]
            B, C = (part.unflatten(-1, (layer.n_groups, layer.d_state)) for part in (B, C))
            dt = F.softplus(dt + dt_bias)  # [n, L, heads]
            sums = (dt * A).cumsum(1).transpose(1, 2)  # [n, heads, L]
            decay = (sums[..., None] - sums[..., None, :]).masked_fill(later, -math.inf).exp()  # [n, heads, t, s]
            pairs = torch.einsum("ntgm,nsgm->ngts", C, B)[:, :, None].expand(-1, -1, each, -1, -1).flatten(1, 2)
            y = torch.einsum("nhts,nshp->nthp", pairs * decay, x * dt[..., None]) + D[:, None] * x
            return linear(y.flatten(-2) * F.silu(z), out, norm=gate, residual=h)

        return step

    def _mixture(self, layer: Any, l2: bool) -> Step:
        shares = self.weights.vector(f"{layer.prefix}.logits").softmax(0)
        alone = isinstance(layer, layers.Mixture)
        return lambda h, context: kernels.mixed(context, shares, None if alone else h, l2)

    def _residual(self, layer: layers.Residual) -> Step:
        """h + layers(h), the last product adding h itself where it ends the branch."""
        inner = list(layer.layers)
        tail = 1 + (len(inner) > 1 and type(inner[-2]) is layers.RmsNorm)
        if type(inner[-1]) is not layers.Linear:
            steps = self.steps(inner)
            return lambda h, context: h + _through(steps, h, context)
        steps = self.steps(inner[:-tail])
        end, _ = self._linear(inner[-tail:], branch=True)
        return lambda h, context: end(_through(steps, h, context), h)

    def _rms_norm(self, layer: layers.RmsNorm) -> Step:
        norm = self.norm(layer)
        return lambda h, _: _rows(h, "rms", norm.weight, None, norm.eps)

    def _layer_norm(self, layer: layers.LayerNorm) -> Step:
        norm, bias = self.norm(layer), self.weights.vector(f"{layer.prefix}.bias")
        return lambda h, _: _rows(h, "layer", norm.weight, bias, norm.eps)

    def _l2_norm(self, layer: layers.L2Norm) -> Step:
        return lambda h, _: _rows(h, "l2", None, None, 0.0)

    def _positions(self, layer: layers.Positions) -> Step:
        table = self.weights.vector(f"{layer.prefix}.weight")
        return lambda h, _: h + table

    def _attention(self, layer: blocks.Attention) -> Step:
        at = torch.arange(self.positions, device=self.weights.device)
        ago = at[:, None] - at
        seen = (ago >= 0) & (ago < layer.window)

        def step(h: Tensor, _: Tensor) -> Tensor:
            q, k, v = h.unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)  # [n, heads, L, dim / heads]
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
            return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)

        return step

    def _cells(self, layer: blocks.Gru) -> Step:
        def part(name: str) -> tuple[Tensor, Tensor]:
            named = f"{layer.prefix}.{{}}_{name}_{layer.suffix}"
            return self.weights.matrix(named.format("weight")), self.weights.vector(named.format("bias"))

        (into, into_bias), (again, again_bias) = part("ih"), part("hh")
        lstm = isinstance(layer, blocks.Lstm)

        def step(h: Tensor, _: Tensor) -> Tensor:
            arriving = linear(h, into, into_bias)  # [n, L, gates · hidden]
            hidden = cell = h.new_zeros(len(h), layer.hidden)
            found = []
            for t in range(h.shape[1]):
                x, own = arriving[:, t], linear(hidden, again, again_bias)
                if lstm:
                    i, f, g, o = (x + own).chunk(4, dim=-1)
                    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                    hidden = o.sigmoid() * cell.tanh()
                else:
                    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, dim=-1), own.chunk(3, dim=-1)
                    new = (xn + (xr + hr).sigmoid() * hn).tanh()
                    hidden = new + (xz + hz).sigmoid() * (hidden - new)
                found.append(hidden)
            return torch.stack(found, dim=1)

        return step

    def _context_attention(self, layer: blocks.ContextAttention) -> Step:
        (query, query_bias), (key, key_bias) = (
            (self.weights.matrix(f"{layer.prefix}.{part}.weight"), self.weights.vector(f"{layer.prefix}.{part}.bias"))
            for part in ("query", "key")
        )

        def step(h: Tensor, _: Tensor) -> Tensor:
            mean = h.mean(dim=1)
            asked = linear(mean, query, query_bias)
            scores = (linear(h, key, key_bias) * asked[:, None]).sum(-1) / math.sqrt(layer.inner)  # [n, L]
            return torch.cat([mean, (h * scores.softmax(-1)[..., None]).sum(1)], dim=-1)

        return step


_BUILD: dict[type[layers.Layer], Callable[[_Compiler, Any], Step]] = {
    layers.RmsNorm: _Compiler._rms_norm,
    layers.LayerNorm: _Compiler._layer_norm,
    layers.L2Norm: _Compiler._l2_norm,
    layers.Gelu: lambda _, layer: lambda h, context: F.gelu(h),
    layers.Positions: _Compiler._positions,
    layers.Last: lambda _, layer: lambda h, context: h[:, -1],
    layers.Flatten: lambda _, layer: lambda h, context: h.flip(1).flatten(1),
    layers.Residual: _Compiler._residual,
    blocks.Mamba2Block: _Compiler._mamba2,
    blocks.Attention: _Compiler._attention,
    blocks.Gru: _Compiler._cells,
    blocks.Lstm: _Compiler._cells,
    blocks.ContextAttention: _Compiler._context_attention,
}


def _convolved(xz: Tensor, conv: kernels.Conv, low: Tensor, positions: int) -> Tensor:
    """low · silu(conv(x)) of [x | z] [rows, 2 inner]: parts float32 [splits, rows, outputs], to be summed."""
    rows, inner = len(xz), low.shape[1]
    if rows <= MOST_ROWS:
        splits = SPLITS if rows <= 64 else 1
        return kernels.linear(xz, low, conv=conv, positions=positions, splits=splits).view(splits, rows, -1)
    x = xz.view(-1, positions, 2 * inner)[..., :inner].mT  # [n, inner, L]
    u = torch.empty((len(x), positions, inner), dtype=low.dtype, device=low.device)
    state = torch.empty((*x.shape[:2], conv.weight.shape[1] - 1), device=low.device)
    causal_conv1d.conv(x, conv.weight, conv.bias, True, None, u.mT, state)
    return product(u.flatten(0, 1), low.t())[None]


def blocks_norm(layer: Any) -> layers.RmsNorm:
    """The norm that a block begins with."""
    return layers.RmsNorm(f"{layer.prefix}.norm", layer.dim, layer.eps)


def _through(steps: Sequence[Step], h: Tensor, context: Tensor) -> Tensor:
    for step in steps:
        h = step(h, context)
    return h


def _rows(h: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    flat = h.flatten(0, -2)
    return kernels.norms(flat, (), kind, weight, bias, eps)[1].view(h.shape)
