"""State-space blocks: Mamba and Mamba-2."""

from __future__ import annotations

import math
from itertools import accumulate

import mlx.core as mx
from mlx import nn

from fastlvm.models.config import ModelConfig
from fastlvm.models.mlx.base import Array
from fastlvm.models.mlx.blocks import Block, State, quieter
from fastlvm.ops import causal_conv1d, causal_conv1d_step, ssd_scan, ssd_step, ssm_scan, ssm_step

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


class CausalConv(nn.Module):
    """A depthwise causal convolution, SiLU included; takes and gives channel-first [B, D, L]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = mx.random.uniform(-bound, bound, (channels, width))
        self.bias = mx.random.uniform(-bound, bound, (channels,))

    def __call__(self, x: Array) -> Array:
        return causal_conv1d(x, self.weight, self.bias, activation="silu")

    def start(self, batch: int) -> Array:
        channels, width = self.weight.shape
        return mx.zeros((batch, channels, width - 1))

    def step(self, x: Array, state: Array) -> Array:
        return causal_conv1d_step(x, state, self.weight, self.bias, activation="silu")


class MambaBlock(Block):
    """Selective state-space block (Gu and Dao, "Mamba", 2023).

    norm → in_proj → causal convolution, SiLU → (δ, B, C) from the input, δ of low rank → scan, D skip, SiLU gate
    → out_proj.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_inner, d_state, rank = config.d_inner, config.d_state, config.dt_rank
        assert rank is not None  # resolved by ModelConfig
        self.split = _ends(rank, d_state, d_state)
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=False)
        self.conv = CausalConv(d_inner, config.d_conv)
        self.x_proj = nn.Linear(d_inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, d_inner)  # its weights start as U(±rank^-0.5)
        self.dt_proj.bias = _step_sizes(d_inner)
        states = mx.arange(1, d_state + 1, dtype=mx.float32)
        self.A_log = mx.broadcast_to(mx.log(states), (d_inner, d_state))  # S4D-real
        self.D = mx.ones((d_inner,))
        self.out_proj = quieter(nn.Linear(d_inner, config.d_model, bias=False), config)

    def __call__(self, h: Array) -> Array:
        xz = self.in_proj(self.norm(h)).swapaxes(1, 2)  # [B, 2·d_inner, L], a view
        x, z = mx.split(xz, 2, axis=1)  # [B, d_inner, L] each
        x = self.conv(x)
        dt, B, C = mx.split(self.x_proj(x.swapaxes(1, 2)), self.split, axis=-1)  # [B, L, rank | d_state | d_state]
        delta = (dt @ self.dt_proj.weight.T).swapaxes(1, 2)  # [B, d_inner, L]; its bias enters inside the scan
        A, bias = -mx.exp(self.A_log), self.dt_proj.bias
        y = ssm_scan(x, delta, A, B.swapaxes(1, 2), C.swapaxes(1, 2), self.D, z, bias, delta_softplus=True)
        return self.out_proj(y.swapaxes(1, 2))

    def start(self, batch: int) -> State:
        return [self.conv.start(batch), mx.zeros((batch, *self.A_log.shape))]

    def step(self, h: Array, state: State) -> Array:
        x, z = mx.split(self.in_proj(self.norm(h)), 2, axis=-1)  # [B, d_inner] each
        x = self.conv.step(x, state[0])
        dt, B, C = mx.split(self.x_proj(x), self.split, axis=-1)
        delta, A, bias = dt @ self.dt_proj.weight.T, -mx.exp(self.A_log), self.dt_proj.bias
        return self.out_proj(ssm_step(state[1], x, delta, A, B, C, self.D, z, bias, delta_softplus=True))


class Mamba2Block(Block):
    """The SSD block (Dao and Gu, "Transformers are SSMs", 2024), one group of B and C.

    norm → in_proj to [z | x B C | dt] → causal convolution of x B C, SiLU → SSD, D skip → norm of y · silu(z)
    → out_proj.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_inner, d_state, heads = config.d_inner, config.d_state, config.d_inner // config.head_dim
        channels = d_inner + 2 * d_state
        self.head_dim, self.d_state = config.head_dim, d_state
        self.split, self.inner = _ends(d_inner, channels, heads), _ends(d_inner, d_state, d_state)
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.in_proj = nn.Linear(config.d_model, d_inner + channels + heads, bias=False)
        self.conv = CausalConv(channels, config.d_conv)
        self.dt_bias = _step_sizes(heads)
        self.A_log = mx.log(mx.random.uniform(1, 16, (heads,)))
        self.D = mx.ones((heads,))
        self.gate_norm = nn.RMSNorm(d_inner, config.norm_eps)
        self.out_proj = quieter(nn.Linear(d_inner, config.d_model, bias=False), config)

    def __call__(self, h: Array) -> Array:
        z, xbc, dt = mx.split(self.in_proj(self.norm(h)), self.split, axis=-1)
        x, B, C = mx.split(self.conv(xbc.swapaxes(1, 2)).swapaxes(1, 2), self.inner, axis=-1)
        x, A = mx.unflatten(x, -1, (-1, self.head_dim)), -mx.exp(self.A_log)  # [B, L, heads, head_dim]
        y = ssd_scan(x, dt, A, B[:, :, None], C[:, :, None], self.D, dt_bias=self.dt_bias, dt_softplus=True)
        return self._out(y, z)

    def start(self, batch: int) -> State:
        return [self.conv.start(batch), mx.zeros((batch, len(self.A_log), self.head_dim, self.d_state))]

    def step(self, h: Array, state: State) -> Array:
        z, xbc, dt = mx.split(self.in_proj(self.norm(h)), self.split, axis=-1)
        x, B, C = mx.split(self.conv.step(xbc, state[0]), self.inner, axis=-1)
        x, A = mx.unflatten(x, -1, (-1, self.head_dim)), -mx.exp(self.A_log)  # [B, heads, head_dim]
        y = ssd_step(state[1], x, dt, A, B[:, None], C[:, None], self.D, dt_bias=self.dt_bias, dt_softplus=True)
        return self._out(y, z)

    def _out(self, y: Array, z: Array) -> Array:
        return self.out_proj(self.gate_norm(mx.flatten(y, -2) * nn.silu(z)))


def _ends(*sizes: int) -> tuple[int, ...]:
    """Where `mx.split` cuts parts of these sizes."""
    return tuple(accumulate(sizes[:-1]))


def _step_sizes(count: int) -> Array:
    """What softplus makes log-uniform step sizes in [DT_MIN, DT_MAX]."""
    log_dt = mx.random.uniform(math.log(DT_MIN), math.log(DT_MAX), (count,))
    dt = mx.maximum(mx.exp(log_dt), DT_FLOOR)
    return dt + mx.log(-mx.expm1(-dt))
