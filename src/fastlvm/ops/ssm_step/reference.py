"""One token of the selective scan in plain PyTorch: the definition of correct.

For every row and channel, with its state h in R^N:

    Δ = softplus(delta + delta_bias)
    h = exp(Δ A) h + Δ B x                       in place
    out = (<C, h> + D x) · silu(z)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlvm.ops import _arrays, _step
from fastlvm.ops._plain import describe, supports

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["describe", "run", "step", "supports"]


def run(state: Any, *args: Any) -> Any:
    _step.check_values("ssm_step", state, args[-1])
    if _arrays.kind(state) == "mlx":
        from fastlvm.ops.ssm_step import reference_mlx

        return reference_mlx.run(state, *args)
    if _arrays.kind(state) == "numpy":
        return _step.through_torch(step, state, *args)
    return step(state, *args)


def step(
    state: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    state_indices: Tensor | None,
) -> Tensor:
    """Output [b, D] in x's dtype; computes in float32, in float64 for float64."""
    import torch
    import torch.nn.functional as F

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels = x.shape[1]
    u = x.to(dtype)
    size = delta.to(dtype)
    if delta_bias is not None:
        size = size + delta_bias.to(dtype)
    if delta_softplus:
        size = F.softplus(size, threshold=20.0)
    B = _per_channel(B.to(dtype), channels)  # [b, D or 1, N]
    C = _per_channel(C.to(dtype), channels)

    h = _step.take(state, state_indices).to(dtype)  # [b, D, N]
    h = torch.exp(size[..., None] * A.to(dtype)) * h + size[..., None] * B * u[..., None]
    y = (h * C).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    _step.put(state, state_indices, h)
    return _step.blank(y, state_indices).to(x.dtype)


def _per_channel(M: Tensor, channels: int) -> Tensor:
    """B or C as [b, D or 1, N]."""
    if M.ndim == 2:
        return M[:, None]
    return M.repeat_interleave(channels // max(M.shape[1], 1), dim=1)  # (b, G, N): a run of D / G channels a group
