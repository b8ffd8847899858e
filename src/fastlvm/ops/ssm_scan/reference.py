"""The selective scan in plain PyTorch: the definition of correct.

Equations of Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3, for every
batch and channel, with state h in R^N:

    Δ_t = softplus(delta_t + delta_bias)
    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t       A by zero-order hold, B by its first-order (Euler) form
    y_t = <C_t, h_t> + D u_t
    out = y · silu(z)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlvm.ops import _arrays
from fastlvm.ops._plain import describe, each_sequence, supports

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["describe", "run", "scan", "supports"]


def run(*args: Any) -> tuple[Any, ...]:
    *inputs, _ = args  # the final state comes for nothing
    if _arrays.kind(args[0]) == "mlx":
        from fastlvm.ops.ssm_scan import reference_mlx

        return reference_mlx.scan(*inputs)
    if _arrays.kind(args[0]) == "numpy":
        return _arrays.through_torch(scan, *inputs)
    return scan(*inputs)


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, D, L] in u's dtype and final state [B, D, N]; computes in float32, in float64 for float64."""
    import torch
    import torch.nn.functional as F

    if cu_seqlens is not None:

        def alone(times: slice, sequence: slice | None) -> tuple[Tensor, Tensor]:
            def part(M: Any) -> Any:
                return M if M is None or M.ndim == 2 else M[..., times]

            state = None if initial_state is None or sequence is None else initial_state[sequence]
            return scan(part(u), part(delta), A, part(B), part(C), D, part(z), delta_bias, delta_softplus, state)

        return each_sequence("ssm_scan", cu_seqlens, u.shape[-1], alone)

    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, channels, length = u.shape

    x = u.to(dtype)
    step = delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        step = F.softplus(step, threshold=20.0)
    A = A.to(dtype)
    B = per_channel(B.to(dtype), channels, length)  # [B or 1, D or 1, N, L]
    C = per_channel(C.to(dtype), channels, length)

    if initial_state is None:
        h = torch.zeros(batch, channels, A.shape[1], dtype=dtype, device=u.device)
    else:
        h = initial_state.to(dtype)
    ys = []
    for step_t, B_t, C_t, x_t in zip(*(M.unbind(-1) for M in (step[:, :, None], B, C, x[:, :, None])), strict=True):
        h = torch.exp(step_t * A) * h + step_t * B_t * x_t  # [B, D, N]
        ys.append((h * C_t).sum(-1))
    y = torch.stack(ys, dim=-1) if ys else x.new_zeros(batch, channels, 0)

    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), h.clone() if h is initial_state else h


def per_channel(M: Tensor, channels: int, length: int) -> Tensor:
    """B or C in any of its layouts as [B or 1, D or 1, N, L]."""
    if M.ndim == 2:  # (D, N): constant in time
        return M[None, :, :, None].expand(-1, -1, -1, length)
    if M.ndim == 3:  # (B, N, L): shared by all channels
        return M[:, None]
    return M.repeat_interleave(channels // max(M.shape[1], 1), dim=1)  # (B, G, N, L): a run of D / G channels a group
