"""Mamba: a stack of selective state-space blocks whose head corrects a recency mixture of the context."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlvm.errors import InputError
from fastlvm.models.blocks import MambaBlock, RMSNorm
from fastlvm.models.config import ModelConfig
from fastlvm.models.mixture import RecencyMixture


class MambaPredictor(nn.Module):
    """`[B, L, vector_dim] -> [B, vector_dim]`, L2-normalised; 1 ≤ L ≤ config.context, oldest vector first.

    y = normalize(mixture(x) + head(norm(blocks(embed(x))))) at the newest position. The head starts at zero, so an
    untrained model is the recency mixture itself and training can only move away from it: on real articles a head that
    stands alone (`residual=False`) lost to copying the last vector.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.mixture = RecencyMixture(config.context, config.decay) if config.residual else None
        same = config.d_model == config.vector_dim
        self.embed: nn.Module = nn.Identity() if same else nn.Linear(config.vector_dim, config.d_model)
        self.blocks = nn.ModuleList(MambaBlock(config) for _ in range(config.n_layers))
        self.dropout = nn.Dropout(config.dropout)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vector_dim)
        if config.residual:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        _check_context(x, self.config)
        h = self.embed(x)  # [B, L, d_model]
        for block in self.blocks:
            h = h + self.dropout(block(h))
        y = self.head(self.norm(h[:, -1]))  # [B, vector_dim]; only the newest position is read
        if self.mixture is not None:
            y = self.mixture(x) + y
        return F.normalize(y, dim=-1)


def _check_context(x: Tensor, config: ModelConfig) -> None:
    if x.ndim != 3 or x.shape[2] != config.vector_dim or not 1 <= x.shape[1] <= config.context:
        raise InputError(
            f"the context has shape {tuple(x.shape)}, and the model takes "
            f"[batch, 1 to {config.context}, {config.vector_dim}]"
        )
    if not torch.is_floating_point(x):
        raise InputError(f"the context has dtype {x.dtype}, and the model takes floating-point vectors")
