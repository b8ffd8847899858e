"""fastlvm's stand-ins for methods and functions of mlx-lm's models, with the same names and arguments.

Each is made from what it stands for, and hands the calls to that which fastlvm's kernels do not take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from fastlvm.ops import _mlx, causal_conv1d, ssd_scan, ssm_scan

Function = Callable[..., Any]


def _mamba_process_sequence(original: Function) -> Function:
    def normalised(self: Any, *parts: Any) -> tuple[Any, ...]:
        if not self.use_bcdt_rms:
            return parts
        eps = self.args.mixer_rms_eps
        return tuple(mx.fast.rms_norm(x, weight=None, eps=eps) for x in parts)

    return _process_sequence(normalised)


def _jamba_process_sequence(original: Function) -> Function:
    def normalised(self: Any, delta: Any, B: Any, C: Any) -> tuple[Any, ...]:
        return self.dt_layernorm(delta), self.b_layernorm(B), self.c_layernorm(C)

    return _process_sequence(normalised)


def _process_sequence(normalised: Function) -> Function:
    """The mixer of Mamba-1; `normalised(self, delta, B, C)` is what the models do to these."""

    def run(self: Any, x: Any, conv_state: Any, state: Any) -> Any:  # [B, L, d_model], [B, W-1, D], [B, D, N]
        x, z = self.in_proj(x).split(indices_or_sections=2, axis=-1)  # [B, L, D]
        x, conv_state = _convolved(self.conv1d, x, conv_state)
        ends = [self.time_step_rank, self.time_step_rank + self.ssm_state_size]
        delta, B, C = normalised(self, *mx.split(self.x_proj(x), ends, axis=-1))
        arrays = map(_swapped, (x, self.dt_proj(delta), B, C, z))
        x, delta, B, C, z = arrays
        A = -mx.exp(self.A_log)
        y, state = ssm_scan(
            x, delta, A, B, C, self.D, z, delta_softplus=True, initial_state=state, return_final_state=True
        )
        return self.out_proj(_swapped(y)), (conv_state, state)

    return run


def _conv(original: Function) -> Function:
    def run(self: Any, conv_input: Any, cache: Any, mask: Any) -> Any:  # [B, L, D], mask [B, L]
        ragged = cache is not None and cache.lengths is not None
        if ragged or not _mlx.supports(conv_input)[0]:
            return original(self, conv_input, cache, mask)
        if mask is not None:
            conv_input = mx.where(mask[..., None], conv_input, 0)
        out, state = _convolved(self.conv1d, conv_input, None if cache is None else cache[0])
        if cache is not None:
            cache[0] = state
        return out

    return run


def _ssm_update(original: Function) -> Function:
    from mlx_lm.models.ssm import compute_dt

    def run(
        hidden_states: Any,  # [B, L, H, P]
        A_log: Any,  # [H]
        B: Any,  # [B, L, G, N]
        C: Any,
        D: Any,  # [H]
        dt: Any,  # [B, L, H]
        dt_bias: Any,  # [H]
        state: Any = None,  # [B, H, P, N]
        time_step_limit: tuple[float, float] = (0.001, 100.0),
        mask: Any = None,  # [B, L]
        lengths: Any = None,  # [B]
    ) -> Any:
        if (lengths is not None and mask is None) or not _mlx.supports(hidden_states)[0]:
            return original(hidden_states, A_log, B, C, D, dt, dt_bias, state, time_step_limit, mask, lengths)
        dt = compute_dt(dt, dt_bias, time_step_limit)
        if mask is not None:  # a step of no time keeps the state; the mask knows the lengths
            dt = mx.where(mask[..., None], dt, 0)
        return ssd_scan(hidden_states, dt, -mx.exp(A_log), B, C, D, initial_state=state, return_final_state=True)

    return run


REPLACEMENTS: dict[str, Callable[[Function], Function]] = {
    "mamba._process_sequence": _mamba_process_sequence,
    "jamba._process_sequence": _jamba_process_sequence,
    "_conv": _conv,
    "ssm_update": _ssm_update,
}


def _convolved(conv1d: Any, x: Any, state: Any) -> tuple[Any, Any]:
    """silu of the convolution of x [B, L, D] after state [B, W-1, D] or None, and the state after it."""
    before = None if state is None else _swapped(state)
    weight, bias = conv1d.weight[..., 0], conv1d.get("bias")
    out, after = causal_conv1d(_swapped(x), weight, bias, "silu", initial_state=before, return_final_state=True)
    return _swapped(out), _swapped(after)


def _swapped(x: Any) -> Any:
    """Channel-last as channel-first, or back."""
    return mx.swapaxes(x, 1, 2)
