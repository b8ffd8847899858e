"""The triton backend of ssm_step against float64: on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch

import fastlvm

from .device import needs_triton, to_device
from .oracle import relative_error
from .steps import Ssm, truth

pytestmark = needs_triton
CASES = [
    Ssm(),
    Ssm(state=300),
    Ssm(state=1, channels=7, C="bn"),
    Ssm(B=2, C=4),
    Ssm(options=()),
    Ssm(batch=1, state=128),
]


def _advance(inputs):
    inputs = to_device({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
    out = fastlvm.ssm_step(**inputs, backend="triton")
    return out.cpu(), inputs["state"].cpu()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case):
    out, state = _advance(case.inputs())
    true_out, true_state = truth(case, case.inputs())
    assert relative_error(out, true_out) <= 1e-5
    assert relative_error(state, true_state) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    case = Ssm(state=16)
    out, state = _advance(case.inputs(dtype))
    true_out, true_state = truth(case, case.inputs(dtype))
    rtol = {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(out.double(), torch.from_numpy(true_out), rtol=rtol, atol=1e-5)
    assert relative_error(state, true_state) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_indices_padding_and_indices_out_of_range(dtype):
    case = Ssm(batch=4, states=6)
    inputs = case.inputs() | {"state_indices": torch.tensor([4, -1, 0, 9], dtype=dtype)}
    out, state = _advance(inputs)
    known = case.inputs() | {"state_indices": torch.tensor([4, -1, 0, -1], dtype=dtype)}
    true_out, true_state = truth(case, known)
    assert relative_error(out[:3], true_out[:3]) <= 1e-5
    assert out[1].eq(0).all() and out[3].isnan().all()
    assert relative_error(state, true_state) <= 1e-5
    assert torch.equal(state[[1, 2, 3, 5]], inputs["state"][[1, 2, 3, 5]])


def test_a_strided_state_is_written_in_place():
    case = Ssm(state=16)
    inputs = case.inputs()
    wide = torch.zeros(*inputs["state"].shape[:2], 32)
    wide[..., ::2] = inputs["state"]
    wide = to_device(wide)
    rest = to_device({k: v for k, v in inputs.items() if k != "state"})
    out = fastlvm.ssm_step(wide[..., ::2], **rest, backend="triton")
    true_out, true_state = truth(case, inputs)
    assert relative_error(out.cpu(), true_out) <= 1e-5
    assert relative_error(wide[..., ::2].cpu(), true_state) <= 1e-5
    assert wide[..., 1::2].eq(0).all()


@pytest.mark.parametrize(("batch", "channels", "state"), [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_empty(batch, channels, state):
    case = Ssm(batch=batch, channels=channels, state=state, C="bn")
    out, _ = _advance(case.inputs())
    true_out, _ = truth(case, case.inputs())
    assert relative_error(out, true_out) <= 1e-5


def test_opcheck():
    from fastlvm.ops.ssm_step import triton_op

    inputs = to_device(Ssm().inputs())
    names = ("state", "x", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus")
    torch.library.opcheck(triton_op.ssm_step, (*(inputs[k] for k in names), None))
