"""Wrong input is refused before any kernel runs, in a sentence that names the argument."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastlvm

from .cases import Conv, Scan

SCAN_SHAPES = {
    "delta": (2, 4, 6),
    "A": (4, 5),
    "B": (2, 5, 6),
    "C": (2, 5, 6),
    "D": (4,),
    "z": (2, 4, 6),
    "delta_bias": (4,),
    "initial_state": (2, 4, 5),
}
CONV_SHAPES = {"weight": (4, 4), "bias": (4,), "initial_state": (2, 4, 3)}
CALLS = [(fastlvm.ssm_scan, Scan(), name) for name in ("u", *SCAN_SHAPES)]
CALLS += [(fastlvm.causal_conv1d, Conv(), name) for name in ("x", *CONV_SHAPES)]
SHAPES = [(fastlvm.ssm_scan, Scan(), *item) for item in SCAN_SHAPES.items()]
SHAPES += [(fastlvm.causal_conv1d, Conv(), *item) for item in CONV_SHAPES.items()]


def _id(value):
    return value if isinstance(value, str) else getattr(value, "__name__", None) or ""


@pytest.fixture(params=["numpy", "torch"])
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch):
    def refuse(*args):
        raise AssertionError("a kernel ran on bad input")

    for name in ("ssm_scan", "causal_conv1d"):
        monkeypatch.setattr(f"fastlvm._C.{name}", refuse)


def _inputs(case, kind):
    inputs = case.inputs()
    if kind == "torch":
        return inputs
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _like(x, shape):
    return torch.zeros(shape) if isinstance(x, torch.Tensor) else np.zeros(shape, np.float32)


def _fails(op, inputs, error, *parts, **kwargs):
    with pytest.raises(error) as caught:
        op(**inputs, **kwargs)
    message = str(caught.value)
    assert message.startswith(f"{op.__name__}: "), message
    for part in parts:
        assert part in message, message
    assert "\n" not in message


@pytest.mark.parametrize(("op", "case", "name", "shape"), SHAPES, ids=_id)
def test_every_axis_of_every_shape(op, case, name, shape, kind):
    for axis in range(len(shape)):
        if (name, axis) in (("A", 1), ("weight", 1)):
            continue  # N and W are what these two say
        for size in (shape[axis] + 1, shape[axis] - 1, 0, 1):
            inputs = _inputs(case, kind)
            inputs[name] = _like(inputs[name], (*shape[:axis], size, *shape[axis + 1 :]))
            _fails(op, inputs, ValueError, f" {name} has shape", str(shape))


@pytest.mark.parametrize(("op", "case", "name"), CALLS, ids=_id)
def test_wrong_rank(op, case, name, kind):
    for shape in ((), (1, 1, 1, 1, 1)):
        inputs = _inputs(case, kind)
        inputs[name] = _like(inputs[name], shape)
        _fails(op, inputs, ValueError, f" {name} has {len(shape)} dimensions", "wants")


@pytest.mark.parametrize(("name", "shape"), [("B", (2, 2, 5, 7)), ("C", (2, 2, 4, 6)), ("B", (4, 6)), ("C", (5, 5))])
def test_wrong_layout(name, shape, kind):
    inputs = _inputs(Scan(), kind)
    inputs[name] = _like(inputs[name], shape)
    _fails(fastlvm.ssm_scan, inputs, ValueError, f"{name} has shape", str(shape))


@pytest.mark.parametrize("groups", [3, 8, 0])
@pytest.mark.parametrize("name", ["B", "C"])
def test_groups_divide_the_channels(name, groups, kind):
    inputs = _inputs(Scan(), kind)
    inputs[name] = _like(inputs[name], (2, groups, 5, 6))
    _fails(fastlvm.ssm_scan, inputs, ValueError, f"{name} has {groups} groups", "divides the 4 channels")


def test_state_size_disagrees(kind):
    inputs = _inputs(Scan(), kind)
    inputs["A"] = _like(inputs["A"], (4, 7))
    _fails(fastlvm.ssm_scan, inputs, ValueError, "B has shape (2, 5, 6)", "(2, 7, 6)")


@pytest.mark.parametrize(("op", "case", "name"), CALLS, ids=_id)
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "bool", "complex64", "complex128"])
def test_wrong_dtype(op, case, name, dtype, kind):
    inputs = _inputs(case, kind)
    x = inputs[name]
    inputs[name] = x.to(getattr(torch, dtype)) if kind == "torch" else x.astype(dtype)
    _fails(op, inputs, TypeError, f" {name} is {dtype}", "float32")


@pytest.mark.parametrize(("op", "case", "name"), CALLS, ids=_id)
def test_float64_goes_with_float64_only(op, case, name, kind):
    inputs = _inputs(case, kind)
    inputs[name] = inputs[name].double() if kind == "torch" else inputs[name].astype(np.float64)
    _fails(op, inputs, TypeError, "is float64" if name not in "ux" else "is float32", "float64 goes with float64 only")


@pytest.mark.parametrize("dtype", [">f4", "longdouble", "object", "U4"])
def test_numpy_dtypes_no_kernel_reads(dtype):
    inputs = _inputs(Scan(), "numpy")
    inputs["delta"] = inputs["delta"].astype(dtype)
    _fails(fastlvm.ssm_scan, inputs, TypeError, "delta is", "float32")


@pytest.mark.parametrize(("op", "case", "name"), CALLS, ids=_id)
def test_not_an_array(op, case, name, kind):
    for wrong in ([1.0, 2.0], 3.0, "x", np.ma.masked_array(np.zeros((2, 4, 6), np.float32))):
        inputs = _inputs(case, kind)
        inputs[name] = wrong
        _fails(
            op,
            inputs,
            TypeError,
            f" {name} is a {type(wrong).__name__}",
            "wants a numpy array, a torch tensor or an mlx array",
        )


@pytest.mark.parametrize(("op", "case", "name"), CALLS, ids=_id)
def test_mixed_kinds(op, case, name, kind):
    inputs, others = _inputs(case, kind), _inputs(case, "numpy" if kind == "torch" else "torch")
    inputs[name] = others[name]
    _fails(op, inputs, TypeError, "ndarray", "Tensor")


@pytest.mark.parametrize(("op", "case", "name"), CALLS, ids=_id)
def test_required_arguments_are_not_none(op, case, name, kind):
    if name in ("D", "z", "delta_bias", "bias", "initial_state"):
        return
    inputs = _inputs(case, kind)
    inputs[name] = None
    _fails(op, inputs, TypeError, f" {name} is a NoneType")


@pytest.mark.parametrize(("op", "case", "name"), CALLS, ids=_id)
def test_devices_differ(op, case, name):
    inputs = _inputs(case, "torch")
    inputs[name] = inputs[name].to("meta")
    _fails(op, inputs, ValueError, " is on ", "meta", "cpu", "move them to one device")


def test_sparse_and_nested_tensors():
    inputs = _inputs(Scan(), "torch")
    _fails(fastlvm.ssm_scan, {**inputs, "A": inputs["A"].to_sparse()}, TypeError, "A has layout torch.sparse_coo")
    nested = torch.nested.nested_tensor([torch.zeros(4, 6), torch.zeros(4, 3)])
    _fails(fastlvm.ssm_scan, {**inputs, "delta": nested}, TypeError, "delta has layout")


@pytest.mark.parametrize("value", ["no", 1, None])
@pytest.mark.parametrize("name", ["delta_softplus", "return_final_state"])
def test_flags_are_bools(name, value, kind):
    _fails(fastlvm.ssm_scan, {**_inputs(Scan(), kind), name: value}, TypeError, f"{name} is {value!r}")


@pytest.mark.parametrize("value", ["relu", "SiLU", True, 0, ""])
def test_activation_is_known(value, kind):
    inputs = {**_inputs(Conv(), kind), "activation": value}
    _fails(fastlvm.causal_conv1d, inputs, ValueError, f"activation is {value!r}", '"silu"')


def test_a_filter_has_at_least_one_tap(kind):
    inputs = _inputs(Conv(options=()), kind)
    inputs["weight"] = _like(inputs["weight"], (4, 0))
    _fails(fastlvm.causal_conv1d, inputs, ValueError, "weight has shape (4, 0)", "W at least 1")


def test_torch_conv_weights_are_named_as_what_they_are():
    inputs = {**_inputs(Conv(), "torch"), "weight": torch.nn.Conv1d(4, 4, 4, groups=4).weight.detach()}
    _fails(fastlvm.causal_conv1d, inputs, ValueError, "weight has 3 dimensions (4, 1, 4)", "(D, W)")
