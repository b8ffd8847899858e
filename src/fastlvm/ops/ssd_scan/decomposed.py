"""The scan of Mamba-2 in operators of torch alone, of any length that has a bound: see `fastlvm.ops.decompositions`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlvm.ops import _autograd, _states


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
    cu_seqlens: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """What `fastlvm::ssd_scan` returns; memory [B, L, H, P, N]."""
    dtype = _autograd.state_dtype(x)
    u, step = x.to(dtype), dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step, threshold=20.0)
    heads_a_group = x.shape[2] // B.shape[2]
    B, C = (M.to(dtype).repeat_interleave(heads_a_group, dim=2)[:, :, :, None] for M in (B, C))  # [B, L, H, 1, N]

    decay = torch.exp(step * A.to(dtype))[..., None, None]  # [B, L, H, 1, 1]
    H, last = _states.states("ssd_scan", decay, (step[..., None] * u)[..., None] * B, initial_state, cu_seqlens)
    y = (H * C).sum(-1)
    if D is not None:
        y = y + (D.to(dtype)[:, None] if D.ndim == 1 else D.to(dtype)) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), last if return_final_state else x.new_empty(0, dtype=dtype)
