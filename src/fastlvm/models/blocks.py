"""Building blocks shared by the model families. Every tensor here is channel-last unless a comment says otherwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlvm.models.config import ModelConfig
from fastlvm.ops import causal_conv1d, ssm_scan

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in float32 at least."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


class CausalConv(nn.Module):
    """Weights of a depthwise causal convolution; `forward` takes and gives channel-first [B, D, L], SiLU included."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)  # nn.Conv1d's own start for one input channel per group
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return causal_conv1d(x, self.weight, self.bias, activation="silu")


class MambaBlock(nn.Module):
    """Pre-norm selective state-space block (Gu & Dao 2023), without the residual connection around it.

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
            # softplus(bias) is log-uniform in [DT_MIN, DT_MAX]
            log_dt = torch.empty(d_inner).uniform_(math.log(DT_MIN), math.log(DT_MAX))
            dt = log_dt.exp().clamp(min=DT_FLOOR)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            self.out_proj.weight.div_(math.sqrt(config.n_layers))  # keeps the residual stream's variance

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
        return self.out_proj(y.transpose(1, 2))
