"""Norm, mixer and residual connection as mamba_ssm stacks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlvm.compat.mamba_ssm.norms import RMSNorm, layer_norm_fn
from fastlvm.errors import InputError


def add_norm(
    norm: Any, hidden_states: Tensor, residual: Tensor | None, fused: bool, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """The norm of the sum of `hidden_states` and `residual`, and the sum."""
    if fused:
        options = {"eps": norm.eps, "is_rms_norm": isinstance(norm, RMSNorm)}
        options |= {"prenorm": True, "residual_in_fp32": residual_in_fp32}
        both: tuple[Tensor, Tensor] = layer_norm_fn(hidden_states, norm.weight, norm.bias, residual, **options)
        return both
    total = hidden_states if residual is None else hidden_states + residual
    normed = norm(total.to(norm.weight.dtype))
    return normed, total.to(torch.promote_types(total.dtype, torch.float32)) if residual_in_fp32 else total


class Block(nn.Module):
    """Add, norm, mix, and with an MLP once more; the sum and what is to be added to it are handed on apart.

    Args:
        dim: channels, which `mixer_cls`, `mlp_cls` and `norm_cls` are called with.
        mixer_cls: makes the mixer, such as a partial of `Mamba`.
        mlp_cls: makes the MLP; `nn.Identity` for none.
        norm_cls: makes the norms: `nn.LayerNorm` or `RMSNorm`.
        fused_add_norm: norm the sum in float32 instead of in the weights' dtype.
        residual_in_fp32: keep the sum in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.layer_idx: int | None = None  # for whoever stacks blocks
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, (nn.LayerNorm, RMSNorm)):
            kind = type(self.norm).__name__
            raise InputError(f"Block: norm_cls makes a {kind}; wants nn.LayerNorm or RMSNorm with fused_add_norm")

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None, **mixer_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What the last branch made [B, L, dim] and the sum before it, None at first → the same after this block."""
        options = {"fused": self.fused_add_norm, "residual_in_fp32": self.residual_in_fp32}
        hidden_states, residual = add_norm(self.norm, hidden_states, residual, **options)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = add_norm(self.norm2, hidden_states, residual, **options)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The mixer's states before the first token."""
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
