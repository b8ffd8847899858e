"""The norms of mamba_ssm: RMS and layer norm of a residual stream, and the gated RMS norm of Mamba-2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlvm.compat._checks import UnsupportedError, check_shape
from fastlvm.errors import InputError


def wide(x: Tensor) -> Tensor:
    """x as it is computed with: float32, or float64."""
    return x if x.dtype == torch.float64 else x.float()


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight + bias over the last axis, in `dtype` or x's; `centred` takes the mean off."""
    held = wide(x)
    if centred:
        held = held - held.mean(dim=-1, keepdim=True)
    held = held * torch.rsqrt(held.square().mean(dim=-1, keepdim=True) + eps) * weight.to(held.dtype)
    if bias is not None:
        held = held + bias.to(held.dtype)
    return held.to(x.dtype if dtype is None else dtype)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Norm of dropout(x · rowscale) + residual over the last axis, with gradients.

    Args:
        x: [..., d].
        weight, bias: [d].
        residual: [..., d], added before the norm.
        x1, weight1, bias1: None; the parallel norm is not here.
        eps: added to the variance, or to the mean square.
        dropout_p: share of x that is dropped.
        rowscale: [...], a factor for every row of x.
        prenorm: also return what was normalised.
        residual_in_fp32: in float32, where there is no residual to tell the dtype.
        is_rms_norm: RMS norm instead of layer norm.
        return_dropout_mask: False; masks are not kept.

    Returns:
        [..., d] in x's dtype; with `prenorm` a pair of it and the sum, in the dtype of `residual`, else x's.

    Raises:
        InputError: an argument that is not supported (a NotImplementedError, too), or a shape that does not fit.
    """
    op = "rms_norm_fn" if is_rms_norm else "layer_norm_fn"
    for name, value in (("x1", x1), ("weight1", weight1), ("bias1", bias1)):
        if value is not None:
            raise UnsupportedError(f"{op}: {name} is given; fastlvm has no parallel norm, call {op} for each weight")
    if return_dropout_mask:
        raise UnsupportedError(f"{op}: return_dropout_mask is set; fastlvm keeps no masks, leave it False")
    check_shape(op, "weight", weight, "(d,)", tuple(x.shape[-1:]))
    check_shape(op, "bias", bias, "(d,)", tuple(x.shape[-1:]))
    check_shape(op, "residual", residual, "that of x", tuple(x.shape))
    held = wide(x)
    if rowscale is not None:
        held = held * rowscale.to(held.dtype)[..., None]
    if dropout_p > 0:
        held = F.dropout(held, dropout_p)
    if residual is not None:
        held = held + residual
    out = normalize(held, weight, bias, eps, centred=not is_rms_norm, dtype=x.dtype)
    if not prenorm:
        return out
    plain = torch.promote_types(torch.float32, x.dtype) if residual_in_fp32 else x.dtype
    return out, held.to(plain if residual is None else residual.dtype)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """`layer_norm_fn` with `is_rms_norm`."""
    rest = (eps, dropout_p, rowscale, prenorm, residual_in_fp32, True, return_dropout_mask)
    return layer_norm_fn(x, weight, bias, residual, x1, weight1, bias1, *rest)


class RMSNorm(nn.Module):
    """RMS norm over the last axis, of the sum with a residual if there is one; `weight` [hidden_size]."""

    bias: None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        dropped = self.drop.p if self.drop is not None and self.training else 0.0
        held = (self.weight, self.bias, residual, None, None, None)
        return rms_norm_fn(x, *held, self.eps, dropped, None, prenorm, residual_in_fp32)


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """norm(x) · silu(z), or norm(x · silu(z)) unless `norm_before_gate`, with gradients.

    Args:
        x, z: [..., d].
        weight, bias: [d].
        eps: added to the variance, or to the mean square.
        group_size: channels that are normalised together, which divide d; all of them when None.
        norm_before_gate: gate the normalised x instead of x.
        is_rms_norm: RMS norm instead of layer norm.

    Returns:
        [..., d] in x's dtype.

    Raises:
        InputError: a shape or the group size does not fit.
    """
    op, size = "rmsnorm_fn" if is_rms_norm else "layernorm_fn", x.shape[-1]
    check_shape(op, "weight", weight, "(d,)", (size,))
    check_shape(op, "bias", bias, "(d,)", (size,))
    check_shape(op, "z", z, "that of x", tuple(x.shape))
    group = size if group_size is None else group_size
    if group < 1 or size % group:
        raise InputError(f"{op}: group_size is {group_size}; wants a number that divides the {size} channels")
    held = wide(x)
    gate = None if z is None else F.silu(wide(z))
    if gate is not None and not norm_before_gate:
        held = held * gate
    groups = (size // group, group)
    bias_of_groups = None if bias is None else bias.view(groups)
    held = normalize(held.unflatten(-1, groups), weight.view(groups), bias_of_groups, eps, centred=not is_rms_norm)
    held = held.flatten(-2)
    if gate is not None and norm_before_gate:
        held = held * gate
    return held.to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """`layernorm_fn` with `is_rms_norm`."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class LayerNormGated(nn.Module):
    """The gated layer norm, `LayerNorm` of mamba_ssm.ops.triton.layernorm_gated; `weight` and `bias` [hidden_size]."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


class RMSNormGated(nn.Module):
    """The gated RMS norm, `RMSNorm` of mamba_ssm.ops.triton.layernorm_gated; `weight` [hidden_size]."""

    bias: None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rmsnorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)
