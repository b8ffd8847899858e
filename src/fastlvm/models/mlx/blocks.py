"""The blocks that models are stacks of: causal, pre-norm, without the residual connection around them.

Every array here is channel-last unless a comment says otherwise.
"""

from __future__ import annotations

import math

import mlx.core as mx
from mlx import nn

from fastlvm.models.config import ModelConfig
from fastlvm.models.mlx.base import Array

State = list[Array]


class Block(nn.Module):
    """A branch h [B, L, d_model] → [B, L, d_model] that is added to h; a position sees those up to itself."""

    def __call__(self, h: Array) -> Array:
        raise NotImplementedError

    def start(self, batch: int) -> State:
        """The state before the first position, zeros; `step` changes it."""
        return []

    def step(self, h: Array, state: State) -> Array:
        """The block on one position h [B, d_model] that follows those which `state` has seen."""
        return self(h[:, None])[:, 0]


class LocalAttention(Block):
    """Multi-head attention of a position to the `window` newest up to itself: norm → q, k, v → softmax → out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.d_model
        self.heads, self.window = config.heads, config.window or config.context
        self.norm = nn.RMSNorm(dim, config.norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = quieter(nn.Linear(dim, dim, bias=False), config)

    def __call__(self, h: Array) -> Array:
        q, k, v = self._parts(h)
        position = mx.arange(h.shape[1])
        ago = position[:, None] - position
        return self._mix(q, k, v, (ago >= 0) & (ago < self.window))

    def start(self, batch: int) -> State:
        return [mx.zeros((batch, 0, self.out.weight.shape[0])) for _ in range(2)]  # keys and values that were seen

    def step(self, h: Array, state: State) -> Array:
        q, *fresh = self._parts(h[:, None])
        for i, part in enumerate(fresh):
            state[i] = mx.concatenate([state[i], part], axis=1)[:, -self.window :]
        return self._mix(q, state[0], state[1], None)[:, 0]

    def _parts(self, h: Array) -> tuple[Array, ...]:
        return tuple(mx.split(self.qkv(self.norm(h)), 3, axis=-1))  # q, k and v, [B, L, d_model] each

    def _mix(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        q, k, v = (
            mx.unflatten(x, -1, (self.heads, -1)).swapaxes(1, 2) for x in (q, k, v)
        )  # [B, heads, L, dim / heads]
        mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(q.shape[-1]), mask=mask)
        return self.out(mx.flatten(mixed.swapaxes(1, 2), -2))


class FeedForward(Block):
    """norm → d_ff → GELU → d_model, at every position by itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = quieter(nn.Linear(config.d_ff, config.d_model), config)

    def __call__(self, h: Array) -> Array:
        return self.down(nn.gelu(self.up(self.norm(h))))


def quieter(out: nn.Linear, config: ModelConfig) -> nn.Linear:
    """Scale a branch's last weights so that the residual stream keeps its variance however many branches there are."""
    out.weight = out.weight / math.sqrt(config.n_layers)
    return out


def silent(head: nn.Linear, config: ModelConfig) -> nn.Linear:
    """A head that corrects a mixture starts at zero."""
    if config.residual:
        head.weight, head.bias = mx.zeros_like(head.weight), mx.zeros_like(head.bias)
    return head
