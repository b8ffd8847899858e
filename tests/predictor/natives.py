"""Layer lists with random weights, the same in float64 PyTorch, and every way this machine can multiply matrices."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import fastlvm
from fastlvm import _C
from fastlvm.predictor import blocks, layers
from fastlvm.predictor.forward import Forward, Plan
from fastlvm.predictor.layers import SCALE
from fastlvm.predictor.pack import pack


class Products(NamedTuple):
    isa: str
    level: int

    def __str__(self):
        return f"{self.isa}-extended-{self.level}" if self.level else self.isa


@contextlib.contextmanager
def pinned(products):
    """What each precision is multiplied with, by name."""
    before = _C.isa()
    try:
        _C.set_isa(products.isa)
        _C.set_extension_level(products.level)
        yield _C.products()
    finally:
        _C.set_isa(before)
        _C.set_extension_level(_C.EXTENSION_LEVELS)


def _every_products():
    """Every instruction set, and again with its extensions, level by level, as far as it has any."""
    found = []
    for isa in _C.isas():
        before = None
        for level in range(_C.EXTENSION_LEVELS + 1):
            with pinned(Products(isa, level)) as names:
                if names != before:
                    found.append(Products(isa, level))
                before = names
    return found


PRODUCTS = _every_products()
ROUNDING = ("avx512_bf16", "avx512_amx")  # products of bfloat16 that round the activations as well


@dataclasses.dataclass(frozen=True)
class Case:
    """Layers over contexts [n, context, dim]."""

    entries: list
    context: int = 5
    dim: int = 17

    @property
    def plan(self):
        return Plan(self.entries, self.context, self.dim)


def random_contexts(n, case, seed=0):
    return np.random.default_rng((seed, n)).standard_normal((n, case.context, case.dim), np.float32)


def random_weights(plan, seed=0):
    """Weights by name, none of them where it has no effect; products come out about as large as what goes in."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in plan.tensors().items():
        drawn = rng.standard_normal(shape, np.float32)
        if name in plan.matrices():
            drawn /= np.float32(np.sqrt(shape[1]))
        elif "norm" in name and name.endswith("weight"):
            drawn = 1 + np.float32(0.2) * drawn
        elif name.endswith("conv.weight"):
            drawn /= np.float32(np.sqrt(shape[1]))
        weights[name] = drawn
    return weights


def forward(case, weights, precision="fp32"):
    return Forward(case.plan, pack(case.plan, weights, precision))


def unpacked(case, weights, precision):
    """The weights that a packed model computes with, as float64 tensors."""
    packed = pack(case.plan, weights, precision)
    found = {}
    for name in weights:
        array = packed[name]
        if array.dtype == np.uint16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        elif array.dtype == np.int8:
            array = array * packed[name + SCALE].astype(np.float64)[:, None]
        if name.endswith("A_log") and array.ndim == 2 and precision != "fp32":
            array = as_half(array)
        found[name] = torch.from_numpy(array.astype(np.float64))
    return found


def as_half(A_log):
    """A_log of what A is in a Mamba block of matrices that are not float32: times log2(e) it is a float16."""
    log2e = np.float32(np.log2(np.e))
    scaled = np.exp(A_log) * log2e
    if (scaled >= 65504).any():
        return A_log
    return np.log(np.maximum(scaled.astype(np.float16).astype(np.float64), 1e-30) / np.float64(log2e))


def twin(parts, weights, context):
    """What layers make of a context, in PyTorch; weights and context float64."""
    h = context
    for layer in parts:
        h = _TWINS[type(layer)](layer, weights, h, context)
    return h


def _linear(layer, w, h, context):
    return F.linear(h, w[f"{layer.prefix}.weight"], w.get(f"{layer.prefix}.bias"))


def _rms_norm(layer, w, h, context):
    return F.rms_norm(h, (layer.dim,), w[f"{layer.prefix}.weight"], layer.eps)


def _layer_norm(layer, w, h, context):
    return F.layer_norm(h, (layer.dim,), w[f"{layer.prefix}.weight"], w[f"{layer.prefix}.bias"], layer.eps)


def _mamba_block(layer, weights, h, context):
    w = _of(weights, layer.prefix)
    normed = F.rms_norm(h, (layer.dim,), w["norm.weight"], layer.eps)
    x, z = F.linear(normed, w["in_proj.weight"]).mT.chunk(2, dim=1)  # [n, d_inner, L] each
    x = _convolved(x, w)
    sizes = [layer.dt_rank, layer.d_state, layer.d_state]
    dt, B, C = F.linear(x.mT, w["x_proj.weight"]).split(sizes, dim=-1)
    y = fastlvm.ssm_scan(
        x,
        F.linear(dt, w["dt_proj.weight"]).mT,
        -torch.exp(w["A_log"]),
        B.mT,
        C.mT,
        w["D"],
        z,
        w["dt_proj.bias"],
        delta_softplus=True,
        backend="reference",
    )
    return h + F.linear(y.mT, w["out_proj.weight"])


def _mamba2_block(layer, weights, h, context):
    w = _of(weights, layer.prefix)
    inner, bc = layer.n_heads * layer.head_dim, layer.n_groups * layer.d_state
    normed = F.rms_norm(h, (layer.dim,), w["norm.weight"], layer.eps)
    z, xbc, dt = F.linear(normed, w["in_proj.weight"]).split([inner, inner + 2 * bc, layer.n_heads], dim=-1)
    x, B, C = _convolved(xbc.mT, w).mT.split([inner, bc, bc], dim=-1)
    y = fastlvm.ssd_scan(
        x.unflatten(-1, (layer.n_heads, layer.head_dim)),
        dt,
        -torch.exp(w["A_log"]),
        B.unflatten(-1, (layer.n_groups, layer.d_state)),
        C.unflatten(-1, (layer.n_groups, layer.d_state)),
        w["D"],
        dt_bias=w["dt_bias"],
        dt_softplus=True,
        backend="reference",
    ).flatten(-2)
    gated = F.rms_norm(y * F.silu(z), (inner,), w["gate_norm.weight"], layer.eps)
    return h + F.linear(gated, w["out_proj.weight"])


