"""The selective scan against the float64 oracle, on every backend and instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastlvm

from .cases import SCANS, Scan, gradients, truth
from .oracle import GRADIENTS, extremes, relative_error

FORWARD, GRADIENT = 1e-5, 1e-4


@pytest.mark.parametrize("case", SCANS, ids=str)
def test_matches_the_oracle(case, backend):
    (out, final), grads = gradients(fastlvm.ssm_scan, case, backend=backend)
    (true_out, true_final), true_grads = truth(case)
    assert out.dtype == final.dtype == torch.float32
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(final, true_final) <= FORWARD
    assert grads.keys() == true_grads.keys()
    errors = {name: relative_error(grads[name], true_grads[name]) for name in grads}
    assert max(errors.values()) <= GRADIENT, errors


def test_backward_in_several_spans(isa):
    """So many states that the partial sums of dB and dC are kept for a part of the sequence at a time."""
    case = Scan(batch=8, channels=8, state=300, length=257, B=8, C=8)
    outputs, grads = gradients(fastlvm.ssm_scan, case, backend="cpu")
    # The same in pieces, each in one span: gradients of the late piece flow into the early one through the state.
    leaves = {k: v.requires_grad_() for k, v in case.inputs().items() if isinstance(v, torch.Tensor)}
    state, parts = leaves["initial_state"], []
    for span in (slice(0, 100), slice(100, 200), slice(200, None)):
        timed = {k: leaves[k][..., span] for k in ("u", "delta", "B", "C", "z")}
        args = {**leaves, **timed, "initial_state": state, "delta_softplus": True}
        part, state = fastlvm.ssm_scan(**args, return_final_state=True, backend="cpu")
        parts.append(part)
    wants = (torch.cat(parts, dim=-1), state)
    assert all(relative_error(got, want) <= 1e-6 for got, want in zip(outputs, wants, strict=True))
    pieces = torch.autograd.grad(wants, list(leaves.values()), case.cotangents())
    errors = {name: relative_error(grads[name], g) for name, g in zip(leaves, pieces, strict=True)}
    assert max(errors.values()) <= 1e-5, errors


# Float64 alone shows where softplus becomes the identity: at 20 the two are 2e-9 apart.
@pytest.mark.parametrize("case", [*SCANS[::3], Scan(length=7, step=25.0, decay=1e-3)], ids=str)
def test_float64_is_exact(case, backend):
    (out, final), grads = gradients(fastlvm.ssm_scan, case, torch.float64, torch.float64, backend=backend)
    (true_out, true_final), true_grads = truth(case, torch.float64, torch.float64)
    assert out.dtype == final.dtype == torch.float64
    assert relative_error(out, true_out) <= 1e-13
    assert relative_error(final, true_final) <= 1e-13
    errors = {name: relative_error(grads[name], true_grads[name]) for name in grads}
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("case", SCANS[1::3], ids=str)
def test_numpy_matches_the_oracle(case, backend):
    inputs = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in case.inputs().items()}
    out, final = fastlvm.ssm_scan(**inputs, return_final_state=True, backend=backend)
    (true_out, true_final), _ = truth(case)
    assert type(out) is type(final) is np.ndarray
    assert out.dtype == final.dtype == np.float32
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(final, true_final) <= FORWARD


# The tolerances of the peers' own tests: rtol, atol; 1e-3 for parameters, wider for dA and ddelta.
HALF = {torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}
HALF_CASES = [Scan(length=n, state=s, B=2) for n, s in [(1, 5), (5, 16), (5, 128), (33, 16)]]


@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32-weights", "all-half"])
@pytest.mark.parametrize("dtype", list(HALF), ids=str)
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision(case, dtype, weights, backend):
    weights = weights or dtype
    (out, final), grads = gradients(fastlvm.ssm_scan, case, dtype, weights, backend=backend)
    (true_out, true_final), true_grads = truth(case, dtype, weights)
    rtol, atol = HALF[dtype]
    assert out.dtype == dtype
    assert final.dtype == torch.float32
    torch.testing.assert_close(out.double(), true_out, rtol=rtol, atol=atol)
    assert relative_error(final, true_final) <= FORWARD
    for name, grad in grads.items():
        assert grad.dtype == case.inputs(dtype, weights)[name].dtype
        tolerance = {"A": (rtol, 5 * atol), "delta": (5 * rtol, 10 * atol)}.get(name, (rtol, atol))
        if weights == torch.float32 and name in ("D", "delta_bias", "initial_state"):
            tolerance = (1e-3, 1e-3)
        torch.testing.assert_close(grad.double(), true_grads[name], rtol=tolerance[0], atol=tolerance[1], msg=name)


@pytest.mark.parametrize("dtype", list(HALF), ids=str)
@pytest.mark.parametrize("channel_last", [False, True])
def test_half_precision_is_rounded_to_nearest(dtype, channel_last, backend):
    """The tolerances above would let a kernel cut bits off; vectors and what is left of them round by other code."""
    case = Scan(channels=20, length=9)
    inputs = case.inputs(dtype)
    if channel_last:
        inputs["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    out = fastlvm.ssm_scan(**inputs, backend=backend)
    (true_out, _), _ = truth(case, dtype)
    half_a_unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    torch.testing.assert_close(out.double(), true_out, rtol=1.01 * half_a_unit, atol=1e-5)


def test_half_precision_numpy(backend):
    case = Scan(state=16)
    inputs = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in case.inputs(torch.float16).items()}
    out, final = fastlvm.ssm_scan(**inputs, return_final_state=True, backend=backend)
    (true_out, true_final), _ = truth(case, torch.float16)
    assert (out.dtype, final.dtype) == (np.float16, np.float32)
    np.testing.assert_allclose(out, true_out.numpy(), *HALF[torch.float16])
    assert relative_error(final, true_final) <= FORWARD


@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_two_halves_with_carried_state_are_the_whole(cut, backend):
    case = Scan(length=9, state=16, B=2)
    inputs = case.inputs()
    whole, last = fastlvm.ssm_scan(**inputs, return_final_state=True, backend=backend)

    def part(span, state):
        timed = {k: inputs[k][..., span] for k in ("u", "delta", "B", "C", "z")}
        return fastlvm.ssm_scan(**{**inputs, **timed, "initial_state": state}, return_final_state=True, backend=backend)

    first, state = part(slice(0, cut), inputs["initial_state"])
    second, state = part(slice(cut, None), state)
    assert relative_error(torch.cat([first, second], dim=-1), whole) <= 1e-6
    assert relative_error(state, last) <= 1e-6


def test_step_by_step_is_the_whole(backend):
    inputs = Scan(length=6, state=16).inputs()
    whole = fastlvm.ssm_scan(**inputs, backend=backend)
    state, steps = inputs.pop("initial_state"), []
    for t in range(6):
        now = {k: inputs[k][..., t : t + 1] for k in ("u", "delta", "B", "C", "z")}
        out, state = fastlvm.ssm_scan(
            **{**inputs, **now}, initial_state=state, return_final_state=True, backend=backend
        )
        steps.append(out)
    assert relative_error(torch.cat(steps, dim=-1), whole) <= 1e-6


def test_inputs_are_left_alone(backend):
    case = Scan(state=16)
    inputs, before = case.inputs(), case.inputs()
    fastlvm.ssm_scan(**inputs, backend=backend)
    gradients(fastlvm.ssm_scan, case, backend=backend)
    for name, value in before.items():
        assert value is True or torch.equal(inputs[name], value), name


def test_final_state_is_not_the_initial_state(backend):
    """With no step the two are equal, never the same memory."""
    inputs = Scan(length=0).inputs()
    _, final = fastlvm.ssm_scan(**inputs, return_final_state=True, backend=backend)
    assert torch.equal(final, inputs["initial_state"])
    assert final.data_ptr() != inputs["initial_state"].data_ptr()


def test_a_channel_last_input_gives_a_channel_last_output():
    """So that the linear layer which follows reads it in order."""
    inputs = Scan().inputs()
    inputs["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    assert fastlvm.ssm_scan(**inputs, backend="cpu").stride() == inputs["u"].stride()
    as_numpy = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    assert fastlvm.ssm_scan(**as_numpy, backend="cpu").strides == as_numpy["u"].strides


@pytest.mark.parametrize(("name", "value"), extremes(GRADIENTS))
def test_extreme_values_do_not_crash_and_stay_in_their_batch(name, value, backend):
    case = Scan(state=16, length=8)
    inputs = case.inputs()
    inputs[name][0] = value
    out, final = fastlvm.ssm_scan(**inputs, return_final_state=True, backend=backend)
    if name in ("u", "delta", "B", "C", "z", "initial_state"):
        (true_out, true_final), _ = truth(case)
        assert relative_error(out[1], true_out[1]) <= FORWARD
        assert relative_error(final[1], true_final[1]) <= FORWARD
    if name in ("u", "D") and value != value:
        assert bool(out[0, 0].isnan().all())


def test_a_nan_step_reaches_every_later_output(backend):
    inputs = Scan(state=16, length=8).inputs()
    inputs["delta"][0, 0, 3] = float("nan")
    out, final = fastlvm.ssm_scan(**inputs, return_final_state=True, backend=backend)
    assert bool(out[0, 0, :3].isfinite().all())
    assert bool(out[0, 0, 3:].isnan().all())
    assert bool(final[0, 0].isnan().all())
    assert bool(out[0, 1:].isfinite().all())


def test_a_state_without_input_decays_to_zero(isa):
    """It does not stop at a subnormal number, which would be slow for the rest of the sequence."""
    if isa == "scalar":
        pytest.skip("the scalar kernels keep subnormal numbers")
    zeros = torch.zeros(1, 1, 400)
    A = torch.full((1, 16), -0.1)
    args = (zeros, torch.ones_like(zeros), A, torch.ones(1, 16), torch.ones(1, 16))
    state = torch.full((1, 1, 16), 1e-30)
    _, final = fastlvm.ssm_scan(*args, initial_state=state, return_final_state=True, backend="cpu")
    assert torch.equal(final, torch.zeros_like(final))
