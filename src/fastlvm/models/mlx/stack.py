"""A stack of blocks whose head corrects a recency mixture of the context: Mamba in all its forms, and its baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
from mlx import nn

from fastlvm.errors import InputError
from fastlvm.models.config import BLOCKS, ModelConfig
from fastlvm.models.mlx import blocks
from fastlvm.models.mlx.base import Array, Model, Recent
from fastlvm.models.mlx.mixture import RecencyMixture, corrected
from fastlvm.models.mlx.recurrent import Gru, GruGate, Lstm
from fastlvm.models.mlx.ssm import Mamba2Block, MambaBlock

_CLASSES: dict[str, Callable[[ModelConfig], blocks.Block]] = {
    "mamba": MambaBlock,
    "mamba2": Mamba2Block,
    "attention": blocks.LocalAttention,
    "mlp": blocks.FeedForward,
    "gate": GruGate,
    "gru": Gru,
    "lstm": Lstm,
}
assert set(_CLASSES) == set(BLOCKS)


class State(NamedTuple):
    """What a stack has seen: each block's state, and the newest vectors."""

    blocks: list[blocks.State]
    recent: Recent
    seen: list[int]  # one number, how many


class Stack(Model):
    """y = normalize(mixture(x) + head(norm(blocks(embed(norm(x)))))) at the newest position.

    The head starts at zero, so an untrained model is the recency mixture itself.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.residual:
            self.mixture = RecencyMixture(config.context, config.decay)
        self.input = nn.RMSNorm(config.vector_dim, config.norm_eps)
        same = config.d_model == config.vector_dim
        self.embed = nn.Identity() if same else nn.Linear(config.vector_dim, config.d_model)
        if config.positions:
            self.positions = nn.Embedding(config.context, config.d_model)
            self.positions.weight = 0.02 * mx.random.normal(self.positions.weight.shape)
        self.blocks = [_CLASSES[name](config) for layer in config.layers for name in layer]
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.head = blocks.silent(nn.Linear(config.d_model, config.vector_dim), config)

    def __call__(self, x: Array) -> Array:
        self.check(x)
        h = self.embed(self.dropout(self.input(x)))  # [B, L, d_model]
        if "positions" in self:
            h = h + self.positions.weight[: h.shape[1]]
        for block in self.blocks:
            h = h + self.dropout(block(h))
        return corrected(self, x, self.head(self.norm(h[:, -1])))  # only the newest position is read

    def start(self, batch: int) -> State:
        return State([block.start(batch) for block in self.blocks], Recent(self.config.context), [0])

    def step(self, x: Array, state: State) -> Array:
        recent = state.recent.push(x)
        self.check(recent)
        h = self.embed(self.input(x))
        if "positions" in self:
            if state.seen[0] == self.config.context:  # mlx would read what lies behind
                raise InputError(f"{self.config.name} has {self.config.context} positions: start again after as many")
            h = h + self.positions.weight[state.seen[0]]
        state.seen[0] += 1
        for block, own in zip(self.blocks, state.blocks, strict=True):
            h = h + block.step(h, own)
        return corrected(self, recent, self.head(self.norm(h)))
