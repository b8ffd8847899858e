"""Attention mixture network: the mean of the context corrected by an MLP, blind to the order of the vectors."""

from __future__ import annotations

import itertools
import math

import mlx.core as mx
from mlx import nn

from fastlvm.models.config import ModelConfig
from fastlvm.models.mlx.base import Array, Model
from fastlvm.models.mlx.blocks import silent
from fastlvm.models.mlx.mixture import RecencyMixture, corrected


class ContextAttention(nn.Module):
    """[B, L, dim] → [mean | attended], [B, 2·dim]: the mean, and Σ softmax(q · kₜ / √inner)ₜ xₜ, q = query(mean)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(inner)
        self.query = nn.Linear(dim, inner)
        self.key = nn.Linear(dim, inner)

    def __call__(self, x: Array) -> Array:
        mean = x.mean(axis=1)
        scores = (self.key(x) * self.query(mean)[:, None]).sum(axis=-1) * self.scale  # [B, L]
        attended = (x * mx.softmax(scores, axis=-1)[..., None]).sum(axis=1)
        return mx.concatenate([mean, attended], axis=-1)


class Amn(Model):
    """y = normalize(mean(x) + mlp(pool(x))), the MLP 2·vector_dim → d_ff → hidden → vector_dim with GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        dim = config.vector_dim
        if config.residual:
            self.mixture = RecencyMixture(config.context, 1.0, learned=False)
        self.pool = ContextAttention(dim, config.hidden)
        self.mlp: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((2 * dim, config.d_ff, config.hidden)):
            self.mlp += [nn.Linear(inputs, outputs), nn.GELU()]
        self.head = silent(nn.Linear(config.hidden, dim), config)
        self.dropout = nn.Dropout(config.dropout)

    def __call__(self, x: Array) -> Array:
        self.check(x)
        y = self.pool(x)
        for layer in self.mlp:
            y = layer(y)
        return corrected(self, x, self.head(self.dropout(y)))
