"""The selective scan and the fused Mamba block of mamba_ssm."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastlvm.compat._checks import refuse_complex
from fastlvm.compat.mamba_ssm.norms import normalize
from fastlvm.errors import InputError
from fastlvm.ops import causal_conv1d, ssm_scan


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """Run the selective scan, with gradients; unlike the original's, the last state has one too.

    Args:
        u, delta, z: [B, D, L].
        A: [D, N], real.
        B, C: [D, N], [B, N, L] or [B, G, N, L].
        D, delta_bias: [D].
        delta_softplus: take softplus of delta, linear above 20.
        return_last_state: also return the state after the last step.

    Returns:
        [B, D, L] in u's dtype, or a pair of it and the last state [B, D, N] in float32 (float64 for float64).

    Raises:
        InputError: A, B or C is complex (a NotImplementedError, too).
        TypeError, ValueError: as `fastlvm.ssm_scan`.
    """
    refuse_complex("selective_scan_fn", A=A, B=B, C=C)
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, "auto")


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """`selective_scan_fn` in plain PyTorch, step by step."""
    refuse_complex("selective_scan_ref", A=A, B=B, C=C)
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, "reference")


def _scan(*args: Any) -> Any:
    *arrays, delta_softplus, return_last_state, backend = args
    flags: dict[str, Any] = {"delta_softplus": bool(delta_softplus), "return_final_state": bool(return_last_state)}
    return ssm_scan(*arrays, **flags, backend=backend)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """What a Mamba block does between its two projections and the second of them, with gradients for every tensor.

    Args:
        xz: [b, 2 d_inner, L].
        conv1d_weight: [d_inner, 1, W]; `conv1d_bias` [d_inner].
        x_proj_weight: [R + 2 N, d_inner]; N or 2 N rows fewer where B or C are given.
        delta_proj_weight: [d_inner, R].
        out_proj_weight: [d_model, d_inner]; `out_proj_bias` [d_model].
        A: [d_inner, N], real.
        B, C: as `selective_scan_fn` takes them, or None: from the input.
        D, delta_bias: [d_inner].
        B_proj_bias, C_proj_bias: [N], added to a B and C from the input.
        delta_softplus: take softplus of delta, linear above 20.
        checkpoint_lvl: 0 or 1. What is kept for the backward is the same.
        b_rms_weight, c_rms_weight: [N], of an RMS norm of B and C.
        dt_rms_weight: [d_inner], of an RMS norm of delta after its projection and before its bias.
        b_c_dt_rms_eps: added to the mean square in those.

    Returns:
        [b, L, d_model].

    Raises:
        InputError: another level, a complex A, B or C (a NotImplementedError, too), or a norm of a constant B or C.
        TypeError, ValueError: as `fastlvm.causal_conv1d` and `fastlvm.ssm_scan`.
    """
    if checkpoint_lvl not in (0, 1):
        raise InputError(f"mamba_inner_fn: checkpoint_lvl is {checkpoint_lvl!r}; wants 0 or 1")
    refuse_complex("mamba_inner_fn", A=A, B=B, C=C)
    x, z, delta, B, C = _inputs(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias, "auto"
    )
    if b_rms_weight is not None:
        B = _norm("b_rms_weight", B, b_rms_weight, b_c_dt_rms_eps)
    if c_rms_weight is not None:
        C = _norm("c_rms_weight", C, c_rms_weight, b_c_dt_rms_eps)
    if dt_rms_weight is not None:
        delta = _norm("dt_rms_weight", delta, dt_rms_weight, b_c_dt_rms_eps)
    y = ssm_scan(x, delta, A, B, C, D, z, delta_bias, bool(delta_softplus))
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` without norms, in plain PyTorch. Unlike the original's, it heeds `delta_softplus`."""
    refuse_complex("mamba_inner_ref", A=A, B=B, C=C)
    x, z, delta, B, C = _inputs(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias, "reference"
    )
    y = ssm_scan(x, delta, A, B, C, D, z, delta_bias, bool(delta_softplus), backend="reference")
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _inputs(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, z and delta [b, d_inner, L], and B and C as given or [b, N, L]."""
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d(x, conv1d_weight[:, 0], conv1d_bias, "silu", backend=backend)
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    parts = F.linear(x.transpose(1, 2), x_proj_weight)  # [b, L, R | N | N]
    delta = F.linear(parts[..., :rank], delta_proj_weight).transpose(1, 2)
    if B is None:
        B = _biased(parts[..., rank : rank + states], B_proj_bias).transpose(1, 2)
    if C is None:
        C = _biased(parts[..., parts.shape[-1] - states :], C_proj_bias).transpose(1, 2)
    return x, z, delta, B, C


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)


def _norm(name: str, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of x [..., channels, L] over its channels."""
    if x.ndim < 3:
        raise InputError(f"mamba_inner_fn: {name} goes with what depends on time; got a constant of {tuple(x.shape)}")
    return normalize(x.transpose(-1, -2), weight, None, eps).transpose(-1, -2)
