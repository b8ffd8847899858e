"""InfoNCE in Triton as torch custom ops, `fastlvm::info_nce_triton` and its backward."""

from __future__ import annotations

import torch

from fastlvm.kernels.triton import info_nce as kernels
from fastlvm.ops import _triton
from fastlvm.ops.info_nce import autograd


@_triton.on_device
def _loss(queries, keys, temperature, symmetric, mask, query_labels, key_labels, loss, log_sums, *gradients):
    each = loss if loss.ndim else loss.new_empty(queries.shape[0])
    masks = (mask, query_labels, key_labels)
    kernels.forward(queries, keys, temperature, symmetric, *masks, each, log_sums, *gradients)
    if not loss.ndim:
        torch.sum(each, dim=0, out=loss)


run = autograd.define(
    f"info_nce{_triton.SUFFIX}", _loss, _triton.on_device(kernels.backward), both=True, device="default"
)
