"""The causal depthwise convolution in plain PyTorch: the definition of correct.

    out_t = act(bias + Σ_k weight_k x_{t-W+1+k})       k = 0 … W-1, for every batch and channel

where x before time 0 is the initial state, oldest first, or zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlvm.ops import _arrays
from fastlvm.ops._plain import describe, each_sequence, supports

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["conv", "describe", "run", "supports"]


def run(*args: Any) -> tuple[Any, ...]:
    if _arrays.kind(args[0]) == "mlx":
        from fastlvm.ops.causal_conv1d import reference_mlx

        return reference_mlx.conv(*args)
    if _arrays.kind(args[0]) == "numpy":
        return _arrays.through_torch(conv, *args)
    return conv(*args)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, D, L] and final state [B, D, W-1], in x's dtype; computes in float32, in float64 for float64."""
    import torch
    import torch.nn.functional as F

    if cu_seqlens is not None:

        def alone(times: slice, sequence: slice | None) -> tuple[Tensor, Tensor]:
            state = None if initial_state is None or sequence is None else initial_state[sequence]
            return conv(x[..., times], weight, bias, activation, state)

        return each_sequence("causal_conv1d", cu_seqlens, x.shape[-1], alone)

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, channels, length = x.shape
    width = weight.shape[1]

    if initial_state is None:
        initial_state = x.new_zeros(batch, channels, width - 1)
    padded = torch.cat([initial_state.to(dtype), x.to(dtype)], dim=-1)  # [B, D, W-1+L]
    y = torch.zeros(batch, channels, length, dtype=dtype, device=x.device)
    for k in range(width):
        y = y + weight.to(dtype)[:, k, None] * padded[..., k : k + length]
    if bias is not None:
        y = y + bias.to(dtype)[:, None]
    if activation is not None:
        y = F.silu(y)
    return y.to(x.dtype), padded[..., length:].to(x.dtype, copy=True)
