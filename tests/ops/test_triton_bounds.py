"""No kernel of the triton backend reads or writes outside of its tensors: every address, as the interpreter sees it."""

from __future__ import annotations

import pytest
import torch

import fastlvm

from .bounds import OutOfBounds, checked
from .cases import Conv, Scan
from .device import ON_GPU, needs_triton
from .nce_cases import Nce
from .ssd_cases import NAMES, Ssd
from .steps import Conv as ConvStep
from .steps import Ssd as SsdStep
from .steps import Ssm as SsmStep

pytestmark = [needs_triton, pytest.mark.skipif(ON_GPU, reason="the interpreter alone knows every address")]

SCANS = [
    Scan(batch=3, channels=5, state=128, length=5),
    Scan(batch=2, channels=5, state=3, length=8, B=5, C="dn"),
    Scan(batch=1, channels=3, state=5, length=11),
    Scan(batch=2, channels=6, state=40, length=3, B=2, C=3, options=("z",)),
]


def _backward(outputs, leaves):
    loss = sum(o.float().square().sum() for o in outputs)
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def _leaves(inputs, names):
    return [inputs[k].requires_grad_() for k in names if isinstance(inputs.get(k), torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SCANS, ids=str)
def test_ssm_scan(case, dtype):
    inputs = case.inputs(dtype)
    leaves = _leaves(inputs, inputs)
    with checked():
        _backward(fastlvm.ssm_scan(**inputs, return_final_state=True, backend="triton"), leaves)


def test_packed_ssm_scan():
    inputs = Scan(batch=1, channels=3, state=4, length=12, options=("z", "D")).inputs()
    leaves = _leaves(inputs, inputs)
    with checked():
        outputs = fastlvm.ssm_scan(
            **inputs, cu_seqlens=torch.tensor([0, 5, 5, 12]), return_final_state=True, backend="triton"
        )
        _backward(outputs, leaves)


@pytest.mark.parametrize("case", [Conv(3, 5, 4, 5), Conv(2, 3, 3, 21), Conv(1, 17, 4, 2)], ids=str)
def test_causal_conv1d(case):
    inputs = case.inputs()
    leaves = _leaves(inputs, inputs)
    with checked():
        _backward(fastlvm.causal_conv1d(**inputs, return_final_state=True, backend="triton"), leaves)


@pytest.mark.parametrize(
    "case", [Ssd(length=5, dim=3, state=17), Ssd(batch=1, length=40, state=5, cuts=(7, 7))], ids=str
)
def test_ssd_scan(case):
    inputs = case.inputs()
    leaves = _leaves(inputs, NAMES)
    with checked():
        _backward(fastlvm.ssd_scan(**inputs, return_final_state=True, backend="triton"), leaves)


@pytest.mark.parametrize("case", [SsmStep(state=17, states=5), ConvStep(extra=2, states=5), SsdStep(states=5)], ids=str)
def test_steps(case):
    inputs = case.inputs() | {"state_indices": torch.tensor([4, -1, 7])}
    with checked(), torch.no_grad():
        case.op(**inputs, backend="triton")


@pytest.mark.parametrize("case", [Nce(9, 20, 5, mask=2), Nce(9, 9, 5, symmetric=True, mask="dense")], ids=str)
def test_info_nce(case):
    inputs = case.inputs()
    leaves = _leaves(inputs, ("queries", "keys"))
    with checked():
        _backward((fastlvm.info_nce(**inputs, backend="triton"),), leaves)


def test_the_check_sees_an_address_outside():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, shift):
        tl.store(x + shift, tl.load(x) + 1.0)

    x = torch.zeros(4)
    with checked():
        kernel[(1,)](x, 3)
        with pytest.raises(triton.runtime.errors.InterpreterError, match=OutOfBounds.__name__):
            kernel[(1,)](x, 4)
    assert x.tolist() == [0.0, 0.0, 0.0, 1.0]
