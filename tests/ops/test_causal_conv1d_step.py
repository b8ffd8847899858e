"""One token of the causal convolution against the float64 oracle and the convolution, on every backend and ISA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastlvm

from .cases import Conv as Whole
from .oracle import relative_error
from .steps import Conv, advance, as_numpy, basic_truth, truth

CASES = [Conv(width=w, extra=e, channels=20) for w in (1, 2, 3, 4, 5, 9) for e in (0, 1, 4)]
CASES += [Conv(width=w, options=o) for w in (1, 4, 6) for o in [(), ("bias",), ("activation",)]]
CASES += [Conv(batch=b, channels=d) for b, d in [(0, 4), (2, 0), (1, 1), (3, 17), (2, 256), (2, 700)]]
CASES = list(dict.fromkeys(CASES))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, backend):
    inputs = case.inputs()
    true_out, true_state = basic_truth(case)
    out, state = advance(case, inputs, backend=backend)
    assert out.dtype == torch.float32
    assert relative_error(out, true_out) <= 1e-5
    assert relative_error(state, true_state) == 0
    again, numpy_state = advance(case, as_numpy(inputs), backend=backend)
    assert type(again) is np.ndarray
    assert np.array_equal(again, out.numpy())
    assert np.array_equal(numpy_state, state.numpy())


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_float64_is_exact(case, backend):
    inputs = case.inputs(torch.float64, torch.float64)
    true_out, true_state = basic_truth(case, torch.float64)
    out, state = advance(case, inputs, backend=backend)
    assert out.dtype == torch.float64
    assert relative_error(out, true_out) <= 1e-13
    assert relative_error(state, true_state) == 0


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
def test_the_loop_is_the_convolution(width, extra, backend):
    inputs = Whole(width=width, length=33).inputs()
    whole, last = fastlvm.causal_conv1d(**inputs, return_final_state=True, backend=backend)
    x, first = inputs.pop("x"), inputs.pop("initial_state")
    state = torch.cat(
        [torch.full((*first.shape[:2], extra), float("nan")), first], dim=-1
    )  # what is beyond is not read
    outs = [fastlvm.causal_conv1d_step(x[..., t], state, **inputs, backend=backend) for t in range(33)]
    assert relative_error(torch.stack(outs, dim=-1), whole) <= 1e-6
    assert torch.equal(state[..., extra:], last)
    assert torch.equal(state, x[..., 33 - state.shape[-1] :])


@pytest.mark.parametrize("activation", ["silu", "swish"])
def test_both_names_of_the_activation(activation, backend):
    inputs = Conv().inputs()
    want, _ = advance(Conv(), inputs, backend=backend)
    got, _ = advance(Conv(), {**inputs, "activation": activation}, backend=backend)
    assert torch.equal(got, want)


@pytest.mark.parametrize("value", ["relu", "SiLU", True, 0, ""])
def test_activation_is_known(value):
    with pytest.raises(ValueError, match=r'causal_conv1d_step: activation is .* "silu"'):
        fastlvm.causal_conv1d_step(**{**Conv().inputs(), "activation": value})


def test_a_state_holds_what_the_filter_reads():
    inputs = {**Conv().inputs(), "state": torch.zeros(3, 4, 2)}
    with pytest.raises(ValueError, match=r"state has shape \(3, 4, 2\); wants \(b, D, W-1 or more\) = \(3, 4, 3\)"):
        fastlvm.causal_conv1d_step(**inputs)


def test_a_filter_has_at_least_one_tap():
    inputs = {**Conv().inputs(), "weight": torch.zeros(4, 0)}
    with pytest.raises(ValueError, match=r"weight has shape \(4, 0\); wants \(D, W\) with W at least 1"):
        fastlvm.causal_conv1d_step(**inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("name", ["x", "state"])
def test_extreme_values_stay_in_their_channel(name, value, backend):
    inputs = Conv().inputs()
    true_out, true_state = truth(Conv(), inputs)
    inputs[name][0, 0] = value
    out, state = advance(Conv(), inputs, backend=backend)
    assert relative_error(out[1:], true_out[1:]) <= 1e-5
    assert relative_error(out[0, 1:], true_out[0, 1:]) <= 1e-5
    assert relative_error(state[1:], true_state[1:]) == 0
