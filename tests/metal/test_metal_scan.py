"""The Metal kernels of the selective scan, emulated, against the float64 oracle."""

from __future__ import annotations

import math

import pytest
import torch

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

import fastlvm  # noqa: E402
from fastlvm.ops import _metal  # noqa: E402
from fastlvm.ops.ssm_scan import metal  # noqa: E402
from ops import oracle  # noqa: E402
from ops.cases import ALL, SCANS, Scan, truth  # noqa: E402
from ops.mlx_arrays import to_torch  # noqa: E402
from ops.oracle import GRADIENTS, extremes, relative_error  # noqa: E402
from ops.test_packed import _inputs as packed_inputs  # noqa: E402
from ops.test_packed import _truth as packed_truth  # noqa: E402

from .calls import FORWARD, HALF, SCAN, arguments, backward, check, forward  # noqa: E402

MORE = [Scan(length=n, state=16) for n in (16, 17, 100, 129)]
MORE += [Scan(length=n, state=3) for n in (5, 9, 70)]
MORE += [
    Scan(length=5, state=128, channels=9),
    Scan(length=5, state=300, channels=2),
    Scan(length=520, batch=1, channels=2),
]


@pytest.mark.parametrize("case", [*SCANS, *MORE], ids=str)
def test_matches_the_oracle(case):
    inputs = case.inputs()
    check(inputs, forward(inputs), backward(inputs, case.cotangents()), truth(case))


@pytest.mark.parametrize("case", [case for case in [*SCANS, *MORE] if case.length > 60 or case.decay != 1], ids=str)
def test_functions_as_inexact_as_metal_allows(case, recorder):
    """Four units in the last place (Metal Shading Language Specification, section 8)."""
    recorder.ulps = 4
    inputs = case.inputs()
    check(inputs, forward(inputs), backward(inputs, case.cotangents()), truth(case))


HALF_CASES = [(dtype, weights, length) for dtype in HALF for weights in (torch.float32, dtype) for length in (5, 33)]


@pytest.mark.parametrize(("dtype", "weights", "length"), HALF_CASES, ids=str)
def test_half_precision(dtype, weights, length):
    case = Scan(length=length, state=16, B=2)
    inputs = case.inputs(dtype, weights)
    (true_out, true_final), true_grads = truth(case, dtype, weights)
    out, final = forward(inputs)
    rtol, atol = HALF[dtype]
    assert (out.dtype, final.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), true_out, rtol=rtol, atol=atol)
    assert relative_error(final, true_final) <= FORWARD
    out_cotangent, final_cotangent = case.cotangents()
    grads = backward(inputs, (out_cotangent.to(dtype), final_cotangent))
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        tolerance = {"A": (rtol, 5 * atol), "delta": (5 * rtol, 10 * atol)}.get(name, (rtol, atol))
        if weights == torch.float32 and name in ("D", "delta_bias", "initial_state"):
            tolerance = (1e-3, 1e-3)
        torch.testing.assert_close(grad.double(), true_grads[name], rtol=tolerance[0], atol=tolerance[1], msg=name)


@pytest.mark.parametrize("dtype", list(HALF), ids=str)
def test_half_precision_is_rounded_to_nearest(dtype):
    case = Scan(length=5, state=16, B=2)
    out, _ = forward(case.inputs(dtype))
    half_a_unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    torch.testing.assert_close(out.double(), truth(case, dtype)[0][0], rtol=1.01 * half_a_unit, atol=1e-5)


LENGTHS = [(0,), (6,), (0, 3, 0, 0, 5, 0), (2, 5, 1, 9), (40, 0, 257), (300, 270)]
PACKED = [(Scan(state=4, channels=2), lengths) for lengths in LENGTHS]
PACKED += [(Scan(state=16, B=2, C="dn"), (2, 0, 33)), (Scan(state=3, B="dn", C=4, options=("z",)), (0, 3, 257, 0))]


@pytest.mark.parametrize(("case", "lengths"), PACKED, ids=str)
def test_packed_sequences(case, lengths):
    inputs = packed_inputs(case, lengths)
    wants, true_grads = packed_truth(fastlvm.ssm_scan, inputs)
    g = torch.Generator().manual_seed(1)  # the one of `packed_truth`
    cotangents = [torch.randn(o.shape, generator=g).float() for o in wants]
    check(inputs, forward(inputs), backward(inputs, cotangents), (wants, true_grads))


def test_offsets_may_be_of_numpy():
    inputs = packed_inputs(Scan(state=4, channels=2), (2, 5, 1, 9))
    args = arguments(SCAN, inputs)
    args[-1] = inputs["cu_seqlens"].numpy()
    for got, want in zip(metal.scan(*args, True)[:2], forward(inputs), strict=True):
        assert torch.equal(to_torch(got), want)


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("how", ["channel-last", "every-other", "backwards", "expanded"])
def test_any_strides(how, length):
    """What lies beside an array is poison: the emulation would end at an access outside of it."""
    case = Scan(length=length, state=16, B=2)
    named = dict(zip(SCAN, arguments(SCAN, case.inputs()), strict=True))
    arrays = {key: x for key, x in named.items() if isinstance(x, mx.array)}

    def view(x):
        if how == "channel-last" and x.ndim > 2:
            return mx.contiguous(x.swapaxes(-1, -2)).swapaxes(-1, -2)
        if how == "every-other":
            return mx.stack([x, mx.full(x.shape, math.nan, x.dtype)], axis=-1).reshape(*x.shape[:-1], -1)[..., ::2]
        if how == "backwards":
            return mx.contiguous(x[..., ::-1])[..., ::-1]
        return mx.broadcast_to(x[:1], x.shape) if x.ndim > 1 else x

    views = {key: view(x) for key, x in arrays.items()}
    inputs = {key: to_torch(x) if isinstance(x, mx.array) else x for key, x in {**named, **views}.items()}
    inputs = {key: x for key, x in inputs.items() if x is not None}
    grad_out, grad_final = (mx.array(g.numpy()) for g in case.cotangents())
    args = [{**named, **views}[key] for key in SCAN]
    outputs = metal.scan(*args, True)[:2]
    grads = metal.scan_bwd(view(grad_out), grad_final, *args)
    want = oracle.run(oracle.ssm_scan, inputs, (to_torch(view(grad_out)), to_torch(grad_final)))
    check(inputs, [to_torch(x) for x in outputs], dict(zip(GRADIENTS, map(to_torch, grads), strict=True)), want)


