"""Wrong input to a one-token op is refused before any kernel runs, in a sentence that names the argument."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import fastlvm
from fastlvm.ops import dispatch

from .steps import BASIC, Conv, Ssd, Ssm, as_numpy

OPTIONAL = ("D", "z", "delta_bias", "dt_bias", "bias")
ARRAYS = [(case, name) for case in BASIC for name, x in case.inputs().items() if isinstance(x, torch.Tensor)]
FREE = [("A", 1), ("weight", 1), ("B", 1), ("C", 1), ("D", 1)]  # sizes that these arguments say, or one of several


def _id(value):
    return value if isinstance(value, str) else value.name


arrays = pytest.mark.parametrize(("case", "name"), ARRAYS, ids=_id)
steps = pytest.mark.parametrize("case", BASIC, ids=_id)


@pytest.fixture(params=["numpy", "torch"])
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch):
    def refuse(*args):
        raise AssertionError("a kernel ran on bad input")

    for case in BASIC:
        monkeypatch.setattr(f"fastlvm._C.{case.name}", refuse)
        monkeypatch.setattr(dispatch._OPS[case.name].backends["reference"], "step", refuse)


def _inputs(case, kind):
    return case.inputs() if kind == "torch" else as_numpy(case.inputs())


def _zeros(shape, kind):
    return torch.zeros(shape) if kind == "torch" else np.zeros(shape, np.float32)


def _fails(case, inputs, error, *parts):
    for backend in ("cpu", "reference"):
        with pytest.raises(error) as caught:
            case.op(**inputs, backend=backend)
        message = str(caught.value)
        assert message.startswith(f"{case.name}: "), message
        for part in parts:
            assert part in message, message
        assert "\n" not in message


@arrays
def test_every_axis_of_every_shape(case, name, kind):
    shape = tuple(case.inputs()[name].shape)
    for axis in range(len(shape)):
        if name == "x" or (name, axis) in FREE:
            continue
        for size in (shape[axis] + 1, shape[axis] - 1, 0):
            if isinstance(case, Conv) and (name, axis) == ("state", 2) and size > shape[axis]:
                continue  # a longer one is allowed
            inputs = _inputs(case, kind)
            inputs[name] = _zeros((*shape[:axis], size, *shape[axis + 1 :]), kind)
            # B says what n is
            _fails(case, inputs, ValueError, "has shape" if name == "B" else f" {name} has shape", "wants (")


@steps
def test_an_input_that_fits_nothing_else(case, kind):
    shape = tuple(case.inputs()["x"].shape)
    for axis in range(len(shape)):
        inputs = _inputs(case, kind)
        inputs["x"] = _zeros((*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]), kind)
        _fails(case, inputs, ValueError, "wants ")


@arrays
def test_wrong_rank(case, name, kind):
    for shape in ((), (1, 1, 1, 1, 1)):
        inputs = _inputs(case, kind)
        inputs[name] = _zeros(shape, kind)
        _fails(case, inputs, ValueError, f" {name} has {len(shape)} dimensions", "wants")


@arrays
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
def test_wrong_dtype(case, name, dtype, kind):
    inputs = _inputs(case, kind)
    x = inputs[name]
    inputs[name] = x.to(getattr(torch, dtype)) if kind == "torch" else x.astype(dtype)
    _fails(case, inputs, TypeError, f" {name} is {dtype}", "float32")


@arrays
def test_float64_goes_with_float64_only(case, name, kind):
    inputs = _inputs(case, kind)
    inputs[name] = inputs[name].double() if kind == "torch" else inputs[name].astype(np.float64)
    _fails(case, inputs, TypeError, "is float64", "float64 goes with float64 only")


@arrays
def test_not_an_array(case, name, kind):
    for wrong in ([1.0, 2.0], 3.0, "x", np.ma.masked_array(np.zeros((3, 4), np.float32))):
        inputs = {**_inputs(case, kind), name: wrong}
        _fails(
            case,
            inputs,
            TypeError,
            f" {name} is a {type(wrong).__name__}",
            "wants a numpy array, a torch tensor or an mlx array",
        )


@arrays
def test_mixed_kinds(case, name, kind):
    inputs = _inputs(case, kind)
    inputs[name] = _inputs(case, "numpy" if kind == "torch" else "torch")[name]
    _fails(case, inputs, TypeError, "ndarray", "Tensor")


@arrays
def test_required_arguments_are_not_none(case, name, kind):
    if name not in OPTIONAL:
        _fails(case, {**_inputs(case, kind), name: None}, TypeError, f" {name} is a NoneType")


@arrays
def test_devices_differ(case, name):
    inputs = _inputs(case, "torch")
    inputs[name] = inputs[name].to("meta")
    _fails(case, inputs, ValueError, " is on ", "meta", "cpu", "move them to one device")


@pytest.mark.parametrize(("case", "name"), [(Ssm(), "delta_softplus"), (Ssd(), "dt_softplus")], ids=_id)
@pytest.mark.parametrize("value", ["no", 1, None])
def test_flags_are_bools(case, name, value, kind):
    _fails(case, {**_inputs(case, kind), name: value}, TypeError, f"{name} is {value!r}")


@steps
def test_indices_are_integers_of_the_states_kind_and_place(case, kind):
    case = dataclasses.replace(case, states=5)
    inputs = _inputs(case, kind)

    def indices(dtype="int64", kind=kind, shape=3):
        return torch.zeros(shape, dtype=getattr(torch, dtype)) if kind == "torch" else np.zeros(shape, dtype)

    for dtype in ("float32", "int16", "uint8", "bool"):
        _fails(case, {**inputs, "state_indices": indices(dtype)}, TypeError, f"state_indices is {dtype}; wants int32")
    for wrong in ([0, 1, 2], 0, "x", indices(kind="numpy" if kind == "torch" else "torch")):
        message = f"state_indices is a {type(wrong).__name__}; wants a"
        _fails(case, {**inputs, "state_indices": wrong}, TypeError, message)
    for shape in (2, 4, 0):
        wrong = {**inputs, "state_indices": indices(shape=shape)}
        _fails(case, wrong, ValueError, f"state_indices has shape ({shape},)", "wants (b,) = (3,)")
    _fails(case, {**inputs, "state_indices": indices(shape=(3, 1))}, ValueError, "state_indices has 2 dimensions")
    if kind == "torch":
        wrong = {**inputs, "state_indices": indices().to("meta")}
        _fails(case, wrong, ValueError, "state_indices is on meta but state is on cpu")
    else:
        _fails(case, {**inputs, "state_indices": np.zeros(3, ">i4")}, TypeError, "state_indices is >i4; wants int32")


@steps
def test_states_are_as_many_as_rows_without_indices(case, kind):
    inputs = _inputs(dataclasses.replace(case, states=5), kind)
    _fails(case, inputs, ValueError, "state has shape (5, ", "wants (b, ", "= (3, ")


@steps
def test_explain_answers_and_refuses_as_the_op_does(case, kind, isa):
    cpu, *_, reference = fastlvm.explain(case.name, **_inputs(case, kind))
    assert (cpu.ok, reference.ok) == (True, True)
    assert isa in cpu.reason
    with pytest.raises(TypeError, match=f"{case.name}: state is a NoneType"):
        fastlvm.explain(case.name, **{**_inputs(case, kind), "state": None})
