"""The causal convolution in operators of torch alone, of any length: see `fastlvm.ops.decompositions`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlvm.ops import _autograd, _states
from fastlvm.ops.causal_conv1d import reference


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What `fastlvm::causal_conv1d` returns."""
    if cu_seqlens is None:
        return reference.conv(x, weight, bias, "silu" if silu else None, initial_state)

    dtype = _autograd.state_dtype(x)
    channels, length = x.shape[1:]
    before = weight.shape[1] - 1
    begins, ends, sequence = _states.packed_times(cu_seqlens.to(x.device), length)
    first = begins.index_select(0, sequence)  # [L]
    if initial_state is None:
        initial_state = x.new_zeros(begins.shape[0], channels, before)
    states = initial_state.to(dtype).transpose(0, 1).flatten(1)  # [D, S (W-1)]
    everything = torch.cat([states, x[0].to(dtype)], dim=1)

    def at(time: Tensor, begin: Tensor, of: Tensor) -> Tensor:
        """Input of sequence `of` at a time, which may lie up to W-1 before its begin."""
        place = torch.where(time < begin, (of + 1) * before + time - begin, states.shape[1] + time)
        return everything.index_select(1, place.flatten()).view(channels, *place.shape)

    t = torch.arange(length, device=x.device)
    taps = torch.stack([at(t - before + k, first, sequence) for k in range(before + 1)])  # [W, D, L]
    y = (weight.to(dtype).t()[..., None] * taps).sum(0)
    if bias is not None:
        y = y + bias.to(dtype)[:, None]
    if silu:
        y = F.silu(y)
    of = torch.arange(begins.shape[0], device=x.device)[:, None]
    last = at(ends[:, None] - before + torch.arange(before, device=x.device), begins[:, None], of)  # [D, S, W-1]
    return y[None].to(x.dtype), last.transpose(0, 1).to(x.dtype)
