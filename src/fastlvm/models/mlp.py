"""One hidden layer over the whole context: the least network that corrects a mixture."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastlvm.models.base import Model
from fastlvm.models.blocks import RMSNorm, linear
from fastlvm.models.config import ModelConfig
from fastlvm.models.mixture import RecencyMixture


class Mlp(Model):
    """y = normalize(mixture(x) + head(gelu(hidden(flat(norm(x)))))), flat being the context in one row, newest first.

    A shorter context ends with zeros. The head starts at zero, so an untrained one is its mixture.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.mixture = RecencyMixture(config.context, config.decay) if config.residual else None
        self.input = RMSNorm(config.vector_dim, config.norm_eps)
        self.hidden = nn.Linear(config.context * config.vector_dim, config.d_ff)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.d_ff, config.vector_dim)
        if config.residual:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        flat = self.input(x).flip(1).flatten(1)  # [B, L · dim]
        flat = F.pad(flat, (0, self.hidden.in_features - flat.shape[1]))
        y = self.head(self.dropout(F.gelu(self.hidden(self.dropout(flat)))))
        if self.mixture is not None:
            y = self.mixture(x) + y
        return F.normalize(y, dim=-1)

    def describe(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [
            self.input.describe("input"),
            {"type": "flatten", "context": self.config.context},
            linear(self.hidden, "hidden"),
            {"type": "gelu"},
            linear(self.head, "head"),
        ]
        if self.mixture is not None:
            found.append(self.mixture.describe("mixture"))
        return [*found, {"type": "l2_norm"}]
