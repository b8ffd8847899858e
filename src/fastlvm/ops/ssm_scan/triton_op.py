"""The selective scan of the triton backend as torch custom ops, `fastlvm::ssm_scan_triton` and its backward.

Imported when the first tensor on a GPU arrives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlvm.kernels.triton import ssm_scan as kernels
from fastlvm.kernels.triton import ssm_scan_bwd as kernels_bwd
from fastlvm.ops import _autograd, _direct, _triton
from fastlvm.ops.ssm_scan import autograd


@_triton.on_device
def _scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, return_final_state, keep=False
):
    out, final_state, carry = _empty(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, return_final_state, keep
    )
    results = (out, final_state if return_final_state else None, carry if keep else None)
    inputs = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    kernels.ssm_scan(*inputs, _packed(u, cu_seqlens), *results)
    return out, final_state, carry


def _empty(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, return_final_state, keep=False
):
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = (kernels.carried(u.shape[0], u.shape[2], sequences), *A.shape) if keep else (0,)
    return *autograd.outputs(u, A, cu_seqlens, return_final_state), u.new_empty(rows, dtype=torch.float32)


def _packed(u: Tensor, cu_seqlens: Tensor | None) -> kernels.Packed | None:
    if cu_seqlens is None:
        return None
    return kernels.Packed(*_triton.offsets("ssm_scan", cu_seqlens, u.shape[2], u.device))


@_triton.on_device
def _scan_bwd(grad_out, grad_final_state, *args):
    inputs, delta_softplus, cu_seqlens, carry, wanted = autograd.split(args)
    buffers = _autograd.gradient_buffers(inputs, wanted, autograd.ALIKE)
    *tensors, initial_state = inputs
    u = tensors[0]
    assert u is not None
    packed = _packed(u, cu_seqlens)
    kernels_bwd.ssm_scan_bwd(
        grad_out, grad_final_state, *tensors, delta_softplus, initial_state, packed, carry, buffers
    )
    return _autograd.gradients(inputs, buffers)


_call = _direct.unless_watched(autograd.define(f"ssm_scan{_triton.SUFFIX}", _scan, _scan_bwd, _empty, "default"), _scan)


def run(*args: Any) -> tuple[Tensor, Tensor]:
    # A sequence of one chunk has nothing to keep. A compiler would take the question for a promise about the length.
    more = torch.compiler.is_compiling() or args[0].shape[2] > kernels.CHUNK.value
    out, final_state, _ = _call(*args, more and autograd.recorded(args))
    return out, final_state
