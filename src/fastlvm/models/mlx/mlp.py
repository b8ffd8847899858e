"""One hidden layer over the whole context: the least network that corrects a mixture."""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from fastlvm.models.config import ModelConfig
from fastlvm.models.mlx.base import Array, Model
from fastlvm.models.mlx.blocks import silent
from fastlvm.models.mlx.mixture import RecencyMixture, corrected


class Mlp(Model):
    """y = normalize(mixture(x) + head(gelu(hidden(flat(norm(x)))))), flat being the context in one row, newest first.

    A shorter context ends with zeros.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.residual:
            self.mixture = RecencyMixture(config.context, config.decay)
        self.input = nn.RMSNorm(config.vector_dim, config.norm_eps)
        self.hidden = nn.Linear(config.context * config.vector_dim, config.d_ff)
        self.dropout = nn.Dropout(config.dropout)
        self.head = silent(nn.Linear(config.d_ff, config.vector_dim), config)

    def __call__(self, x: Array) -> Array:
        self.check(x)
        flat = mx.flatten(self.input(x)[:, ::-1], 1)  # [B, L · dim]
        flat = mx.pad(flat, [(0, 0), (0, self.hidden.weight.shape[1] - flat.shape[1])])
        return corrected(self, x, self.head(self.dropout(nn.gelu(self.hidden(self.dropout(flat))))))
