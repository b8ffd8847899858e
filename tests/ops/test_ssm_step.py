"""One token of the selective scan against the float64 oracle and against the scan, on every backend and ISA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastlvm

from .cases import Scan
from .oracle import extremes, relative_error
from .steps import SSM, Ssm, advance, as_numpy, basic_truth, truth

FORWARD = 1e-5

CASES = [Ssm(state=n, channels=6) for n in (0, 1, 3, 16, 37, 64, 128, 256, 257, 600)]
CASES += [Ssm(B=b, C=c) for b in ("bn", 1, 2, 4) for c in ("bn", 1, 2, 4)]
CASES += [Ssm(options=o) for o in [(), *((name,) for name in SSM)]]
CASES += [Ssm(batch=b, channels=d) for b, d in [(0, 4), (2, 0), (1, 2), (3, 18), (2, 64), (5, 130)]]
CASES += [Ssm(batch=2, channels=130, state=300, B=130, C=2)]
CASES = list(dict.fromkeys(CASES))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, backend):
    inputs = case.inputs()
    true_out, true_state = basic_truth(case)
    out, state = advance(case, inputs, backend=backend)
    assert out.dtype == torch.float32
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(state, true_state) <= FORWARD
    again, numpy_state = advance(case, as_numpy(inputs), backend=backend)
    assert type(again) is np.ndarray
    assert np.array_equal(again, out.numpy())
    assert np.array_equal(numpy_state, state.numpy())


def test_a_sum_of_hundreds_of_terms_keeps_its_digits(backend):
    """Terms that one float32 sum would cut, one after the other, by half of its last digit."""
    term = 1 + 0.49 * 2.0**-16
    state, ones, zeros = torch.full((1, 3, 256), term), torch.ones(1, 256), torch.zeros(1, 3)
    out = fastlvm.ssm_step(state, zeros, zeros, torch.zeros(3, 256), ones, ones, backend=backend)
    assert relative_error(out, 256 * state[..., 0].double()) <= 5e-7


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_float64_is_exact(case, backend):
    inputs = case.inputs(torch.float64, torch.float64)
    true_out, true_state = basic_truth(case, torch.float64)
    out, state = advance(case, inputs, backend=backend)
    assert out.dtype == torch.float64
    assert relative_error(out, true_out) <= 1e-13
    assert relative_error(state, true_state) <= 1e-13


SCANS = [
    Scan(length=64, state=16),
    Scan(length=33, state=5, B=2, C="bnl", options=("z",)),
    Scan(length=64, state=128, B=4, C=1, step=2.0, options=("delta_softplus", "D")),
    Scan(length=120, state=16, decay=1e-4),
]


@pytest.mark.parametrize("case", SCANS, ids=str)
def test_the_loop_is_the_scan(case, backend):
    inputs = case.inputs()
    whole, last = fastlvm.ssm_scan(**inputs, return_final_state=True, backend=backend)
    state = inputs.pop("initial_state", torch.zeros(last.shape)).clone()
    names = {"u": "x", "delta": "delta", "B": "B", "C": "C", "z": "z"}
    fixed = {k: v for k, v in inputs.items() if k not in names}
    outs = []
    for t in range(case.length):
        now = {names[k]: v[..., t] for k, v in inputs.items() if k in names}
        outs.append(fastlvm.ssm_step(state, **now, **fixed, backend=backend))
    assert relative_error(torch.stack(outs, dim=-1), whole) <= 1e-6
    assert relative_error(state, last) <= 1e-6


def test_steps_on_both_sides_of_the_softplus_threshold(backend):
    case = Ssm(channels=64, state=3)
    inputs = case.inputs()
    inputs["delta"] = torch.linspace(-40, 40, 3 * 64).reshape(3, 64)
    inputs["A"] *= 1e-2
    true_out, true_state = truth(case, inputs)
    out, state = advance(case, inputs, backend=backend)
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(state, true_state) <= FORWARD


@pytest.mark.parametrize(("name", "value"), extremes(["state", "x", "delta", "B", "C", "z"]))
def test_extreme_values_do_not_crash_and_stay_in_their_row(name, value, backend):
    case = Ssm(state=19)
    inputs = case.inputs()
    true_out, true_state = basic_truth(case)
    inputs[name][0] = value
    out, state = advance(case, inputs, backend=backend)
    assert relative_error(out[1:], true_out[1:]) <= FORWARD
    assert relative_error(state[1:], true_state[1:]) <= FORWARD


def test_constant_projections_are_refused():
    inputs = Ssm(batch=4).inputs()
    inputs["B"] = torch.zeros(5, 5)
    with pytest.raises(ValueError, match=r"ssm_step: B has shape \(5, 5\); wants \(b, N\) = \(4, 5\)"):
        fastlvm.ssm_step(**inputs)


@pytest.mark.parametrize("groups", [3, 8, 0])
@pytest.mark.parametrize("name", ["B", "C"])
def test_groups_divide_the_channels(name, groups):
    inputs = Ssm().inputs()
    inputs[name] = torch.zeros(3, groups, 5)
    with pytest.raises(ValueError, match=f"ssm_step: {name} has {groups} groups; wants a number that divides the 4"):
        fastlvm.ssm_step(**inputs)
