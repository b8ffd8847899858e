"""The scan of Mamba-2 of the triton backend as torch custom ops, `fastlvm::ssd_scan_triton` and its backward.

Imported when the first tensor on a GPU arrives.
"""

from __future__ import annotations

from torch import Tensor

from fastlvm.kernels.triton import ssd_scan as kernels
from fastlvm.kernels.triton import ssd_scan_bwd as kernels_bwd
from fastlvm.ops import _autograd, _plain, _triton
from fastlvm.ops.ssd_scan import autograd

_ALIKE = (0, 1, 3, 4, 6)  # x, dt, B, C and z


@_triton.on_device
def _scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, return_final_state):
    out, final_state = autograd.empty(x, B, cu_seqlens, return_final_state)
    inputs = (x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, _offsets(x, cu_seqlens))
    kernels.forward(*inputs, out, final_state if return_final_state else None)
    return out, final_state


@_triton.on_device
def _scan_bwd(grad_out, grad_final_state, *args):
    inputs, dt_softplus, cu_seqlens, wanted = autograd.split(args)
    *tensors, initial_state = inputs
    buffers = _autograd.gradient_buffers(inputs, wanted, _ALIKE)
    offsets = _offsets(tensors[0], cu_seqlens)
    kernels_bwd.backward(grad_out, grad_final_state, *tensors, dt_softplus, initial_state, offsets, buffers)
    return _autograd.gradients(inputs, buffers)


def _offsets(x: Tensor | None, cu_seqlens: Tensor | None) -> list[int] | None:
    assert x is not None
    return None if cu_seqlens is None else _plain.checked_offsets("ssd_scan", cu_seqlens, x.shape[1])


run = autograd.define(f"ssd_scan{_triton.SUFFIX}", _scan, _scan_bwd, "default", _ALIKE)
