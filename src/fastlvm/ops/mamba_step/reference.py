"""One token of a Mamba block in plain PyTorch: the definition of correct.

x, z = in_proj · input
x = silu(convolution of conv_state and x)                            in place
dt, B, C = x_proj · x, each over its root mean square, times its norm where there is one
h = exp(Δ A) h + Δ B x,  Δ = softplus(dt_proj · dt + dt_bias),  A = -exp(A_log)   in place
out = out_proj · ((<C, h> + D x) · silu(z))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlvm.ops import _arrays, _plain, _step
from fastlvm.ops._plain import describe
from fastlvm.ops.causal_conv1d_step import reference as conv
from fastlvm.ops.ssm_step import reference as ssm

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["describe", "run", "step", "supports"]


def supports(x: Any, *args: Any) -> tuple[bool, str]:
    if _arrays.kind(x) == "mlx":
        return False, "arrays are mlx's; use causal_conv1d_step and ssm_step between mlx's own products"
    return _plain.supports(x)


def run(x: Any, conv_state: Any, ssm_state: Any, *args: Any) -> Any:
    for name, state in (("conv_state", conv_state), ("ssm_state", ssm_state)):
        _step.check_values("mamba_step", state, None, name)
    if _arrays.kind(x) == "torch":
        return step(x, conv_state, ssm_state, *args)

    def all_three(*args: Any) -> tuple[Any, ...]:
        return step(*args), args[1], args[2]

    out, conv_state[...], ssm_state[...] = _arrays.through_torch(all_three, x, conv_state, ssm_state, *args)
    return out


def step(
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    in_proj: Tensor,
    conv1d: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    A_log: Tensor,
    out_proj: Tensor,
    D: Tensor | None,
    in_proj_bias: Tensor | None,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    out_proj_bias: Tensor | None,
    dt_norm: Tensor | None,
    B_norm: Tensor | None,
    C_norm: Tensor | None,
    norm_eps: float,
) -> Tensor:
    """Output [b, M] in x's dtype; computes in float32, in float64 for float64."""
    import torch

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rank, size = dt_proj.shape[1], A_log.shape[1]

    def product(matrix: Tensor, vectors: Tensor, bias: Tensor | None = None) -> Tensor:
        with _plain.without_autocast(x):
            out = vectors.to(dtype) @ matrix.to(dtype).T
        return out if bias is None else out + bias.to(dtype)

    def normalised(x: Tensor, norm: Tensor | None) -> Tensor:
        return x if norm is None else x * (x.square().mean(-1, keepdim=True) + norm_eps).rsqrt() * norm.to(dtype)

    u, z = product(in_proj, x, in_proj_bias).tensor_split(2, dim=1)  # [b, D]
    u = conv.step(u, conv_state, conv1d, conv1d_bias, "silu", None)
    dt, B, C = product(x_proj, u).split([rank, size, size], dim=1)
    dt, B, C = normalised(dt, dt_norm), normalised(B, B_norm), normalised(C, C_norm)
    delta, A = product(dt_proj, dt), -A_log.to(dtype).exp()
    y = ssm.step(ssm_state, u, delta, A, B, C, D, z, dt_bias, True, None)
    return product(out_proj, y, out_proj_bias).to(x.dtype)
