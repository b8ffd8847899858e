"""The launchers of the Metal kernels on cases made with torch: what comes back, and every gradient by name."""

from __future__ import annotations

import torch

from fastlvm.ops.causal_conv1d import metal as convolution
from fastlvm.ops.ssm_scan import metal as scans
from ops import oracle
from ops.mlx_arrays import all_mlx, mx, to_mlx, to_torch

FORWARD, GRADIENT = 1e-5, 1e-4
HALF = {torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}
SCAN = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state", "cu_seqlens")
CONV = ("x", "weight", "bias", "activation", "initial_state", "cu_seqlens")
STEP = ("state", "x", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "state_indices")
CONV_STEP = ("x", "state", "weight", "bias", "activation", "state_indices")


def arguments(names, inputs):
    """mlx arrays in the order of a launcher, from torch tensors or mlx arrays by name."""
    given = {"delta_softplus": False, **all_mlx(inputs)}
    return [given.get(name) for name in names]


def forward(inputs):
    """Output and final state of the op the inputs belong to."""
    if "x" in inputs:
        results = convolution.conv(*arguments(CONV, inputs), True)
    else:
        results = scans.scan(*arguments(SCAN, inputs), True)[:2]
    return [to_torch(x) for x in results]


def backward(inputs, cotangents):
    """The gradient of every array by name; cotangents are two tensors, either of them None."""
    grads = [to_mlx(g) for g in cotangents]
    if "x" in inputs:
        found = dict(zip(convolution.GRADIENTS, convolution.conv_bwd(*grads, *arguments(CONV, inputs)), strict=True))
    else:
        found = dict(zip(scans.GRADIENTS, scans.scan_bwd(*grads, *arguments(SCAN, inputs)), strict=True))
    assert {key for key, x in found.items() if x is not None} == inputs.keys() & found.keys()
    mx.eval([x for x in found.values() if x is not None])
    return {key: to_torch(x) for key, x in found.items() if x is not None}


def check(inputs, outputs, grads, truth):
    """Outputs and gradients in float32 are the oracle's, in the dtypes of what they belong to."""
    wants, true_grads = truth
    assert all(oracle.relative_error(got, want) <= FORWARD for got, want in zip(outputs, wants, strict=True))
    errors = {key: oracle.relative_error(grads[key], true_grads[key]) for key in grads}
    assert all(error <= GRADIENT for error in errors.values()), errors
    assert all(grads[key].dtype == inputs[key].dtype for key in grads)
