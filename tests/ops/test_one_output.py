"""A loss on the output alone, or on the final state alone: the gradient that never comes counts as zero."""

from __future__ import annotations

import functools

import pytest
import torch

import fastlvm

from . import oracle, ssd_cases
from .cases import Conv, Scan
from .oracle import relative_error

CASES = {
    "ssm_scan": (oracle.ssm_scan, Scan(length=37)),
    "ssm_scan-groups": (oracle.ssm_scan, Scan(B=2, C="dn", options=("z", "initial_state"))),
    "causal_conv1d": (oracle.causal_conv1d, Conv(length=37)),
    "causal_conv1d-short": (oracle.causal_conv1d, Conv(length=2)),
    "ssd_scan": (ssd_cases.ssd_oracle, ssd_cases.Ssd(length=70)),
    "ssd_scan-packed": (ssd_cases.ssd_oracle, ssd_cases.Ssd(batch=1, length=9, cuts=(2, 2), D_per_channel=True)),
}


@pytest.fixture
def nan_memory():
    """What torch.empty gives holds NaN, which a kernel has to overwrite."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("which", [0, 1], ids=["output", "final-state"])
@pytest.mark.parametrize("name", CASES)
def test_one_output_alone(name, which, backend):
    truth, case = CASES[name]
    op = functools.partial(getattr(fastlvm, name.partition("-")[0]), return_final_state=True, backend=backend)
    weights = [g if i == which else torch.zeros_like(g) for i, g in enumerate(case.cotangents())]

    inputs = case.inputs()
    tensors = {k: v.requires_grad_() for k, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()}
    loss = (op(**inputs)[which] * weights[which]).sum()
    op(**{**inputs, **{k: torch.full_like(v, torch.nan) for k, v in tensors.items()}})  # left in the scratch memory
    got = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, materialize_grads=True)

    inputs = case.inputs()
    offsets = inputs.pop("cu_seqlens", None)
    _, want = oracle.run(truth if offsets is None else functools.partial(truth, cu_seqlens=offsets), inputs, weights)
    errors = {key: relative_error(grad, want[key]) for key, grad in zip(tensors, got, strict=True)}
    assert max(errors.values()) <= 1e-4, errors


def test_a_nan_is_no_small_error():
    assert max(0.0, relative_error(torch.tensor([torch.nan, 1.0]), torch.ones(2))) == torch.inf
