"""Recency mixture: one learned weight per position of the context. It is a model by itself, and under others."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlvm.errors import InputError
from fastlvm.models.base import Model
from fastlvm.models.config import ModelConfig


class RecencyMixture(nn.Module):
    """Weighted sum of the context's vectors, weights = softmax of one logit per position, oldest first.

    A context shorter than `context` uses the newest positions' logits, renormalised. The weights start at
    decay ** age, so that the newest vector counts most; without `learned` they stay there.
    """

    def __init__(self, context: int, decay: float, learned: bool = True) -> None:
        super().__init__()
        age = torch.arange(context - 1, -1, -1, dtype=torch.float32)
        self.logits = nn.Parameter(age * math.log(decay), requires_grad=learned)  # [context]

    def weights(self, length: int) -> Tensor:
        """Weights [length] of the newest `length` positions; they sum to 1."""
        context = self.logits.shape[0]
        if not 1 <= length <= context:
            raise InputError(f"the context holds {length} vectors, and the model takes 1 to {context}")
        return torch.softmax(self.logits[context - length :].float(), dim=0)

    def forward(self, x: Tensor) -> Tensor:
        # [B, L, D] -> [B, D]; not a matmul: its bits would depend on the batch size
        weights = self.weights(x.shape[1]).to(x.dtype)
        return (x * weights[:, None]).sum(dim=1)

    def describe(self, prefix: str) -> dict[str, Any]:
        """Its entry in a layer list, where it is added to the stream."""
        return {"type": "recency_mixture", "prefix": prefix, "context": len(self.logits)}


class Mixture(Model):
    """y = normalize(mixture(x)): what a network has to beat."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if not config.residual:
            raise InputError(f"residual is False, and a {config.name} is nothing without its mixture: leave it out")
        self.mixture = RecencyMixture(config.context, config.decay)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return F.normalize(self.mixture(x), dim=-1)

    def describe(self) -> list[dict[str, Any]]:
        return [{**self.mixture.describe("mixture"), "type": "mixture"}, {"type": "l2_norm"}]