def _of(weights, prefix):
    return {name.removeprefix(f"{prefix}."): w for name, w in weights.items() if name.startswith(f"{prefix}.")}


def _convolved(x, w):
    """[n, channels, L]: depthwise over the past, with SiLU."""
    channels, width = w["conv.weight"].shape
    padded = F.pad(x, (width - 1, 0))
    return F.silu(F.conv1d(padded, w["conv.weight"][:, None], w["conv.bias"], groups=channels))


def _attention(layer, w, h, context):
    q, k, v = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in h.chunk(3, dim=-1))
    ago = torch.arange(h.shape[1])[:, None] - torch.arange(h.shape[1])
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=(ago >= 0) & (ago < layer.window))
    return found.transpose(1, 2).flatten(-2)


def _recurrent(module):
    def run(layer, weights, h, context):
        cells = module(layer.inputs, layer.hidden, batch_first=True, dtype=torch.float64)
        own = {name: w for name, w in _of(weights, layer.prefix).items() if name.endswith(layer.suffix)}
        cells.load_state_dict({name.removesuffix(layer.suffix) + "l0": w for name, w in own.items()})
        with torch.no_grad():
            return cells(h)[0]

    return run


def _context_attention(layer, weights, h, context):
    w = _of(weights, layer.prefix)
    mean = h.mean(dim=1)
    query = F.linear(mean, w["query.weight"], w["query.bias"])
    keys = F.linear(h, w["key.weight"], w["key.bias"])
    shares = torch.softmax(torch.einsum("ni,nli->nl", query, keys) / layer.inner**0.5, dim=1)
    return torch.cat([mean, torch.einsum("nl,nld->nd", shares, h)], dim=1)


def _residual(layer, w, h, context):
    return h + twin(layer.layers, w, h)


def _recency_mixture(layer, w, h, context):
    shares = torch.softmax(w[f"{layer.prefix}.logits"], dim=0)
    return h + torch.einsum("l,nld->nd", shares, context)


def _mixture(layer, w, h, context):
    return _recency_mixture(layer, w, 0, context)


_TWINS = {
    layers.Linear: _linear,
    layers.RmsNorm: _rms_norm,
    layers.LayerNorm: _layer_norm,
    blocks.MambaBlock: _mamba_block,
    blocks.Mamba2Block: _mamba2_block,
    blocks.Attention: _attention,
    blocks.Gru: _recurrent(torch.nn.GRU),
    blocks.Lstm: _recurrent(torch.nn.LSTM),
    layers.Gelu: lambda layer, w, h, context: F.gelu(h),
    layers.Positions: lambda layer, w, h, context: h + w[f"{layer.prefix}.weight"],
    blocks.ContextAttention: _context_attention,
    layers.Residual: _residual,
    layers.Flatten: lambda layer, w, h, context: h.flip(1).flatten(1),
    layers.Last: lambda layer, w, h, context: h[:, -1],
    layers.RecencyMixture: _recency_mixture,
    layers.Mixture: _mixture,
    layers.L2Norm: lambda layer, w, h, context: F.normalize(h, dim=-1),
}


def linear(prefix, inputs, outputs, **fields):
    return {"type": "linear", "prefix": prefix, "inputs": inputs, "outputs": outputs, **fields}


def rms_norm(prefix, dim=17, eps=1e-5):
    return {"type": "rms_norm", "prefix": prefix, "dim": dim, "eps": eps}


def layer_norm(prefix, dim=17, eps=1e-5):
    return {"type": "layer_norm", "prefix": prefix, "dim": dim, "eps": eps}


def mamba(prefix="m", dim=17, inner=34, state=7, conv=4, rank=5, eps=1e-5):
    return {
        "type": "mamba_block",
        "prefix": prefix,
        "dim": dim,
        "d_inner": inner,
        "d_state": state,
        "d_conv": conv,
        "dt_rank": rank,
        "eps": eps,
    }


def mamba2(prefix="m", dim=17, heads=4, head_dim=5, groups=1, state=7, conv=4, eps=1e-5):
    return {
        "type": "mamba2_block",
        "prefix": prefix,
        "dim": dim,
        "n_heads": heads,
        "head_dim": head_dim,
        "n_groups": groups,
        "d_state": state,
        "d_conv": conv,
        "eps": eps,
    }


def attention(heads=3, head_dim=5, window=3, dim=17, prefix="a"):
    """Layers: q, k and v from the stream, attention, and back to the stream's width."""
    inner = heads * head_dim
    return [
        linear(f"{prefix}.in", dim, 3 * inner),
        {"type": "attention", "dim": inner, "heads": heads, "window": window},
        linear(f"{prefix}.out", inner, dim),
    ]


def recurrent(kind, hidden=17, dim=17, prefix="r", **fields):
    return {"type": kind, "prefix": prefix, "inputs": dim, "hidden": hidden, **fields}


def residual(*entries):
    return {"type": "residual", "layers": list(entries)}


LAST, GELU, L2_NORM = {"type": "last"}, {"type": "gelu"}, {"type": "l2_norm"}
