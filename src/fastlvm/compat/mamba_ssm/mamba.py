"""The Mamba block of mamba_ssm, parameter for parameter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlvm.compat._plain import step_weights
from fastlvm.compat.causal_conv1d import causal_conv1d_update
from fastlvm.compat.mamba_ssm import cache
from fastlvm.compat.mamba_ssm.selective_scan import selective_scan_fn
from fastlvm.compat.mamba_ssm.state_update import selective_state_update
from fastlvm.errors import InputError
from fastlvm.ops import causal_conv1d, mamba_step


def step_sizes(count: int, least: float, most: float, floor: float, **factory: Any) -> Tensor:
    """What softplus makes log-uniform step sizes in [least, most], at least `floor`."""
    dt = torch.exp(torch.rand(count, **factory) * (math.log(most) - math.log(least)) + math.log(least))
    dt = dt.clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def keep_last(state: Tensor, x: Tensor) -> None:
    """Write the last inputs of x [B, D, L] to `state` [B, D, W], zeros before the first."""
    with torch.no_grad():
        state.copy_(F.pad(x, (state.shape[2] - x.shape[2], 0)))


class Mamba(nn.Module):
    """Selective state-space block (Gu and Dao, "Mamba", 2023), without norm and residual connection.

    Arguments, parameters and their names are those of `mamba_ssm.Mamba`, so that its checkpoints load. `use_fast_path`
    is of no effect. `forward` takes and gives [B, L, d_model].
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = int(dt_rank) if dt_rank != "auto" else math.ceil(d_model / 16)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.activation = "silu"
        self.act = nn.SiLU()

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **factory
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory)
        self._start_dt(dt_init, self.dt_rank**-0.5 * dt_scale)
        with torch.no_grad():
            self.dt_proj.bias.copy_(step_sizes(self.d_inner, dt_min, dt_max, dt_init_floor, **factory))
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]

        states = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(states.log().repeat(self.d_inner, 1))  # [d_inner, d_state], float32 like D
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def _start_dt(self, kind: str, deviation: float) -> None:
        if kind == "constant":
            nn.init.constant_(self.dt_proj.weight, deviation)
        elif kind == "random":
            nn.init.uniform_(self.dt_proj.weight, -deviation, deviation)
        else:
            raise InputError(f'Mamba: dt_init is {kind!r}; wants "random" or "constant"')

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """[B, L, d_model] → the same; with `inference_params` from and into the states it holds.

        A first call takes a whole prompt; those with `seqlen_offset` above 0 take one token.
        """
        conv_state, ssm_state = None, None
        if inference_params is not None:
            conv_state, ssm_state = self._get_states_from_cache(inference_params, len(hidden_states))
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, conv_state, ssm_state)[0]
        xz = self.in_proj(hidden_states).transpose(1, 2)  # [B, 2 d_inner, L], a view
        x, z = xz.chunk(2, dim=1)
        if conv_state is not None:
            keep_last(conv_state, x)
        x = causal_conv1d(x, self.conv1d.weight[:, 0], self.conv1d.bias, self.activation)
        delta, B, C = self._scan_inputs(x.transpose(1, 2))
        delta, B, C = (M.transpose(1, 2) for M in (delta, B, C))
        A, D, bias = self._scan_weights()
        y = selective_scan_fn(x, delta, A, B, C, D, z, bias, True, ssm_state is not None)
        if ssm_state is not None:
            y, last_state = y
            with torch.no_grad():
                ssm_state.copy_(last_state)
        out: Tensor = self.out_proj(y.transpose(1, 2))
        return out

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output [B, 1, d_model] for one token [B, 1, d_model], and the states, which are written in place."""
        if hidden_states.shape[1] != 1:
            raise InputError(f"Mamba: step got {hidden_states.shape[1]} tokens; wants (B, 1, d_model), one at a time")
        weights = step_weights(self, hidden_states)
        if weights is not None:
            out = mamba_step(hidden_states[:, 0], conv_state, ssm_state, *weights)
            return out[:, None], conv_state, ssm_state
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, dim=-1)  # [B, d_inner] each
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, self.activation)
        delta, B, C = self._scan_inputs(x)
        A, D, bias = self._scan_weights()
        y = selective_state_update(ssm_state, x, delta, A, B, C, D, z, bias, dt_softplus=True)
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def _scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """delta without its bias, which enters in the scan, B and C, channel-last as x is."""
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return F.linear(dt, self.dt_proj.weight), B, C

    def _scan_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, D and the bias of delta, in float32 unless the model is in float64."""
        dtype = torch.promote_types(self.in_proj.weight.dtype, torch.float32)
        return -torch.exp(self.A_log.to(dtype)), self.D.to(dtype), self.dt_proj.bias.to(dtype)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> cache.States:
        """States before the first token, zeros: of the convolution [B, d_inner, d_conv], of the scan [.., d_state]."""
        conv, ssm = self.conv1d.weight, self.dt_proj.weight
        shape = (batch_size, self.d_inner)
        return (
            torch.zeros(*shape, self.d_conv, device=conv.device, dtype=conv.dtype if dtype is None else dtype),
            torch.zeros(*shape, self.d_state, device=ssm.device, dtype=ssm.dtype if dtype is None else dtype),
        )

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> cache.States:
        start = lambda: self.allocate_inference_cache(batch_size, 0)  # noqa: E731
        return cache.states(inference_params, self.layer_idx, start, initialize_states)
