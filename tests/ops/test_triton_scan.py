"""The triton backend of ssm_scan and ssm_step against the float64 oracle: on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch

import fastlvm

from .cases import SCANS, Scan, truth
from .device import every, needs_triton, to_device
from .oracle import relative_error

pytestmark = needs_triton
FORWARD, GRADIENT = 1e-5, 1e-4


def gradients(case, dtype=torch.float32, weights=torch.float32, **kwargs):
    """Outputs and gradients on the device, for the inputs and cotangents of `truth`, back in main memory."""
    inputs = to_device(case.inputs(dtype, weights))
    tensors = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    outputs = fastlvm.ssm_scan(**inputs, return_final_state=True, backend="triton", **kwargs)
    cotangents = [g.to(o) for o, g in zip(outputs, case.cotangents(), strict=True)]
    grads = torch.autograd.grad(outputs, list(tensors.values()), cotangents, allow_unused=True, materialize_grads=True)
    return [o.detach().cpu() for o in outputs], {k: g.cpu() for k, g in zip(tensors, grads, strict=True)}


@pytest.mark.parametrize("case", every(2, SCANS), ids=str)
def test_matches_the_oracle(case):
    (out, final), grads = gradients(case)
    (true_out, true_final), true_grads = truth(case)
    assert out.dtype == final.dtype == torch.float32
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(final, true_final) <= FORWARD
    assert grads.keys() == true_grads.keys()
    errors = {name: relative_error(grads[name], true_grads[name]) for name in grads}
    assert max(errors.values()) <= GRADIENT, errors
