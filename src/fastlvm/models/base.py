"""What every predictor is: a module from a context to one vector, with its configuration and its layer list."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlvm.models.config import ModelConfig


class Model(nn.Module):
    """`[B, L, vector_dim] -> [B, vector_dim]`, L2-normalised; 1 ≤ L ≤ config.context, oldest vector first.

    A new one is a class of this shape, and a line in `config.PRESETS`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def describe(self) -> list[dict[str, Any]]:
        """The layers as an artifact lists them, which `fastlvm.predictor` runs with this module's weights."""
        raise NotImplementedError

    def start(self, batch: int) -> Any:
        """The state of `step` before the first vector, for `batch` sequences."""
        return Recent(self.config.context)

    @torch.no_grad()
    def step(self, x: Tensor, state: Any) -> Tensor:
        """The prediction [B, vector_dim] after one more vector x [B, vector_dim] of each sequence; `state` goes on.

        After L ≤ context vectors it is what `forward` makes of these L.
        """
        out: Tensor = self(state.push(x))
        return out

    def check(self, x: Tensor) -> None:
        """Raises InputError for what is no context."""
        self.config.check_context(tuple(x.shape), x.dtype, torch.is_floating_point(x))


class Recent:
    """The newest vectors of sequences that are pushed one at a time."""

    def __init__(self, most: int) -> None:
        self.most, self.vectors = most, torch.empty(0)

    def push(self, x: Tensor) -> Tensor:
        """x [B, dim] → the newest ones with it, [B, up to `most`, dim]"""
        kept = self.vectors[:, -(self.most - 1) :] if self.most > 1 and self.vectors.numel() else x[:, None][:, :0]
        self.vectors = torch.cat([kept, x[:, None]], dim=1)
        return self.vectors
