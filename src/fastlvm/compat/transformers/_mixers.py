"""One token of a Mamba mixer of transformers in one call of `fastlvm.mamba_step`.

The mixers' own way there is some forty small operations on a token, which together take as long as reading the weights.
Whatever is not that plain case goes on to the mixer's own forward, and from there to the functions of `_functions`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlvm.compat._plain import is_only, step_weights
from fastlvm.ops import mamba_step

Norms = Callable[[Any], "dict[str, Any] | None"]


def one_token(original: Callable[..., Tensor], model: str) -> Callable[..., Tensor]:
    """A forward of `model`'s mixer that takes the decoding of a token and leaves the rest to the original one."""
    norms = _NORMS[model]

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden_states.shape[1] == 1:
            out = _step(self, norms, hidden_states, *args, **kwargs)
            if out is not None:
                return out
        return original(self, hidden_states, *args, **kwargs)

    return forward


def _step(
    mixer: Any,
    norms: Norms,
    hidden_states: Tensor,  # [B, 1, M]
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mixer's output [B, 1, M], both states of the cache advanced; None where it is not the plain case."""
    cache = kwargs.get("cache", cache_params)  # as it is called from 5.24 on
    if cache is None or attention_mask is not None or mixer.activation not in ("silu", "swish"):
        return None
    weights = step_weights(mixer, hidden_states)
    if weights is None:
        return None
    states, given = _states(cache, mixer.layer_idx), norms(mixer)
    if states is None or given is None:
        return None
    return mamba_step(hidden_states[:, 0], *states, *weights, **given)[:, None]


def _states(cache: Any, layer: int) -> tuple[Tensor, Tensor] | None:
    """The states of convolution and scan that a token goes on from, if there are any and nothing wants them kept."""
    held = cache.layers[layer]
    if not cache.has_previous_state(layer) or getattr(held, "record_past", False):
        return None
    conv, scan = held.conv_states[0], held.recurrent_states[0]
    return None if conv is None or scan is None else (conv, scan)


def _no_norms(mixer: Any) -> dict[str, Any]:
    return {}


def _weightless_norms(mixer: Any) -> dict[str, Any]:
    ones = torch.ones(max(mixer.time_step_rank, mixer.ssm_state_size))
    rank, size = ones[: mixer.time_step_rank], ones[: mixer.ssm_state_size]
    return {"dt_norm": rank, "B_norm": size, "C_norm": size, "norm_eps": mixer.rms_eps}


def _norms(mixer: Any) -> dict[str, Any] | None:
    norms = {"dt_norm": mixer.dt_layernorm, "B_norm": mixer.b_layernorm, "C_norm": mixer.c_layernorm}
    eps = mixer.dt_layernorm.variance_epsilon
    if not all(is_only(norm, type(mixer.dt_layernorm)) and norm.variance_epsilon == eps for norm in norms.values()):
        return None
    return {**{name: norm.weight for name, norm in norms.items()}, "norm_eps": eps}


_NORMS: dict[str, Norms] = {"mamba": _no_norms, "falcon_mamba": _weightless_norms, "jamba": _norms}
