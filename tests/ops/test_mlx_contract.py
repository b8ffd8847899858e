"""What the ops say to mlx arrays: what is refused, what runs where, and what of their memory is used."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastlvm
from fastlvm import _C
from fastlvm.ops import _arrays

from . import steps
from .cases import Conv, Scan
from .mlx_arrays import all_mlx, calls, mx, to_mlx
from .nce_cases import Nce
from .ssd_cases import Ssd

CASES = {"ssm_scan": Scan(), "causal_conv1d": Conv(), "ssd_scan": Ssd(), "info_nce": Nce()}
CASES |= {case.name: case for case in steps.BASIC}
ARRAYS = [(op, name) for op, case in CASES.items() for name, x in case.inputs().items() if torch.is_tensor(x)]
OPTIONAL = ("D", "z", "delta_bias", "dt_bias", "bias", "initial_state", "mask")

ops = pytest.mark.parametrize("op", CASES)
arrays = pytest.mark.parametrize(("op", "name"), ARRAYS)


def _fails(op, inputs, error, *parts):
    for backend in ("auto", "mlx", "reference"):
        with pytest.raises(error) as caught:
            getattr(fastlvm, op)(**inputs, backend=backend)
        message = str(caught.value)
        assert message.startswith(f"{op}: ") and "\n" not in message, message
        for part in parts:
            assert part in message, message


@pytest.fixture(autouse=True)
def no_pin(monkeypatch):
    monkeypatch.delenv("FASTLVM_BACKEND", raising=False)


@arrays
def test_kinds_are_not_mixed(op, name):
    tensors = CASES[op].inputs()
    for other in (tensors[name], tensors[name].numpy()):
        inputs = all_mlx(tensors) | {name: other}
        _fails(op, inputs, TypeError, f"a {type(other).__name__}", "a array")
    for wrong in ([1.0, 2.0], 3.0, "x"):
        inputs = all_mlx(tensors) | {name: wrong}
        _fails(op, inputs, TypeError, f" {name} is a {type(wrong).__name__}; wants a numpy", "mlx array")


@arrays
@pytest.mark.parametrize("dtype", ["int32", "bool_", "uint8", "complex64"])
def test_dtypes_no_kernel_takes(op, name, dtype):
    inputs = all_mlx(CASES[op].inputs())
    inputs[name] = inputs[name].astype(getattr(mx, dtype))
    _fails(op, inputs, TypeError, f" {name} is {dtype.rstrip('_')}; wants", "float32")


@arrays
def test_float64_goes_with_float64_only(op, name):
    inputs = all_mlx(CASES[op].inputs())
    inputs[name] = inputs[name].astype(mx.float64)
    _fails(op, inputs, TypeError, "float64 goes with float64 only")


@arrays
def test_ranks_and_shapes(op, name):
    inputs = all_mlx(CASES[op].inputs())
    _fails(op, inputs | {name: mx.zeros((1,) * 5)}, ValueError, f" {name} has 5 dimensions")
    if (op, name) not in [("causal_conv1d", "x"), ("causal_conv1d_step", "state")]:  # of any length
        wrong = mx.zeros((*inputs[name].shape[:-1], inputs[name].shape[-1] + 3))
        _fails(op, inputs | {name: wrong}, ValueError, " has shape " if name not in ("B", "C") else "has ")


@arrays
def test_required_arguments_are_not_none(op, name):
    if name not in OPTIONAL:
        _fails(op, all_mlx(CASES[op].inputs()) | {name: None}, TypeError, f" {name} is a NoneType")


def test_offsets_indices_masks_and_temperature():
    scan, step, loss = (all_mlx(case.inputs()) for case in (Scan(batch=1), steps.Ssm(), Nce()))
    for wrong in (mx.array([0.0, 6.0]), mx.array([0, 6], mx.uint8)):
        _fails("ssm_scan", scan | {"cu_seqlens": wrong}, TypeError, "cu_seqlens is ", "wants int32 or int64")
        _fails("ssm_step", step | {"state_indices": wrong}, TypeError, "state_indices is ", "wants int32 or int64")
    for wrong in (np.array([0, 6]), torch.tensor([0, 6])):
        _fails("ssm_scan", scan | {"cu_seqlens": wrong}, TypeError, "cu_seqlens is a ", "wants mlx arrays")
        _fails("ssm_step", step | {"state_indices": wrong}, TypeError, "state_indices is a ", "wants an mlx array")
    _fails("info_nce", loss | {"mask": np.ones((7, 7), bool)}, TypeError, "mask is a ndarray; wants an mlx array")
    _fails("info_nce", loss | {"temperature": mx.array(0.1)}, TypeError, "for a learned one")


@ops
def test_explain_names_the_backend(op):
    inputs = all_mlx(CASES[op].inputs())
    found = {v.backend: v for v in fastlvm.explain(op, **inputs)}
    assert list(found) == ["cpu", "triton", "mlx", "reference"]
    assert [v.ok for v in found.values()] == [False, False, True, True]
    assert "compiled kernels" in found["mlx"].reason and "memory of mlx arrays" in found["mlx"].reason
    assert "mlx's" in found["cpu"].reason
    with pytest.raises(ValueError, match=f"{op}: backend='cpu' cannot run this call: arrays are mlx's"):
        getattr(fastlvm, op)(**inputs, backend="cpu")
    for others in (CASES[op].inputs(), steps.as_numpy(CASES[op].inputs())):
        with pytest.raises(ValueError, match=f"{op}: backend='mlx' cannot run this call: wants mlx arrays"):
            getattr(fastlvm, op)(**others, backend="mlx")


@ops
@pytest.mark.parametrize("metal", [False, True])
def test_on_the_gpu_plain_mlx_runs_where_there_is_no_kernel(op, metal, monkeypatch):
    if metal and importlib.util.find_spec(f"fastlvm.ops.{op}.metal_op"):
        pytest.skip("has kernels there: tests/metal")
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    inputs = all_mlx(CASES[op].inputs())
    found = {v.backend: v for v in fastlvm.explain(op, **inputs)}
    assert [v.ok for v in found.values()] == [False, False, False, True]
    with pytest.raises(ValueError, match=rf"{op}: backend='mlx' cannot run this call: .*gpu.*mx.stream\(mx.cpu\)"):
        getattr(fastlvm, op)(**inputs, backend="mlx")
    monkeypatch.setattr(calls, "empty_like", None)  # no kernel can run
    getattr(fastlvm, op)(**inputs)


def test_bfloat16_that_mlx_does_not_show_goes_to_plain_mlx(monkeypatch):
    monkeypatch.setattr(calls, "shows_bfloat16", lambda: False)
    inputs = all_mlx(Scan().inputs(torch.bfloat16))
    assert not fastlvm.explain("ssm_scan", **inputs)[2].ok
    assert fastlvm.ssm_scan(**inputs).dtype == mx.bfloat16
    assert fastlvm.explain("ssm_scan", **all_mlx(Scan().inputs()))[2].ok


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.float64], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1)], ids=str)
def test_a_result_lies_in_memory_as_its_input_does(order, dtype):
    """So that a channel-last model goes on without a copy."""
    x = mx.random.normal([(2, 4, 6)[axis] for axis in order]).astype(dtype)
    x = mx.transpose(x, [order.index(axis) for axis in range(3)])
    mx.eval(x)
    weights = mx.ones((4, 4), dtype)
    for out in (fastlvm.causal_conv1d(x, weights), fastlvm.ssm_scan(x, x, -weights, weights, weights)):
        mx.eval(out)
        assert out.shape == x.shape and out.dtype == dtype
        assert memoryview(out).strides == memoryview(x).strides


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.float64], ids=str)
def test_nothing_is_copied_on_the_way(dtype, monkeypatch):
    """The kernels get the very memory of the arguments, and the result is the memory that they wrote."""
    x, weight = mx.random.normal((2, 4, 6)).astype(dtype), mx.ones((4, 3), dtype)
    mx.eval(x, weight)
    seen = []
    original = _C.causal_conv1d

    def spy(x, weight, bias, silu, initial_state, out, final_state, cu_seqlens):
        seen.extend(map(_address, (x, weight, out)))
        original(x, weight, bias, silu, initial_state, out, final_state, cu_seqlens)

    monkeypatch.setattr(_C, "causal_conv1d", spy)
    out = fastlvm.causal_conv1d(x, weight)
    mx.eval(out)
    assert seen == list(map(_address, (x, weight, out)))


def _address(x):
    x = x.array if hasattr(x, "array") else x
    if isinstance(x, np.ndarray):
        return x.ctypes.data
    return np.asarray(memoryview(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)).ctypes.data


@ops
def test_inputs_are_left_alone(op):
    inputs, before = all_mlx(CASES[op].inputs()), all_mlx(CASES[op].inputs())
    getattr(fastlvm, op)(**inputs)
    for name, value in before.items():
        if isinstance(value, mx.array) and name != "state":
            assert mx.array_equal(inputs[name], value).item(), name


@pytest.mark.parametrize("view", ["reversed", "every other", "one for all", "transposed", "a slice"])
@pytest.mark.parametrize("op", ["ssm_scan", "causal_conv1d", "ssd_scan"])
def test_views_are_read_as_they_are(op, view):
    ways = {
        "reversed": lambda x: x[::-1][::-1] if x.ndim == 1 else x[:, ::-1][:, ::-1],
        "every other": lambda x: mx.repeat(x, 2, axis=-1)[..., ::2],
        "one for all": lambda x: mx.broadcast_to(x[:1], x.shape),
        "transposed": lambda x: mx.contiguous(x.T).T,
        "a slice": lambda x: mx.concatenate([x, x], axis=-1)[..., x.shape[-1] :],
    }
    inputs = all_mlx(CASES[op].inputs())
    views = {name: ways[view](x) if isinstance(x, mx.array) else x for name, x in inputs.items()}
    plain = {name: mx.array(np.array(x)) if isinstance(x, mx.array) else x for name, x in views.items()}
    got, want = (getattr(fastlvm, op)(**given, return_final_state=True) for given in (views, plain))
    assert all(mx.allclose(x, y, rtol=1e-6, atol=1e-6).item() for x, y in zip(got, want, strict=True))


def test_arrays_that_are_not_evaluated_yet_are():
    inputs = all_mlx(Scan().inputs())
    late = {name: x + 0 if isinstance(x, mx.array) else x for name, x in inputs.items()}
    assert mx.array_equal(fastlvm.ssm_scan(**late), fastlvm.ssm_scan(**inputs)).item()


def test_an_error_of_mlx_is_not_taken_for_tracing(monkeypatch):
    def fail(arrays):
        raise ValueError("[malloc] Unable to allocate")

    monkeypatch.setattr(calls.mx, "eval", fail, raising=False)
    with pytest.raises(ValueError, match="Unable to allocate"):
        calls.evaluated([])


def test_torch_stays_out():
    code = (
        "import sys, mlx.core as mx, fastlvm; u = mx.ones((1, 2, 3)); A = -mx.ones((2, 4));"
        "loss = lambda u: fastlvm.causal_conv1d(fastlvm.ssm_scan(u, u, A, A, A), A).sum();"
        "g = mx.grad(loss)(u); g2 = mx.compile(mx.grad(loss))(u);"
        "x = mx.ones((1, 3, 2, 4)); fastlvm.ssd_scan(x, x[..., 0], A[:, 0], x[:, :, :1], x[:, :, :1]);"
        "s = mx.zeros((1, 2, 4)); fastlvm.ssm_step(s, u[..., 0], u[..., 0], A, A[:1], A[:1]);"
        "mx.eval(fastlvm.info_nce(A, A)); print(mx.allclose(g, g2).item(), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "True False"


def test_a_tensor_is_one_still():
    assert _arrays.kind(torch.zeros(1)) == "torch"
    assert _arrays.kind(np.zeros(1)) == "numpy"
    assert _arrays.kind(to_mlx(torch.zeros(1))) == "mlx"
    assert _arrays.kind([mx.zeros(1)]) is None
