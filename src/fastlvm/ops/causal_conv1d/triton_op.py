"""The causal convolution in Triton as torch custom ops, `fastlvm::causal_conv1d_triton` and its backward."""

from __future__ import annotations

from torch import Tensor

from fastlvm.kernels.triton import causal_conv1d as kernels
from fastlvm.ops import _triton
from fastlvm.ops.causal_conv1d import autograd


@_triton.on_device
def _conv(x, weight, bias, silu, initial_state, cu_seqlens, out, final_state):
    offsets = _offsets(x, cu_seqlens)
    if x.shape[-1] == 0 or (cu_seqlens is not None and bool((cu_seqlens.diff() == 0).any())):
        # An empty sequence has no time at which the kernel could write its state.
        final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
    kernels.conv(x, weight, bias, silu, initial_state, out, final_state, offsets)


@_triton.on_device
def _conv_bwd(grad_out, grad_final_state, x, weight, bias, silu, initial_state, cu_seqlens, *buffers):
    inputs = (x, weight, bias, silu, initial_state)
    kernels.conv_bwd(grad_out, grad_final_state, *inputs, *buffers, _offsets(x, cu_seqlens))


def _offsets(x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else _triton.offsets("causal_conv1d", cu_seqlens, x.shape[-1], x.device)[0]


run, _ = autograd.define(f"causal_conv1d{_triton.SUFFIX}", _conv, _conv_bwd, device="default")
