"""Recency mixture: one learned weight per position of the context."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastlvm.errors import InputError


class RecencyMixture(nn.Module):
    """Weighted sum of the context's vectors, weights = softmax of one logit per position, oldest first.

    A context shorter than `context` uses the newest positions' logits, renormalised. The weights start at
    decay ** age, so that the newest vector counts most.
    """

    def __init__(self, context: int, decay: float) -> None:
        super().__init__()
        age = torch.arange(context - 1, -1, -1, dtype=torch.float32)
        self.logits = nn.Parameter(age * math.log(decay))  # [context]

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
