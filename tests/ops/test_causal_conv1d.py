"""The causal convolution against the float64 oracle, on every backend and instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastlvm

from .cases import CONVS, Conv, gradients, truth
from .oracle import relative_error

FORWARD, GRADIENT = 1e-5, 1e-4


@pytest.mark.parametrize("case", CONVS, ids=str)
def test_matches_the_oracle(case, backend):
    (out, final), grads = gradients(fastlvm.causal_conv1d, case, backend=backend)
    (true_out, true_final), true_grads = truth(case)
    assert out.dtype == final.dtype == torch.float32
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(final, true_final) == 0
    errors = {name: relative_error(grads[name], true_grads[name]) for name in true_grads}
    assert max(errors.values()) <= GRADIENT, errors


@pytest.mark.parametrize("case", CONVS[::3], ids=str)
def test_float64_is_exact(case, backend):
    (out, final), grads = gradients(fastlvm.causal_conv1d, case, torch.float64, torch.float64, backend=backend)
    (true_out, true_final), true_grads = truth(case, torch.float64, torch.float64)
    assert out.dtype == final.dtype == torch.float64
    assert relative_error(out, true_out) <= 1e-13
    assert relative_error(final, true_final) == 0
    errors = {name: relative_error(grads[name], true_grads[name]) for name in true_grads}
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("case", CONVS[1::3], ids=str)
def test_numpy_matches_the_oracle(case, backend):
    inputs = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in case.inputs().items()}
    out, final = fastlvm.causal_conv1d(**inputs, return_final_state=True, backend=backend)
    (true_out, true_final), _ = truth(case)
    assert type(out) is type(final) is np.ndarray
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(final, true_final) == 0


# The tolerances of the peers' own tests: rtol, atol; 1e-3 for parameters in float32.
HALF = {torch.float16: (3e-3, 5e-3), torch.bfloat16: (1e-2, 5e-2)}


@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32-weights", "all-half"])
@pytest.mark.parametrize("dtype", list(HALF), ids=str)
@pytest.mark.parametrize("case", [Conv(length=n, width=w) for n in (1, 5, 64) for w in (2, 4)], ids=str)
def test_half_precision(case, dtype, weights, backend):
    weights = weights or dtype
    (out, final), grads = gradients(fastlvm.causal_conv1d, case, dtype, weights, backend=backend)
    (true_out, true_final), true_grads = truth(case, dtype, weights)
    rtol, atol = HALF[dtype]
    assert out.dtype == final.dtype == dtype
    torch.testing.assert_close(out.double(), true_out, rtol=rtol, atol=atol)
    assert relative_error(final, true_final) == 0
    for name, grad in grads.items():
        tolerance = (1e-3, 1e-3) if weights == torch.float32 and name in ("weight", "bias") else (rtol, atol)
        torch.testing.assert_close(grad.double(), true_grads[name], rtol=tolerance[0], atol=tolerance[1], msg=name)


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_two_halves_with_carried_state_are_the_whole(cut, width, backend):
    inputs = Conv(length=9, width=width).inputs()
    whole, last = fastlvm.causal_conv1d(**inputs, return_final_state=True, backend=backend)
    x, state, parts = inputs.pop("x"), inputs.pop("initial_state"), []
    for part in (x[..., :cut], x[..., cut:]):
        out, state = fastlvm.causal_conv1d(
            part, **inputs, initial_state=state, return_final_state=True, backend=backend
        )
        parts.append(out)
    assert relative_error(torch.cat(parts, dim=-1), whole) <= 1e-6
    assert torch.equal(state, last)


# Vectors run over channels or over time, whole or not, in one tile or several, on one thread or shared out.
SIZES = [(40, 5, 4), (40, 4, 3), (40, 8, 2), (40, 9, 1), (33, 70, 4), (16, 70, 6), (40, 1100, 3), (12, 9001, 4)]


LAYOUTS = ["time", "channel", "both", "neither"]
DTYPES = [torch.float32, torch.float16, torch.float64]


@pytest.mark.parametrize(  # every size in every layout; every dtype in each of both
    ("channels", "length", "width", "dtype", "layout"),
    [(*size, DTYPES[(i + j) % 3], layout) for i, size in enumerate(SIZES) for j, layout in enumerate(LAYOUTS)],
)
def test_vectors_over_channels_and_over_time(channels, length, width, dtype, layout, isa):
    case = Conv(channels=channels, length=length, width=width)
    weights = torch.float64 if dtype == torch.float64 else torch.float32

    def laid_out(x, how):
        if how == "channel":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return x.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2] if how == "neither" else x

    def op(x, **inputs):
        out, state = fastlvm.causal_conv1d(laid_out(x, layout), **inputs, backend="cpu")
        # A view of the output gives the kernel a cotangent in that view's memory.
        return (laid_out(out, "channel") if layout == "both" else out), state

    (out, final), grads = gradients(op, case, dtype, weights)
    (true_out, true_final), true_grads = truth(case, dtype, weights)
    forward, gradient = {torch.float32: (1e-6, 1e-5), torch.float16: (1e-3, 2e-3), torch.float64: (1e-15, 1e-14)}[dtype]
    assert relative_error(out, true_out) <= forward
    assert relative_error(final, true_final) == 0
    errors = {name: relative_error(grads[name], true_grads[name]) for name in true_grads}
    assert max(errors.values()) <= gradient, errors


def test_swish_is_silu(backend):
    inputs = Conv().inputs()
    silu = fastlvm.causal_conv1d(**inputs, backend=backend)
    assert torch.equal(fastlvm.causal_conv1d(**{**inputs, "activation": "swish"}, backend=backend), silu)
    assert not torch.equal(fastlvm.causal_conv1d(**{**inputs, "activation": None}, backend=backend), silu)


def test_inputs_are_left_alone(backend):
    inputs, before = Conv().inputs(), Conv().inputs()
    fastlvm.causal_conv1d(**inputs, backend=backend)
    for name, value in before.items():
        assert isinstance(value, str) or torch.equal(inputs[name], value), name


def test_final_state_is_a_copy(backend):
    inputs = Conv(length=0).inputs()
    _, final = fastlvm.causal_conv1d(**inputs, return_final_state=True, backend=backend)
    assert torch.equal(final, inputs["initial_state"])
    final.zero_()
    assert bool(inputs["initial_state"].any())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("name", ["x", "initial_state"])
def test_extreme_values_do_not_crash_and_stay_in_their_row(name, value, backend):
    case = Conv(length=33)
    inputs = case.inputs()
    inputs[name][0, 0] = value
    out = fastlvm.causal_conv1d(**inputs, backend=backend)
    (true_out, _), _ = truth(case)
    assert relative_error(out[1], true_out[1]) <= FORWARD
    assert relative_error(out[0, 1:], true_out[0, 1:]) <= FORWARD
    if value != value:
        assert bool(out[0, 0, :3].isnan().all())
