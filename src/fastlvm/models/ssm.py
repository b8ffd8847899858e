"""State-space blocks: Mamba and Mamba-2."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlvm.models.blocks import Block, Entry, RMSNorm, quieter
from fastlvm.models.config import ModelConfig
from fastlvm.ops import causal_conv1d, causal_conv1d_step, ssd_scan, ssd_step, ssm_scan, ssm_step

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


class CausalConv(nn.Module):
    """A depthwise causal convolution, SiLU included; `forward` takes and gives channel-first [B, D, L]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)  # nn.Conv1d's own start for one input channel per group
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = causal_conv1d(x, self.weight, self.bias, activation="silu")
        return out

    def start(self, batch: int) -> Tensor:
        channels, width = self.weight.shape
        return self.weight.new_zeros(batch, channels, width - 1)

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        out: Tensor = causal_conv1d_step(x, state, self.weight, self.bias, activation="silu")
        return out


class MambaBlock(Block):
    """Selective state-space block (Gu and Dao, "Mamba", 2023).

    norm → in_proj → causal convolution, SiLU → (δ, B, C) from the input, δ of low rank → scan, D skip, SiLU gate
    → out_proj.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_inner, d_state = config.d_inner, config.d_state
        assert config.dt_rank is not None  # resolved by ModelConfig
        self.split = [config.dt_rank, d_state, d_state]
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=False)
        self.conv = CausalConv(d_inner, config.d_conv)
        self.x_proj = nn.Linear(d_inner, sum(self.split), bias=False)
        self.dt_proj = nn.Linear(config.dt_rank, d_inner)
        states = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(states.log().repeat(d_inner, 1))  # [d_inner, d_state], S4D-real
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)
        with torch.no_grad():
            bound = config.dt_rank**-0.5
            self.dt_proj.weight.uniform_(-bound, bound)
            self.dt_proj.bias.copy_(_step_sizes(d_inner))
        quieter(self.out_proj, config)

    def forward(self, h: Tensor) -> Tensor:
        xz = self.in_proj(self.norm(h)).transpose(1, 2)  # [B, 2·d_inner, L], a view
        x, z = xz.chunk(2, dim=1)  # [B, d_inner, L] each
        x = self.conv(x)
        dt, B, C = self.x_proj(x.transpose(1, 2)).split(self.split, dim=-1)  # [B, L, dt_rank | d_state | d_state]
        delta = F.linear(dt, self.dt_proj.weight).transpose(1, 2)  # [B, d_inner, L]; its bias enters inside the scan
        y = ssm_scan(
            x,
            delta,
            -torch.exp(self.A_log.float()),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D.float(),
            z,
            self.dt_proj.bias.float(),
            delta_softplus=True,
        )  # [B, d_inner, L]
        out: Tensor = self.out_proj(y.transpose(1, 2))
        return out

    def start(self, batch: int) -> list[Tensor]:
        return [self.conv.start(batch), torch.zeros(batch, *self.A_log.shape, device=self.A_log.device)]

    def step(self, h: Tensor, state: list[Tensor]) -> Tensor:
        x, z = self.in_proj(self.norm(h)).chunk(2, dim=-1)  # [B, d_inner] each
        x = self.conv.step(x, state[0])
        dt, B, C = self.x_proj(x).split(self.split, dim=-1)
        delta = F.linear(dt, self.dt_proj.weight)
        A, D, bias = -torch.exp(self.A_log.float()), self.D.float(), self.dt_proj.bias.float()
        y = ssm_step(state[1], x, delta, A, B, C, D, z, bias, delta_softplus=True)
        out: Tensor = self.out_proj(y)
        return out

    def describe(self, prefix: str) -> list[Entry]:
        d_inner, d_state = self.A_log.shape
        sizes = {"d_inner": d_inner, "d_state": d_state, "d_conv": self.conv.weight.shape[1], "dt_rank": self.split[0]}
        norm = self.norm.describe(prefix)
        return [{**norm, "type": "mamba_block", **sizes}]


class Mamba2Block(Block):
    """The SSD block (Dao and Gu, "Transformers are SSMs", 2024), one group of B and C.

    norm → in_proj to [z | x B C | dt] → causal convolution of x B C, SiLU → SSD, D skip → norm of y · silu(z)
    → out_proj.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_inner, d_state, heads = config.d_inner, config.d_state, config.d_inner // config.head_dim
        self.head_dim, self.split = config.head_dim, [d_inner, d_inner + 2 * d_state, heads]
        self.inner = [d_inner, d_state, d_state]
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.in_proj = nn.Linear(config.d_model, sum(self.split), bias=False)
        self.conv = CausalConv(sum(self.inner), config.d_conv)
        self.dt_bias = nn.Parameter(_step_sizes(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.gate_norm = RMSNorm(d_inner, config.norm_eps)
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)
        quieter(self.out_proj, config)

    def forward(self, h: Tensor) -> Tensor:
        z, xbc, dt = self.in_proj(self.norm(h)).split(self.split, dim=-1)
        x, B, C = self.conv(xbc.transpose(1, 2)).transpose(1, 2).split(self.inner, dim=-1)
        x = x.unflatten(-1, (-1, self.head_dim))  # [B, L, heads, head_dim]
        A, D, bias = -torch.exp(self.A_log.float()), self.D.float(), self.dt_bias.float()
        y = ssd_scan(x, dt, A, B[:, :, None], C[:, :, None], D, dt_bias=bias, dt_softplus=True)
        return self._out(y, z)

    def start(self, batch: int) -> list[Tensor]:
        sizes = len(self.A_log), self.head_dim, self.inner[1]
        return [self.conv.start(batch), torch.zeros(batch, *sizes, device=self.A_log.device)]

    def step(self, h: Tensor, state: list[Tensor]) -> Tensor:
        z, xbc, dt = self.in_proj(self.norm(h)).split(self.split, dim=-1)
        x, B, C = self.conv.step(xbc, state[0]).split(self.inner, dim=-1)
        x = x.unflatten(-1, (-1, self.head_dim))  # [B, heads, head_dim]
        A, D, bias = -torch.exp(self.A_log.float()), self.D.float(), self.dt_bias.float()
        y = ssd_step(state[1], x, dt, A, B[:, None], C[:, None], D, dt_bias=bias, dt_softplus=True)
        return self._out(y, z)

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        out: Tensor = self.out_proj(self.gate_norm(y.flatten(-2) * F.silu(z)))
        return out

    def describe(self, prefix: str) -> list[Entry]:
        heads, width = len(self.A_log), self.conv.weight.shape[1]
        sizes = {"n_heads": heads, "head_dim": self.head_dim, "n_groups": 1, "d_state": self.inner[1], "d_conv": width}
        return [{**self.norm.describe(prefix), "type": "mamba2_block", **sizes}]


def _step_sizes(count: int) -> Tensor:
    """What softplus makes log-uniform step sizes in [DT_MIN, DT_MAX]."""
    log_dt = torch.empty(count).uniform_(math.log(DT_MIN), math.log(DT_MAX))
    dt = log_dt.exp().clamp(min=DT_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))
