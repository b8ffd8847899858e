"""A stack of blocks whose head corrects a recency mixture of the context: Mamba in all its forms, and its baselines."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlvm.models.base import Model, Recent
from fastlvm.models.blocks import Block, FeedForward, LocalAttention, RMSNorm, linear
from fastlvm.models.config import BLOCKS, ModelConfig
from fastlvm.models.mixture import RecencyMixture
from fastlvm.models.recurrent import Gru, GruGate, Lstm
from fastlvm.models.ssm import Mamba2Block, MambaBlock

_CLASSES: dict[str, type[Block]] = {
    "mamba": MambaBlock,
    "mamba2": Mamba2Block,
    "attention": LocalAttention,
    "mlp": FeedForward,
    "gate": GruGate,
    "gru": Gru,
    "lstm": Lstm,
}
assert set(_CLASSES) == set(BLOCKS)


class State(NamedTuple):
    """What a stack has seen: each block's state, and the newest vectors."""

    blocks: list[list[Tensor]]
    recent: Recent
    seen: list[int]  # one number, how many


class Stack(Model):
    """y = normalize(mixture(x) + head(norm(blocks(embed(norm(x)))))) at the newest position.

    The head starts at zero, so an untrained model is the recency mixture itself and training can only move away from
    it: on real articles a head that stands alone (`residual=False`) lost to copying the last vector.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.mixture = RecencyMixture(config.context, config.decay) if config.residual else None
        self.input = RMSNorm(config.vector_dim, config.norm_eps)
        same = config.d_model == config.vector_dim
        self.embed: nn.Module = nn.Identity() if same else nn.Linear(config.vector_dim, config.d_model)
        self.positions = nn.Embedding(config.context, config.d_model) if config.positions else None
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList(_CLASSES[name](config) for layer in config.layers for name in layer)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vector_dim)
        if config.residual:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        h = self.embed(self.dropout(self.input(x)))  # [B, L, d_model]
        if self.positions is not None:
            h = h + self.positions.weight[: h.shape[1]]
        for block in self.blocks:
            h = h + self.dropout(block(h))
        return self._predict(h[:, -1], x)  # only the newest position is read

    def _predict(self, h: Tensor, x: Tensor) -> Tensor:
        y = self.head(self.norm(h))  # [B, vector_dim]
        if self.mixture is not None:
            y = self.mixture(x) + y
        return F.normalize(y, dim=-1)

    def start(self, batch: int) -> State:
        return State([block.start(batch) for block in self._each()], Recent(self.config.context), [0])

    @torch.no_grad()
    def step(self, x: Tensor, state: State) -> Tensor:
        recent = state.recent.push(x)
        self.check(recent)
        h = self.embed(self.input(x))
        if self.positions is not None:
            h = h + self.positions.weight[state.seen[0]]
        state.seen[0] += 1
        for block, own in zip(self._each(), state.blocks, strict=True):
            h = h + block.step(h, own)
        return self._predict(h, recent)

    def _each(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def describe(self) -> list[dict[str, Any]]:
        config = self.config
        found: list[dict[str, Any]] = [self.input.describe("input")]
        if isinstance(self.embed, nn.Linear):
            found.append(linear(self.embed, "embed"))
        if self.positions is not None:
            found.append({"type": "positions", "prefix": "positions", "context": config.context, "dim": config.d_model})
        for i, block in enumerate(self._each()):
            found += block.describe(f"blocks.{i}")
        found += [{"type": "last"}, self.norm.describe("norm"), linear(self.head, "head")]
        if self.mixture is not None:
            found.append(self.mixture.describe("mixture"))
        return [*found, {"type": "l2_norm"}]