@pytest.mark.parametrize("length", [5, 9])
@pytest.mark.parametrize("given", [0, 1])
def test_one_cotangent_alone(given, length):
    case = Scan(length=length, state=16)
    inputs, cotangents = case.inputs(), case.cotangents()
    zeros = tuple(g if i == given else torch.zeros_like(g) for i, g in enumerate(cotangents))
    _, true_grads = oracle.run(oracle.ssm_scan, inputs, zeros)
    grads = backward(inputs, [g if i == given else None for i, g in enumerate(cotangents)])
    check(inputs, [], grads, ([], true_grads))


def test_states_kept_by_the_forward_are_those_the_backward_computes_again(recorder):
    case = Scan(length=520, batch=2, channels=2)
    args = arguments(SCAN, case.inputs())
    kept = metal.scan(*args, False, keep=True)[2]
    cotangents = [mx.array(g.numpy()) for g in case.cotangents()]
    with_kept = metal.scan_bwd(*cotangents, *args, kept)
    assert [launch.name for launch in recorder.launches] == ["fastlvm_ssm_scan", "fastlvm_ssm_scan_bwd"]
    again = metal.scan_bwd(*cotangents, *args)
    assert [launch.name for launch in recorder.launches[2:]] == ["fastlvm_ssm_scan", "fastlvm_ssm_scan_bwd"]
    assert all(mx.array_equal(a, b) for a, b in zip(with_kept, again, strict=True))


def test_a_threadgroup_takes_sequences_and_channels_in_turn(monkeypatch, recorder):
    monkeypatch.setattr(_metal, "GROUPS", 1)
    monkeypatch.setattr(metal, "ENOUGH", 1)  # 16 states a lane
    case = Scan(batch=35, channels=6, state=16, length=4, B=2)
    inputs = case.inputs()
    check(inputs, forward(inputs), backward(inputs, case.cotangents()), truth(case))
    scan, bwd = recorder.launches
    assert scan.grid[1] == 1  # all 35 sequences
    assert bwd.grid[0] == 2 * bwd.threadgroup[0]  # a block for each group of B


@pytest.mark.parametrize(
    "case", [Scan(channels=21, state=17, length=40), Scan(channels=20, B=2, C="dn", length=300)], ids=str
)
def test_a_threadgroup_of_the_long_backward_takes_channels_in_turn(case, monkeypatch, recorder):
    """As it does where the sums of all threadgroups would take too much memory."""
    monkeypatch.setattr(metal, "SUMS", 1)
    inputs = case.inputs()
    check(inputs, [], backward(inputs, case.cotangents()), ([], truth(case)[1]))
    units = 2 if case.B == 2 else 1
    assert recorder.launches[-1].grid[0] == units * recorder.launches[-1].threadgroup[0]


@pytest.mark.parametrize("case", [Scan(channels=40), Scan(channels=20, state=1, length=11)], ids=str)
def test_same_bits_every_time(case):
    def bits():
        inputs = case.inputs()
        return [x.numpy().tobytes() for x in (*forward(inputs), *backward(inputs, case.cotangents()).values())]

    assert bits() == bits()


@pytest.mark.parametrize(("name", "value"), extremes(GRADIENTS)[::2])
def test_extreme_values_stay_in_their_batch(name, value):
    case = Scan(state=16, length=8)
    inputs = case.inputs()
    inputs[name][0] = value
    out, final = forward(inputs)
    grads = backward(inputs, case.cotangents())
    if name in ("u", "delta", "B", "C", "z", "initial_state"):
        (true_out, true_final), true_grads = truth(case)
        assert relative_error(out[1], true_out[1]) <= FORWARD
        assert relative_error(final[1], true_final[1]) <= FORWARD
        assert relative_error(grads["u"][1], true_grads["u"][1]) <= FORWARD


@pytest.mark.parametrize("options", [ALL, ()], ids=["all", "bare"])
def test_only_what_is_given_is_read(options, recorder):
    """Whatever stands for a missing array is bound, and left alone."""
    case = Scan(length=9, state=16, options=options)
    inputs = case.inputs()
    forward(inputs)
    backward(inputs, case.cotangents())
    for launch in recorder.launches:
        for name, key in (("D", "D"), ("z", "z"), ("delta_bias", "delta_bias"), ("initial", "initial_state")):
            assert (launch.loads[name][0] > 0) == (key in inputs), (launch.name, name)
        assert launch.loads["offsets"] == (0, 0)
