"""Recurrent blocks: a gate beside Mamba blocks, and residual layers of GRU and LSTM.

mlx's own cells have other weights than torch's, so that these cells are written out with torch's.
"""

from __future__ import annotations

import math

import mlx.core as mx
from mlx import nn

from fastlvm.models.config import ModelConfig
from fastlvm.models.mlx.base import Array
from fastlvm.models.mlx.blocks import Block, State, quieter


class Cells(nn.Module):
    """One layer of recurrent cells [B, L, inputs] → [B, L, hidden], from a zero state."""

    GATES: int
    STATES: int

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        bound, rows = 1 / math.sqrt(hidden), self.GATES * hidden
        self.hidden = hidden
        self.weight_ih_l0 = mx.random.uniform(-bound, bound, (rows, inputs))
        self.weight_hh_l0 = mx.random.uniform(-bound, bound, (rows, hidden))
        self.bias_ih_l0 = mx.random.uniform(-bound, bound, (rows,))
        self.bias_hh_l0 = mx.random.uniform(-bound, bound, (rows,))

    def __call__(self, x: Array) -> Array:
        given, state, found = self._given(x), self.start(len(x)), []
        for t in range(x.shape[1]):  # what a cell does next hangs on what it did
            found.append(self._next(given[:, t], state))
        return mx.stack(found, axis=1)

    def start(self, batch: int) -> State:
        return [mx.zeros((batch, self.hidden)) for _ in range(self.STATES)]

    def step(self, x: Array, state: State) -> Array:
        """x [B, inputs] → [B, hidden]"""
        return self._next(self._given(x), state)

    def _given(self, x: Array) -> Array:
        """What an input gives to the gates, [.., GATES · hidden], of all positions at once."""
        return mx.addmm(self.bias_ih_l0, x, self.weight_ih_l0.T)

    def _kept(self, h: Array) -> Array:
        """What the output before gives to the gates, [B, GATES · hidden]."""
        return mx.addmm(self.bias_hh_l0, h, self.weight_hh_l0.T)

    def _next(self, given: Array, state: State) -> Array:
        raise NotImplementedError


class GruCells(Cells):
    """Gates in torch's order: reset, update, new."""

    GATES, STATES = 3, 1

    def _next(self, given: Array, state: State) -> Array:
        h = state[0]
        (r, z, n), (hr, hz, hn) = (mx.split(x, 3, axis=-1) for x in (given, self._kept(h)))
        z = mx.sigmoid(z + hz)
        state[0] = (1 - z) * mx.tanh(n + mx.sigmoid(r + hr) * hn) + z * h
        return state[0]


class LstmCells(Cells):
    """Gates in torch's order: input, forget, cell, output."""

    GATES, STATES = 4, 2

    def _next(self, given: Array, state: State) -> Array:
        i, f, g, o = mx.split(given + self._kept(state[0]), 4, axis=-1)
        cell = mx.sigmoid(f) * state[1] + mx.sigmoid(i) * mx.tanh(g)
        state[:] = [mx.sigmoid(o) * mx.tanh(cell), cell]
        return state[0]


class GruGate(Block):
    """norm → GRU of `hidden` cells, from a zero state → d_model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.gru = GruCells(config.d_model, config.hidden)
        self.out = quieter(nn.Linear(config.hidden, config.d_model), config)

    def __call__(self, h: Array) -> Array:
        return self.out(self.gru(self.norm(h)))

    def start(self, batch: int) -> State:
        return self.gru.start(batch)

    def step(self, h: Array, state: State) -> Array:
        return self.out(self.gru.step(self.norm(h), state))


class Recurrent(Block):
    """LayerNorm → one layer of d_model cells, from a zero state."""

    CELLS: type[Cells]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.cell = self.CELLS(config.d_model, config.d_model)

    def __call__(self, h: Array) -> Array:
        return self.cell(self.norm(h))

    def start(self, batch: int) -> State:
        return self.cell.start(batch)

    def step(self, h: Array, state: State) -> Array:
        return self.cell.step(self.norm(h), state)


class Gru(Recurrent):
    CELLS = GruCells


class Lstm(Recurrent):
    CELLS = LstmCells
