"""One token of Mamba-2 in plain PyTorch: the definition of correct.

For every row and head, with its state H in R^{p×n}:

    dt = softplus(dt + dt_bias)
    H = exp(dt A) H + dt x Bᵀ                    in place
    out = (H C + D x) · silu(z)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlvm.ops import _arrays, _step
from fastlvm.ops._plain import describe, supports

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["describe", "run", "step", "supports"]


def run(state: Any, *args: Any) -> Any:
    _step.check_values("ssd_step", state, args[-1])
    if _arrays.kind(state) == "mlx":
        from fastlvm.ops.ssd_step import reference_mlx

        return reference_mlx.run(state, *args)
    if _arrays.kind(state) == "numpy":
        return _step.through_torch(step, state, *args)
    return step(state, *args)


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_indices: Tensor | None,
) -> Tensor:
    """Output [b, h, p] in x's dtype; computes in float32, in float64 for float64."""
    import torch
    import torch.nn.functional as F

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    u = x.to(dtype)
    size = dt.to(dtype)
    if dt_bias is not None:
        size = size + dt_bias.to(dtype)
    if dt_softplus:
        size = F.softplus(size, threshold=20.0)
    heads_a_group = x.shape[1] // B.shape[1]
    B, C = (M.to(dtype).repeat_interleave(heads_a_group, dim=1) for M in (B, C))  # [b, h, n]

    H = _step.take(state, state_indices).to(dtype)  # [b, h, p, n]
    decay = torch.exp(size * A.to(dtype))[..., None, None]
    H = decay * H + (size[..., None] * u)[..., None] * B[:, :, None]
    y = (H * C[:, :, None]).sum(-1)
    if D is not None:
        D = D.to(dtype)
        y = y + (D if D.ndim == 2 else D[:, None]) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    _step.put(state, state_indices, H)
    return _step.blank(y, state_indices).to(x.dtype)
