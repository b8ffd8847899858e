"""Recurrent blocks over torch's own cells: a gate beside Mamba blocks, and residual layers of GRU and LSTM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlvm.models.blocks import Block, Entry, RMSNorm, linear, quieter, residual
from fastlvm.models.config import ModelConfig


class GruGate(Block):
    """norm → GRU of `hidden` cells, from a zero state → d_model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.gru = nn.GRU(config.d_model, config.hidden, batch_first=True)
        self.out = nn.Linear(config.hidden, config.d_model)
        quieter(self.out, config)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.out(self.gru(self.norm(h))[0])
        return out

    def start(self, batch: int) -> list[Tensor]:
        return [self.out.weight.new_zeros(1, batch, self.gru.hidden_size)]

    def step(self, h: Tensor, state: list[Tensor]) -> Tensor:
        cells, state[0] = self.gru(self.norm(h[:, None]), state[0])
        out: Tensor = self.out(cells[:, 0])
        return out

    def describe(self, prefix: str) -> list[Entry]:
        gru = _cells(self.gru, f"{prefix}.gru")
        return residual(self.norm.describe(f"{prefix}.norm"), gru, linear(self.out, f"{prefix}.out"))


class Recurrent(Block):
    """LayerNorm → one layer of d_model cells, from a zero state."""

    CELLS: type[nn.GRU] | type[nn.LSTM]
    STATES: int

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.cell = self.CELLS(config.d_model, config.d_model, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.cell(self.norm(h))[0]
        return out

    def start(self, batch: int) -> list[Tensor]:
        return [self.norm.weight.new_zeros(1, batch, self.cell.hidden_size) for _ in range(self.STATES)]

    def step(self, h: Tensor, state: list[Tensor]) -> Tensor:
        before = tuple(state) if self.STATES > 1 else state[0]
        out, after = self.cell(self.norm(h[:, None]), before)
        state[:] = after if self.STATES > 1 else [after]
        found: Tensor = out[:, 0]
        return found

    def describe(self, prefix: str) -> list[Entry]:
        dim = self.cell.hidden_size
        norm = {"type": "layer_norm", "prefix": f"{prefix}.norm", "dim": dim, "eps": float(self.norm.eps)}
        return residual(norm, _cells(self.cell, f"{prefix}.cell"))


class Gru(Recurrent):
    CELLS, STATES = nn.GRU, 1


class Lstm(Recurrent):
    CELLS, STATES = nn.LSTM, 2


def _cells(cells: torch.nn.RNNBase, prefix: str) -> Entry:
    kind = "lstm" if isinstance(cells, nn.LSTM) else "gru"
    return {"type": kind, "prefix": prefix, "inputs": cells.input_size, "hidden": cells.hidden_size}
