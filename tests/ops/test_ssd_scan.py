"""The scan of Mamba-2 against the float64 oracle, on every backend and instruction set."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastlvm

from .oracle import extremes, relative_error, run
from .ssd_cases import ALL, GRID, NAMES, TIMED, Ssd, gradients, ssd_oracle, truth
from .test_properties import VIEWS, few, tensor_view, view

FORWARD, GRADIENT = 1e-5, 1e-4


def _numpy(inputs):
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _check_gradients(got, want, limit):
    assert got.keys() == want.keys()
    errors = {name: relative_error(got[name], want[name]) for name in got}
    assert max(errors.values()) <= limit, errors


@pytest.mark.parametrize("case", GRID, ids=str)
def test_matches_the_oracle(case, backend):
    (out, final), grads = gradients(fastlvm.ssd_scan, case, backend=backend)
    (true_out, true_final), true_grads = truth(case)
    assert out.dtype == final.dtype == torch.float32
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(final, true_final) <= FORWARD
    _check_gradients(grads, true_grads, GRADIENT)


@pytest.mark.parametrize("case", GRID[::3], ids=str)
def test_float64_is_exact(case, backend):
    (out, final), grads = gradients(fastlvm.ssd_scan, case, torch.float64, torch.float64, backend=backend)
    (true_out, true_final), true_grads = truth(case, torch.float64, torch.float64)
    assert out.dtype == final.dtype == torch.float64
    assert relative_error(out, true_out) <= 1e-13
    assert relative_error(final, true_final) <= 1e-13
    _check_gradients(grads, true_grads, 1e-12)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_numpy_with_and_without_the_final_state(case, backend):
    """The two go separate ways where a sequence is short."""
    inputs = _numpy(case.inputs())
    out, final = fastlvm.ssd_scan(**inputs, return_final_state=True, backend=backend)
    alone = fastlvm.ssd_scan(**inputs, backend=backend)
    (true_out, true_final), _ = truth(case)
    assert type(out) is type(final) is type(alone) is np.ndarray
    assert out.dtype == final.dtype == alone.dtype == np.float32
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(alone, true_out) <= FORWARD
    assert relative_error(final, true_final) <= FORWARD


# The tolerances of the peers' own tests: rtol, atol; wider for dA and ddt.
HALF = {torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}
HALF_CASES = [Ssd(length=n, state=s, dim=p) for n, s, p in [(1, 5, 3), (5, 16, 16), (33, 16, 17), (5, 64, 32)]]


@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32-weights", "all-half"])
@pytest.mark.parametrize("dtype", list(HALF), ids=str)
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision(case, dtype, weights, backend):
    weights = weights or dtype
    (out, final), grads = gradients(fastlvm.ssd_scan, case, dtype, weights, backend=backend)
    (true_out, true_final), true_grads = truth(case, dtype, weights)
    rtol, atol = HALF[dtype]
    assert (out.dtype, final.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), true_out, rtol=rtol, atol=atol)
    assert relative_error(final, true_final) <= FORWARD
    for name, grad in grads.items():
        assert grad.dtype == case.inputs(dtype, weights)[name].dtype
        tolerance = {"A": (rtol, 5 * atol), "dt": (5 * rtol, 10 * atol)}.get(name, (rtol, atol))
        torch.testing.assert_close(grad.double(), true_grads[name], rtol=tolerance[0], atol=tolerance[1], msg=name)


def test_half_precision_numpy(backend):
    case = Ssd(state=16)
    out, final = fastlvm.ssd_scan(**_numpy(case.inputs(torch.float16)), return_final_state=True, backend=backend)
    (true_out, true_final), _ = truth(case, torch.float16)
    assert (out.dtype, final.dtype) == (np.float16, np.float32)
    np.testing.assert_allclose(out, true_out.numpy(), *HALF[torch.float16])
    assert relative_error(final, true_final) <= FORWARD


@pytest.mark.parametrize("options", [ALL, ("z",)], ids=["all", "from-zero"])
@pytest.mark.parametrize("length", [0, 3, 9, 16, 40, 150])
def test_is_the_selective_scan_with_one_decay_a_head(length, options, backend):
    """A channel of a head is a channel of ssm_scan whose A is the same in every state dimension."""
    case = Ssd(length=length, heads=4, dim=3, groups=2, state=16, options=options)
    inputs = case.inputs()
    out, state = fastlvm.ssd_scan(**inputs, return_final_state=True, backend=backend)

    def channels(M, width):  # [B, L, H, P] or [B, L, H] -> [B, H P, L]
        return (M if M.ndim == 4 else M[..., None].expand(-1, -1, -1, width)).flatten(2).transpose(1, 2)

    args = {
        "u": channels(inputs["x"], 3),
        "delta": channels(inputs["dt"], 3),
        "A": inputs["A"][:, None, None].expand(4, 3, 16).reshape(12, 16),
        "B": inputs["B"].permute(0, 2, 3, 1),
        "C": inputs["C"].permute(0, 2, 3, 1),
        "z": channels(inputs["z"], 3),
    }
    if options is ALL:
        args["D"], args["delta_bias"] = (inputs[name].repeat_interleave(3) for name in ("D", "dt_bias"))
        args |= {"delta_softplus": True, "initial_state": inputs["initial_state"].flatten(1, 2)}
    want, last = fastlvm.ssm_scan(**args, return_final_state=True, backend=backend)
    assert relative_error(channels(out, 3), want) <= 2e-6
    assert relative_error(state.flatten(1, 2), last) <= 2e-6


@pytest.mark.parametrize("cut", [0, 1, 20, 64, 150])
def test_two_halves_with_carried_state_are_the_whole(cut, backend):
    """Outputs, state and gradients, which flow back through the state handed over."""
    case = Ssd(length=150, state=16)
    wants, grads = gradients(fastlvm.ssd_scan, case, backend=backend)
    inputs = case.inputs()
    leaves = {k: inputs[k].requires_grad_() for k in NAMES}
    state, parts = leaves["initial_state"], []
    for span in (slice(0, cut), slice(cut, None)):
        now = {k: leaves[k][:, span] for k in TIMED}
        args = {**inputs, **now, "initial_state": state}
        part, state = fastlvm.ssd_scan(**args, return_final_state=True, backend=backend)
        parts.append(part)
    got = (torch.cat(parts, dim=1), state)
    assert all(relative_error(g, w) <= 1e-6 for g, w in zip(got, wants, strict=True))
    pieces = torch.autograd.grad(got, list(leaves.values()), case.cotangents())
    _check_gradients(dict(zip(NAMES, pieces, strict=True)), grads, 2e-6)


def test_step_by_step_is_the_whole(backend):
    inputs = Ssd(length=40, state=16).inputs()
    whole = fastlvm.ssd_scan(**inputs, backend=backend)
    state, steps = inputs.pop("initial_state"), []
    for t in range(40):
        now = {k: inputs[k][:, t : t + 1] for k in TIMED}
        out, state = fastlvm.ssd_scan(
            **{**inputs, **now}, initial_state=state, return_final_state=True, backend=backend
        )
        steps.append(out)
    assert relative_error(torch.cat(steps, dim=1), whole) <= 1e-6


PACKED = [c for c in GRID if c.cuts is not None]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_is_every_sequence_alone(case, backend):
    outputs, grads = gradients(fastlvm.ssd_scan, case, backend=backend)
    inputs = case.inputs()
    inputs["cu_seqlens"] = inputs["cu_seqlens"].long()
    again = fastlvm.ssd_scan(**inputs, return_final_state=True, backend=backend)
    del inputs["cu_seqlens"]
    leaves = {k: inputs[k].requires_grad_() for k in NAMES if k in inputs}
    outs, states = [], []
    for s, (begin, end) in enumerate(pairwise(case.offsets)):
        args = {**inputs, **{k: leaves[k][:, begin:end] for k in TIMED if k in leaves}}
        if "initial_state" in args:
            args["initial_state"] = leaves["initial_state"][s : s + 1]
        out, state = fastlvm.ssd_scan(**args, return_final_state=True, backend=backend)
        outs.append(out)
        states.append(state)
    alone = (torch.cat(outs, dim=1), torch.cat(states))
    for a, o, w in zip(again, outputs, alone, strict=True):
        assert torch.equal(a, o)
        assert torch.equal(o, w)
    want = torch.autograd.grad(alone, list(leaves.values()), case.cotangents())
    _check_gradients(grads, dict(zip(leaves, want, strict=True)), 1e-6)


def test_no_sequence_at_all(backend):
    inputs = Ssd(batch=1, length=0).inputs()
    inputs |= {"cu_seqlens": torch.zeros(1, dtype=torch.int32), "initial_state": torch.zeros(0, 4, 5, 5)}
    out, state = fastlvm.ssd_scan(**inputs, return_final_state=True, backend=backend)
    assert (out.shape, state.shape) == ((1, 0, 4, 5), (0, 4, 5, 5))


class TestAnyView:
    """Kernels read what an array means, never what lies beside it: gaps hold NaN."""

    cases = st.builds(
        lambda groups, heads, **sizes: Ssd(groups=groups, heads=groups * heads, **sizes),
        groups=st.integers(1, 3),
        heads=st.integers(0, 2),
        batch=st.integers(0, 2),
        length=st.one_of(st.integers(0, 20), st.just(70)),
        dim=st.one_of(st.integers(0, 20), st.sampled_from([64, 65])),
        state=st.one_of(st.integers(0, 20), st.sampled_from([64, 128])),
        options=st.sets(st.sampled_from(ALL)).map(lambda s: tuple(sorted(s))),
        D_per_channel=st.booleans(),
    )

    @staticmethod
    def _check(inputs, return_final_state, tolerance, every_isa):
        wants, _ = run(ssd_oracle, inputs)
        for isa in every_isa():
            outputs = fastlvm.ssd_scan(**inputs, return_final_state=return_final_state, backend="cpu")
            for got, want in zip(outputs if return_final_state else [outputs], wants, strict=False):
                limit = tolerance if str(got.dtype).removeprefix("torch.") != "float32" else FORWARD
                floor = max(1.0, want.numel() ** 0.5 / max(float(want.norm()), 1e-30))
                assert relative_error(got, want) <= limit * floor, isa

    @few
    @given(data=st.data())
    def test_numpy(self, data, every_isa):
        case, dtype = data.draw(self.cases), data.draw(st.sampled_from([torch.float32, torch.float16]))
        inputs = {
            k: view(v, data.draw(st.sampled_from(VIEWS))) if isinstance(v, np.ndarray) else v
            for k, v in _numpy(case.inputs(dtype)).items()
        }
        self._check(inputs, data.draw(st.booleans()), HALF[torch.float16][0] * 2, every_isa)

    @few
    @given(data=st.data())
    def test_torch(self, data, every_isa):
        case, dtype = data.draw(self.cases), data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
        inputs = {
            k: tensor_view(v, data.draw(st.sampled_from(VIEWS))) if isinstance(v, torch.Tensor) else v
            for k, v in case.inputs(dtype, torch.float64 if dtype == torch.float64 else torch.float32).items()
        }
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-13
        self._check(inputs, data.draw(st.booleans()), tolerance, every_isa)

    @few
    @given(data=st.data())
    def test_gradients(self, data, every_isa):
        case = data.draw(self.cases)
        inputs = {
            k: tensor_view(v, data.draw(st.sampled_from(VIEWS))) if isinstance(v, torch.Tensor) else v
            for k, v in case.inputs().items()
        }
        cotangents = [tensor_view(g, data.draw(st.sampled_from(VIEWS))) for g in case.cotangents()]

        def grads(copy):
            leaves = {k: copy(v).requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
            outputs = fastlvm.ssd_scan(**{**inputs, **leaves}, return_final_state=True, backend="cpu")
            return torch.autograd.grad(outputs, list(leaves.values()), [copy(g) for g in cotangents])

        for isa in every_isa():
            strided = grads(lambda x: x.detach())
            contiguous = grads(lambda x: x.detach().contiguous())
            assert all(torch.equal(s, c) for s, c in zip(strided, contiguous, strict=True)), isa


def test_inputs_are_left_alone(backend):
    case = Ssd(state=16, length=150)
    inputs, before = case.inputs(), case.inputs()
    fastlvm.ssd_scan(**inputs, backend=backend)
    gradients(fastlvm.ssd_scan, case, backend=backend)
    for name, value in before.items():
        assert value is True or torch.equal(inputs[name], value), name


def test_final_state_is_not_the_initial_state(backend):
    inputs = Ssd(length=0).inputs()
    _, final = fastlvm.ssd_scan(**inputs, return_final_state=True, backend=backend)
    assert torch.equal(final, inputs["initial_state"])
    assert final.data_ptr() != inputs["initial_state"].data_ptr()


@pytest.mark.parametrize("return_final_state", [False, True])
@pytest.mark.parametrize("length", [8, 70, 150])
def test_a_nan_reaches_every_later_output_and_no_earlier_one(length, return_final_state, backend):
    """Blocks of tokens are worked on together; none of a block may see what comes after it."""
    at = length - 5
    for name in ("x", "dt", "B"):
        inputs = Ssd(length=length, state=16, options=("z",)).inputs()
        inputs[name][0, at] = float("nan")
        got = fastlvm.ssd_scan(**inputs, return_final_state=return_final_state, backend=backend)
        out = got[0] if return_final_state else got
        assert bool(out[0, :at].isfinite().all()), name
        assert bool(out[0, at:].isnan().all()), name
        assert bool(out[1].isfinite().all()), name
        if return_final_state:
            assert bool(got[1][0].isnan().all()), name
            assert bool(got[1][1].isfinite().all()), name


@pytest.mark.parametrize("decay", [1e4, 1e2, 1e-8])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_decays_of_any_strength(decay, scale, backend):
    """Strong and weak decays beside each other in time and over heads: right, not only finite."""
    case = Ssd(length=150, state=16, options=("initial_state", "z"))
    inputs = case.inputs()
    inputs["A"] = -decay * torch.tensor([1.0, 1e-2, 1e-4, 0.0])
    inputs["dt"][:, ::7] *= 50
    inputs["dt"][:, 1::7] *= 1e-6
    for name in ("x", "B", "C"):
        inputs[name] = scale * inputs[name]
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    got = fastlvm.ssd_scan(**leaves, return_final_state=True, backend=backend)
    want, true_grads = run(ssd_oracle, inputs, case.cotangents())
    assert all(relative_error(g, w) <= FORWARD for g, w in zip(got, want, strict=True))
    grads = torch.autograd.grad(got, list(leaves.values()), case.cotangents())
    _check_gradients(dict(zip(leaves, grads, strict=True)), true_grads, GRADIENT)


@pytest.mark.parametrize(("name", "value"), extremes(NAMES))
def test_extreme_values_do_not_crash_and_stay_in_their_batch(name, value, backend):
    case = Ssd(state=16, length=20)
    inputs = case.inputs()
    inputs[name][0] = value
    out, final = fastlvm.ssd_scan(**inputs, return_final_state=True, backend=backend)
    if name not in ("A", "D", "dt_bias"):
        (true_out, true_final), _ = truth(case)
        assert relative_error(out[1], true_out[1]) <= FORWARD
        assert relative_error(final[1], true_final[1]) <= FORWARD


# Enough work that threads share it, and sizes that do not divide evenly.
SHARED = [
    Ssd(batch=1, length=200, heads=10, dim=33, groups=1, state=65),
    Ssd(batch=3, length=50, heads=15, dim=17, groups=3, state=64),
    Ssd(batch=1, length=300, heads=6, dim=64, groups=2, state=64, cuts=(7, 7, 150)),
]


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_same_bits_every_time_and_on_any_number_of_threads(case, isa, threads):
    def bits():
        outputs, grads = gradients(fastlvm.ssd_scan, case, backend="cpu")
        return [t.numpy().tobytes() for t in (*outputs, *grads.values())]

    fastlvm.set_num_threads(1)
    want = bits()
    for count in (1, 2, 3, 2):
        fastlvm.set_num_threads(count)
        assert all(bits() == want for _ in range(3))
