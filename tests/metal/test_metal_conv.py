"""The Metal kernels of the causal convolution, emulated, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

import fastlvm  # noqa: E402
from fastlvm.ops import _metal  # noqa: E402
from fastlvm.ops.causal_conv1d import metal  # noqa: E402
from ops import oracle  # noqa: E402
from ops.cases import CONVS, Conv, truth  # noqa: E402
from ops.mlx_arrays import to_torch  # noqa: E402
from ops.oracle import relative_error  # noqa: E402
from ops.test_packed import _inputs as packed_inputs  # noqa: E402
from ops.test_packed import _truth as packed_truth  # noqa: E402

from .calls import CONV, HALF, arguments, backward, check, forward  # noqa: E402

CASES = [case for case in CONVS if case.width != 5]  # one width less to compile
CASES += [Conv(length=n, width=w) for n, w in [(31, 4), (32, 4), (100, 4), (3, 9)]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case):
    inputs = case.inputs()
    check(inputs, forward(inputs), backward(inputs, case.cotangents()), truth(case))


@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32-weights", "all-half"])
@pytest.mark.parametrize("dtype", list(HALF), ids=str)
def test_half_precision(dtype, weights):
    case = Conv(length=33)
    inputs = case.inputs(dtype, weights or dtype)
    wants, true_grads = truth(case, dtype, weights or dtype)
    outputs = forward(inputs)
    rtol, atol = HALF[dtype]
    assert {x.dtype for x in outputs} == {dtype}
    for got, want in zip(outputs, wants, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)
    for name, grad in backward(inputs, [g.to(dtype) for g in case.cotangents()]).items():
        assert grad.dtype == inputs[name].dtype
        assert relative_error(grad, true_grads[name]) <= {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype], name


LENGTHS = [(0,), (6,), (0, 3, 0, 0, 5, 0), (2, 5, 1, 9), (40, 0, 64, 1, 30), (33, 31, 65)]
PACKED = [(Conv(), lengths) for lengths in LENGTHS]
PACKED += [(Conv(width=9, options=("bias",)), (3, 0, 40)), (Conv(width=1), (3, 0, 4))]


@pytest.mark.parametrize(("case", "lengths"), PACKED, ids=str)
def test_packed_sequences(case, lengths):
    inputs = packed_inputs(case, lengths)
    wants, true_grads = packed_truth(fastlvm.causal_conv1d, inputs)
    g = torch.Generator().manual_seed(1)  # the one of `packed_truth`
    cotangents = [torch.randn(o.shape, generator=g).float() for o in wants]
    check(inputs, forward(inputs), backward(inputs, cotangents), (wants, true_grads))


@pytest.mark.parametrize("length", [5, 70])
def test_channel_last(length):
    case = Conv(length=length, channels=40)
    named = dict(zip(CONV, arguments(CONV, case.inputs()), strict=True))
    cotangents = [mx.array(g.numpy()) for g in case.cotangents()]
    for key in ("x", "initial_state"):
        named[key] = mx.contiguous(named[key].swapaxes(1, 2)).swapaxes(1, 2)
    cotangents = [mx.contiguous(g.swapaxes(1, 2)).swapaxes(1, 2) for g in cotangents]
    args = [named[key] for key in CONV]
    outputs, grads = metal.conv(*args, True), metal.conv_bwd(*cotangents, *args)
    found = dict(zip(metal.GRADIENTS, map(to_torch, grads), strict=True))
    check(case.inputs(), [to_torch(x) for x in outputs], found, truth(case))


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("length", [2, 40])
def test_one_cotangent_alone(given, length):
    case = Conv(length=length)
    inputs, cotangents = case.inputs(), case.cotangents()
    zeros = tuple(g if i == given else torch.zeros_like(g) for i, g in enumerate(cotangents))
    _, true_grads = oracle.run(oracle.causal_conv1d, inputs, zeros)
    grads = backward(inputs, [g if i == given else None for i, g in enumerate(cotangents)])
    check(inputs, [], grads, ([], true_grads))


def test_a_thread_takes_batch_entries_in_turn(monkeypatch, recorder):
    monkeypatch.setattr(_metal, "GROUPS", 1)
    case = Conv(batch=19, length=7)
    inputs = case.inputs()
    check(inputs, forward(inputs), backward(inputs, case.cotangents()), truth(case))
    assert recorder.launches[-1].grid[1] == 2  # 16 of them, and 3


def test_same_bits_every_time():
    inputs, cotangents = Conv(length=70, channels=17).inputs(), Conv(length=70, channels=17).cotangents()
    runs = [[x.numpy().tobytes() for x in backward(inputs, cotangents).values()] for _ in range(2)]
    assert runs[0] == runs[1]
