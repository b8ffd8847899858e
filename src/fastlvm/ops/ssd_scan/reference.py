"""The scan of Mamba-2 in plain PyTorch: the definition of correct.

Equations of Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
Space Duality" (2024), section 5, for every batch and head, with state H in R^{P×N} and a scalar A:

    dt_t = softplus(dt_t + dt_bias)
    H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_tᵀ
    y_t = H_t C_t + D x_t
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
        from fastlvm.ops.ssd_scan import reference_mlx

        return reference_mlx.scan(*inputs)
    if _arrays.kind(args[0]) == "numpy":
        return _arrays.through_torch(scan, *inputs)
    return scan(*inputs)


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, L, H, P] in x's dtype and final state [B, H, P, N]; computes in float32, in float64 for float64."""
    import torch
    import torch.nn.functional as F

    if cu_seqlens is not None:

        def alone(times: slice, sequence: slice | None) -> tuple[Tensor, Tensor]:
            gate = None if z is None else z[:, times]
            state = None if initial_state is None or sequence is None else initial_state[sequence]
            part = (x[:, times], dt[:, times], A, B[:, times], C[:, times])
            out, last = scan(*part, D, gate, dt_bias, dt_softplus, state)
            return out.movedim(1, -1), last

        out, states = each_sequence("ssd_scan", cu_seqlens, x.shape[1], alone)
        return out.movedim(-1, 1), states

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, _, heads, dim = x.shape
    groups, state = B.shape[2:]

    u = x.to(dtype)
    step = dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step, threshold=20.0)
    decay = torch.exp(step * A.to(dtype))  # [B, L, H]
    B, C = (M.to(dtype).repeat_interleave(heads // groups, dim=2) for M in (B, C))  # [B, L, H, N]

    if initial_state is None:
        H = torch.zeros(batch, heads, dim, state, dtype=dtype, device=x.device)
    else:
        H = initial_state.to(dtype)
    ys = []
    for decay_t, input_t, B_t, C_t in zip(*(M.unbind(1) for M in (decay, step[..., None] * u, B, C)), strict=True):
        H = decay_t[..., None, None] * H + input_t[..., None] * B_t[:, :, None]  # [B, H, P, N]
        ys.append((H * C_t[:, :, None]).sum(-1))
    y = torch.stack(ys, dim=1) if ys else torch.zeros_like(u)

    if D is not None:
        y = y + (D.to(dtype)[:, None] if D.ndim == 1 else D.to(dtype)) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), H.clone() if H is initial_state else H
