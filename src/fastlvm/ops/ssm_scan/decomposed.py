"""The selective scan in operators of torch alone, of any length that has a bound: see `fastlvm.ops.decompositions`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlvm.ops import _autograd, _states
from fastlvm.ops.ssm_scan import reference


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
    cu_seqlens: Tensor | None,
    return_final_state: bool,
    keep_checkpoints: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `fastlvm::ssm_scan` returns, without checkpoints; memory [B, L, D, N]."""
    dtype = _autograd.state_dtype(u)
    channels, length = u.shape[1:]
    x, step = (M.to(dtype).transpose(1, 2).contiguous() for M in (u, delta))  # [B, L, D]
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)
    if delta_softplus:
        step = F.softplus(step, threshold=20.0)
    B, C = (reference.per_channel(M.to(dtype), channels, length).movedim(-1, 1) for M in (B, C))  # [B, L, D or 1, N]

    decay = torch.exp(step[..., None] * A.to(dtype))  # [B, L, D, N]
    h, last = _states.states("ssm_scan", decay, (step * x)[..., None] * B, initial_state, cu_seqlens)
    y = (h * C).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype).transpose(1, 2))
    nothing = u.new_empty(0, dtype=dtype)
    return y.transpose(1, 2).to(u.dtype), last if return_final_state else nothing, nothing
