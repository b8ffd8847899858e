"""Attention mixture network: the mean of the context corrected by an MLP, blind to the order of the vectors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlvm.models.base import Model
from fastlvm.models.blocks import linear
from fastlvm.models.config import ModelConfig
from fastlvm.models.mixture import RecencyMixture


class ContextAttention(nn.Module):
    """[B, L, dim] → [mean | attended], [B, 2·dim]: the mean, and Σ softmax(q · kₜ / √inner)ₜ xₜ, q = query(mean)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, inner)
        self.key = nn.Linear(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=1)
        scores = (self.key(x) * self.query(mean)[:, None]).sum(dim=-1) / math.sqrt(self.key.out_features)  # [B, L]
        attended = (x * scores.softmax(dim=-1)[..., None]).sum(dim=1)
        return torch.cat([mean, attended], dim=-1)


class Amn(Model):
    """y = normalize(mean(x) + mlp(pool(x))), the MLP 2·vector_dim → d_ff → hidden → vector_dim with GELU.

    Its last layer starts at zero, so an untrained one is the mean of the context.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        dim = config.vector_dim
        self.mixture = RecencyMixture(config.context, 1.0, learned=False) if config.residual else None
        self.pool = ContextAttention(dim, config.hidden)
        sizes = (2 * dim, config.d_ff, config.hidden, dim)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-2])
        self.head = nn.Linear(sizes[-2], dim)
        self.dropout = nn.Dropout(config.dropout)
        if config.residual:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        y = self.head(self.dropout(self.mlp(self.pool(x))))
        if self.mixture is not None:
            y = self.mixture(x) + y
        return F.normalize(y, dim=-1)

    def describe(self) -> list[dict[str, Any]]:
        config = self.config
        found: list[dict[str, Any]] = [
            {"type": "context_attention", "prefix": "pool", "dim": config.vector_dim, "inner": config.hidden}
        ]
        for i, layer in enumerate(self.mlp):
            found.append(linear(layer, f"mlp.{i}") if isinstance(layer, nn.Linear) else {"type": "gelu"})
        found.append(linear(self.head, "head"))
        if self.mixture is not None:
            found.append(self.mixture.describe("mixture"))
        return [*found, {"type": "l2_norm"}]
