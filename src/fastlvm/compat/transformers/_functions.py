"""fastlvm's stand-ins for the functions of transformers' modeling modules, under the same names and arguments.

Each is made from the function it stands for, and hands the calls to that which fastlvm's ops do not take: packed
sequences, activations other than SiLU, a token with a gradient, float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlvm.ops import causal_conv1d, causal_conv1d_step, ssd_scan, ssd_step, ssm_scan, ssm_step

Function = Callable[..., Any]

_ACTIVATIONS = (None, "silu", "swish")
_ANY_DT = (0.0, math.inf)


def _causal_conv1d_fn(original: Function) -> Function:
    def run(
        hidden_states: Tensor,  # [B, D, L]
        weight: Tensor,  # [D, W]
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if activation not in _ACTIVATIONS or _packed(kwargs):
            out: Tensor = original(hidden_states, weight, bias, activation=activation, **kwargs)
        else:
            out = causal_conv1d(hidden_states, weight, bias, activation)
        return out

    return run


def _causal_conv1d_update(original: Function) -> Function:
    def run(
        hidden_states: Tensor,  # [B, D, 1]
        conv_state: Tensor,  # [B, D, W], written
        weight: Tensor,  # [D, W]
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        one_token = hidden_states.shape[-1] == 1
        if activation not in _ACTIVATIONS or not one_token or _needs_grad(hidden_states, conv_state, weight, bias):
            out: Tensor = original(hidden_states, conv_state, weight, bias, activation=activation)
        else:
            out = causal_conv1d_step(hidden_states[..., 0], conv_state, weight, bias, activation).unsqueeze(-1)
        return out

    return run


def _no_fused_form(original: Function) -> Function:
    """The convolution, the scan and the projections in one call; the mixer makes them one by one where that is None."""

    def run(*args: Any, **kwargs: Any) -> None:
        return None

    return run


def _mamba_selective_scan(original: Function) -> Function:
    def run(
        hidden_states: Tensor,  # [B, D, L]
        dt: Tensor,  # [B, D, L]
        A: Tensor,  # [D, N]
        B: Tensor,  # [B, N, L]
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        if hidden_states.dtype == torch.float64 or _packed(kwargs):
            rest = D, z, delta_bias, delta_softplus, return_last_state
            return original(hidden_states, dt, A, B, C, *rest, **kwargs)
        return ssm_scan(
            hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_final_state=return_last_state
        )

    return run


def _mamba_selective_state_update(original: Function) -> Function:
    def run(
        state: Tensor,  # [B, D, N], written
        hidden_states: Tensor,  # [B, D]
        dt: Tensor,  # [B, D]
        A: Tensor,  # [D, N]
        B: Tensor,  # [B, N]
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        arrays = state, hidden_states, dt, A, B, C, D, dt_bias, z
        if hidden_states.dtype == torch.float64 or _needs_grad(*arrays):
            out: Tensor = original(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z, **kwargs)
        else:
            out = ssm_step(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)
        return out

    return run


def _mamba2_chunk_scan(original: Function) -> Function:
    def run(
        hidden_states: Tensor,  # [B, L, H, P]
        dt: Tensor,  # [B, L, H]
        A: Tensor,  # [H]
        B: Tensor,  # [B, L, G, N]
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = _ANY_DT,
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        if hidden_states.dtype == torch.float64 or _packed(kwargs):
            rest = D, dt_bias, initial_states, dt_softplus, dt_limit, return_final_states
            return original(hidden_states, dt, A, B, C, chunk_size, *rest, **kwargs)
        if not dt_softplus or tuple(dt_limit) != _ANY_DT:
            dt, dt_bias, dt_softplus = _limited(dt, dt_bias, dt_softplus, dt_limit), None, False
        if initial_states is not None and torch.is_grad_enabled():
            initial_states = initial_states.clone()  # the mixer writes the final state over the one backward reads
        return ssd_scan(
            hidden_states,
            dt,
            A,
            B,
            C,
            D,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            initial_state=initial_states,
            return_final_state=return_final_states,
        )

    return run


def _mamba2_selective_state_update(original: Function) -> Function:
    def run(
        state: Tensor,  # [B, H, P, N], written
        hidden_states: Tensor,  # [B, H, P]
        dt: Tensor,  # [B, H, P], [B, H] expanded
        A: Tensor,  # [H, P, N], [H] expanded
        B: Tensor,  # [B, G, N]
        C: Tensor,
        D: Tensor | None = None,  # [H, P]
        dt_bias: Tensor | None = None,  # [H, P], [H] expanded
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        arrays = state, hidden_states, dt, A, B, C, D, dt_bias, z
        one_a_head = _expanded(dt, 2) and _expanded(A, 1, 2) and (dt_bias is None or _expanded(dt_bias, 1))
        if hidden_states.dtype == torch.float64 or not one_a_head or _needs_grad(*arrays):
            out: Tensor = original(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z, **kwargs)
        else:
            bias = None if dt_bias is None else dt_bias[:, 0]
            out = ssd_step(state, hidden_states, dt[..., 0], A[:, 0, 0], B, C, D, z, bias, dt_softplus)
        return out

    return run


REPLACEMENTS: dict[str, Callable[[Function], Function]] = {
    "causal_conv1d_fn": _causal_conv1d_fn,
    "causal_conv1d_update": _causal_conv1d_update,
    "mamba_inner_fn": _no_fused_form,
    "mamba_selective_scan": _mamba_selective_scan,
    "mamba_selective_state_update": _mamba_selective_state_update,
    "mamba2_split_conv1d_scan_combined": _no_fused_form,
    "mamba2_chunk_scan": _mamba2_chunk_scan,
    "mamba2_selective_state_update": _mamba2_selective_state_update,
}


def _packed(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("cu_seqlens") is not None or kwargs.get("seq_idx") is not None


def _needs_grad(*arrays: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arrays)


def _expanded(x: Tensor, *axes: int) -> bool:
    return all(x.shape[axis] == 1 or x.stride(axis) == 0 for axis in axes)


def _limited(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    """Step sizes [B, L, H] in float32 as transformers limits them: after the bias and softplus."""
    dt = dt.float() if bias is None else dt.float() + bias.float()
    return (F.softplus(dt) if softplus else dt).clamp(*limit)
