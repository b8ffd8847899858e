"""One token of Mamba-2 against the float64 oracle and against the scan, on every backend and ISA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastlvm

from .oracle import extremes, relative_error
from .steps import SSD, Ssd, advance, as_numpy, basic_truth, truth

FORWARD = 1e-5

CASES = [Ssd(state=n) for n in (0, 1, 3, 16, 37, 64, 128, 256, 257, 600)]
CASES += [Ssd(groups=g, heads=4) for g in (1, 2, 4)]
CASES += [Ssd(options=o) for o in [(), *((name,) for name in SSD)]]
CASES += [Ssd(whole_D=True, options=("D",)), Ssd(whole_D=True, channels=70)]
CASES += [Ssd(batch=b, heads=h, channels=p) for b, h, p in [(0, 4, 3), (2, 0, 3), (2, 4, 0), (1, 2, 64), (2, 2, 130)]]
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
    state, ones, zeros = torch.full((1, 2, 3, 256), term), torch.ones(1, 1, 256), torch.zeros(1, 2, 3)
    out = fastlvm.ssd_step(state, zeros, zeros[..., 0], torch.zeros(2), ones, ones, backend=backend)
    assert relative_error(out, 256 * state[..., 0].double()) <= 5e-7


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_float64_is_exact(case, backend):
    inputs = case.inputs(torch.float64, torch.float64)
    true_out, true_state = basic_truth(case, torch.float64)
    out, state = advance(case, inputs, backend=backend)
    assert out.dtype == torch.float64
    assert relative_error(out, true_out) <= 1e-13
    assert relative_error(state, true_state) <= 1e-13


# Decays near one and far from it: a factor's rounding error must not pile up over a long memory.
@pytest.mark.parametrize("decay", [1e-5, 1e-2, 1.0, 100.0])
def test_a_loop_stays_with_the_oracle(decay, backend):
    case = Ssd(state=16, groups=2)
    inputs = case.inputs()
    inputs["A"] *= decay
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    outs, true_outs = [], []
    for t in range(64):
        fresh = {k: v for k, v in case.inputs(seed=t).items() if k in ("x", "dt", "B", "C", "z")}
        inputs.update(fresh)
        exact.update({k: v.double() for k, v in fresh.items()})
        outs.append(fastlvm.ssd_step(**inputs, backend=backend))
        true_out, after = truth(case, exact)
        exact["state"] = torch.from_numpy(after)
        true_outs.append(torch.from_numpy(true_out))
    assert relative_error(torch.stack(outs), torch.stack(true_outs)) <= 1e-6
    assert relative_error(inputs["state"], exact["state"]) <= 1e-6


@pytest.mark.parametrize("options", [SSD, ("D", "z"), ()], ids=["all", "plain", "bare"])
def test_the_loop_is_the_scan(options, backend):
    case, length = Ssd(batch=2, heads=4, channels=8, state=16, options=options), 40
    tokens = [case.inputs(seed=t) for t in range(length)]
    whole = {
        k: torch.stack([now[k] for now in tokens], dim=1) if k in ("x", "dt", "B", "C", "z") else v
        for k, v in tokens[0].items()
    }
    state = whole.pop("state")
    want, last = fastlvm.ssd_scan(**whole, initial_state=state, return_final_state=True, backend=backend)
    fixed = {k: v for k, v in whole.items() if k in ("A", "D", "dt_bias", "dt_softplus")}
    state = state.clone()
    outs = []
    for now in tokens:
        moving = {k: v for k, v in now.items() if k in ("x", "dt", "B", "C", "z")}
        outs.append(fastlvm.ssd_step(state, **moving, **fixed, backend=backend))
    assert relative_error(torch.stack(outs, dim=1), want) <= 1e-6
    assert relative_error(state, last) <= 1e-6


@pytest.mark.parametrize(("name", "value"), extremes(["state", "x", "dt", "B", "C", "z"]))
def test_extreme_values_do_not_crash_and_stay_in_their_row(name, value, backend):
    case = Ssd(state=19)
    inputs = case.inputs()
    true_out, true_state = basic_truth(case)
    inputs[name][0] = value
    out, state = advance(case, inputs, backend=backend)
    assert relative_error(out[1:], true_out[1:]) <= FORWARD
    assert relative_error(state[1:], true_state[1:]) <= FORWARD


@pytest.mark.parametrize("groups", [3, 8, 0])
def test_groups_divide_the_heads(groups):
    inputs = Ssd().inputs()
    inputs["B"] = inputs["C"] = torch.zeros(3, groups, 5)
    with pytest.raises(ValueError, match=f"ssd_step: B has {groups} groups; wants a number that divides the 4 heads"):
        fastlvm.ssd_step(**inputs)


def test_skip_weights_of_another_shape():
    for shape in ((3,), (4, 4), (1, 3)):
        with pytest.raises(ValueError, match="ssd_step: D has shape"):
            fastlvm.ssd_step(**{**Ssd().inputs(), "D": torch.zeros(shape)})
