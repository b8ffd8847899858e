"""The blocks that models are stacks of: causal, pre-norm, without the residual connection around them.

Every tensor here is channel-last unless a comment says otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlvm.models.config import ModelConfig

Entry = dict[str, Any]  # a layer as an artifact lists it


class Block(nn.Module):
    """A branch h [B, L, d_model] → [B, L, d_model] that is added to h; a position sees those up to itself."""

    def start(self, batch: int) -> list[Tensor]:
        """The state before the first position, zeros; `step` changes it."""
        return []

    def step(self, h: Tensor, state: list[Tensor]) -> Tensor:
        """`forward` of one position h [B, d_model] that follows those which `state` has seen."""
        out: Tensor = self(h[:, None])
        return out[:, 0]

    def describe(self, prefix: str) -> list[Entry]:
        """The layers that add this branch, its weights' names beginning with `prefix`."""
        raise NotImplementedError


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in float32 at least."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight

    def describe(self, prefix: str) -> Entry:
        return {"type": "rms_norm", "prefix": prefix, "dim": len(self.weight), "eps": float(self.eps)}


class LocalAttention(Block):
    """Multi-head attention of a position to the `window` newest up to itself: norm → q, k, v → softmax → out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.d_model
        self.heads, self.window = config.heads, config.window or config.context
        self.norm = RMSNorm(dim, config.norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        quieter(self.out, config)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (self._apart(part) for part in self.qkv(self.norm(h)).chunk(3, dim=-1))
        position = torch.arange(h.shape[1], device=h.device)
        ago = position[:, None] - position
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=(ago >= 0) & (ago < self.window))
        return self._out(mixed)

    def start(self, batch: int) -> list[Tensor]:
        weight = self.out.weight
        return [weight.new_zeros(batch, 0, weight.shape[0]) for _ in range(2)]  # keys and values that were seen

    def step(self, h: Tensor, state: list[Tensor]) -> Tensor:
        q, *fresh = self.qkv(self.norm(h[:, None])).chunk(3, dim=-1)
        for i, part in enumerate(fresh):
            state[i] = torch.cat([state[i], part], dim=1)[:, -self.window :]
        q, k, v = (self._apart(part) for part in (q, *state))
        return self._out(F.scaled_dot_product_attention(q, k, v))[:, 0]

    def _apart(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, d_model / heads]

    def _out(self, mixed: Tensor) -> Tensor:
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out

    def describe(self, prefix: str) -> list[Entry]:
        dim = self.out.weight.shape[0]
        mix = {"type": "attention", "dim": dim, "heads": self.heads, "window": self.window}
        qkv, out = linear(self.qkv, f"{prefix}.qkv"), linear(self.out, f"{prefix}.out")
        return residual(self.norm.describe(f"{prefix}.norm"), qkv, mix, out)


class FeedForward(Block):
    """norm → d_ff → GELU → d_model, at every position by itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)
        quieter(self.down, config)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(self.norm(h))))
        return out

    def describe(self, prefix: str) -> list[Entry]:
        up, down = linear(self.up, f"{prefix}.up"), linear(self.down, f"{prefix}.down")
        return residual(self.norm.describe(f"{prefix}.norm"), up, {"type": "gelu"}, down)


def quieter(out: nn.Linear, config: ModelConfig) -> None:
    """Scale a branch's last weights so that the residual stream keeps its variance however many branches there are."""
    with torch.no_grad():
        out.weight.div_(math.sqrt(config.n_layers))


def linear(layer: nn.Linear, prefix: str) -> Entry:
    """A linear layer's entry in a layer list."""
    sizes = {"inputs": layer.in_features, "outputs": layer.out_features, "bias": layer.bias is not None}
    return {"type": "linear", "prefix": prefix, **sizes}


def residual(*entries: Entry) -> list[Entry]:
    return [{"type": "residual", "layers": list(entries)}]
