"""Mamba-2 in plain mlx: long sequences segment by segment, the memory and the operations that they take."""

from __future__ import annotations

import functools
import re

import pytest
import torch

import fastlvm
from fastlvm.ops.ssd_scan import reference_mlx
from fastlvm.ops.ssd_step import reference_mlx as step_mlx

from . import steps
from .mlx_arrays import all_mlx, floats, gradients, mx, to_mlx, to_torch
from .oracle import relative_error
from .ssd_cases import GRID, Ssd, truth

FORWARD, GRADIENT = 1e-5, 1e-4
LONG = [case for case in GRID if case.length > 128 and case.cuts is None]
LONG += [Ssd(length=200, heads=6, groups=3, state=9, options=o) for o in ((), ("z", "D"), ("initial_state",))]
VIEWS = {
    "Broadcast",
    "CustomTransforms",
    "ExpandDims",
    "Full",
    "Reshape",
    "Slice",
    "Squeeze",
    "StopGradient",
    "Transpose",
}

plain = functools.partial(fastlvm.ssd_scan, backend="reference", return_final_state=True)


@pytest.fixture(params=[32, 96], ids="segment-{}".format)
def segments(request, monkeypatch):
    """Several segments, the last of them ragged, of one chunk or two."""
    monkeypatch.setattr(reference_mlx, "_SEGMENT", request.param)


def _matches(case, dtype=torch.float32, weights=torch.float32):
    out, state = case.cotangents()
    found, grads = gradients(plain, all_mlx(case.inputs(dtype, weights)), [to_mlx(out.to(dtype)), to_mlx(state)])
    return found, grads, *truth(case, dtype, weights)


@pytest.mark.parametrize("case", LONG, ids=str)
def test_segments_match_the_oracle(case, segments):
    found, grads, wants, true_grads = _matches(case)
    assert [x.dtype for x in found] == [torch.float32] * 2
    assert all(relative_error(x, want) <= FORWARD for x, want in zip(found, wants, strict=True))
    assert grads.keys() == true_grads.keys()
    errors = {name: relative_error(grads[name], true_grads[name]) for name in grads}
    assert max(errors.values()) <= GRADIENT, errors


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str)
def test_segments_in_half_precision(dtype, limit, segments):
    """The state between them is of float32, and gradients of parameters are rounded once."""
    found, grads, wants, true_grads = _matches(Ssd(length=200, state=16), dtype, dtype)
    assert [x.dtype for x in found] == [dtype, torch.float32]
    assert relative_error(found[0], wants[0]) <= torch.finfo(dtype).eps
    assert relative_error(found[1], wants[1]) <= FORWARD
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert relative_error(grad, true_grads[name]) <= limit, name


def test_a_long_sequence_is_as_exact_as_a_short_one():
    inputs = Ssd(batch=1, length=4096, heads=2, dim=8, groups=1, state=16).inputs()
    truths = fastlvm.ssd_scan(
        **{name: x.double() if torch.is_tensor(x) else x for name, x in inputs.items()}, return_final_state=True
    )
    for x, want in zip(plain(**all_mlx(inputs)), truths, strict=True):
        assert relative_error(to_torch(x), want) <= 1e-6


def _function(case):
    inputs = all_mlx(case.inputs())
    leaves = floats(inputs)

    def total(*arrays):
        return sum(y.sin().sum() for y in plain(**inputs | dict(zip(leaves, arrays, strict=True))))

    return total, list(leaves.values())


def _derivatives(case):
    total, arrays = _function(case)
    along = [mx.random.normal(x.shape, key=mx.random.key(i)) for i, x in enumerate(arrays)]
    numbers = tuple(range(len(arrays)))
    gradient = mx.grad(total, numbers)

    def directed(*xs):
        return sum((a * g).sum() for a, g in zip(along, gradient(*xs), strict=True))

    mapped = (0, *[None] * (len(arrays) - 1))
    return {
        "compiled": mx.compile(gradient)(*arrays),
        "second derivatives": mx.grad(directed, numbers)(*arrays),
        "forward mode": mx.jvp(total, arrays, along)[1],
        "forward over reverse": mx.jvp(lambda *xs: list(gradient(*xs)), arrays, along)[1],
        "vmap of gradients": mx.vmap(gradient, in_axes=mapped)(mx.stack([arrays[0], 0.5 * arrays[0]]), *arrays[1:]),
        "one gradient": [mx.grad(total, 2)(*arrays)],
    }


def test_transformations_go_through_segments(monkeypatch):
    case = Ssd(batch=1, length=40, heads=2, dim=3, groups=1, state=4)
    wanted = _derivatives(case)
    monkeypatch.setattr(reference_mlx, "_SEGMENT", 32)
    for name, found in _derivatives(case).items():
        for x, y in zip(found, wanted[name], strict=True):
            assert float(mx.linalg.norm(x - y)) <= 1e-4 * float(mx.linalg.norm(y)) + 1e-6, name


def _peak(function, arrays):
    """Bytes that a call wants beside its arguments, at its peak."""
    mx.eval(*arrays)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(function(*arrays))
    return mx.get_peak_memory() - before


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU has other amounts in flight")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_layers_keep_their_inputs_alone_for_the_gradient(compiled, monkeypatch):
    inputs = all_mlx(Ssd(batch=1, length=8192, heads=4, dim=16, groups=1, state=16, options=()).inputs())

    def layers(x, *rest):
        for _ in range(3):
            x = x + plain(x, *rest)[0]
        return x.sum()

    def peak():
        gradient = mx.grad(layers, tuple(range(5)))
        return _peak(mx.compile(gradient) if compiled else gradient, list(inputs.values()))

    by_segments = peak()
    monkeypatch.setattr(reference_mlx, "_SEGMENT", 8192)
    at_once = peak()
    assert by_segments <= at_once / 4


def _kernels(tmp_path, *results):
    """Operations of a graph that move numbers."""
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), *results)
    names = re.findall(r'label ="(\w+)", shape=rectangle', path.read_text())
    return len([name for name in names if name not in VIEWS])


def test_a_segment_is_a_small_graph(tmp_path):
    inputs = all_mlx(Ssd(length=1024, state=16).inputs())
    assert _kernels(tmp_path, *plain(**inputs)) <= 40


STEP = steps.Ssd()


def test_a_step_is_a_small_graph(tmp_path):
    arrays = all_mlx(STEP.inputs())
    out = STEP.op(**arrays, backend="reference")
    assert _kernels(tmp_path, out, arrays["state"]) <= 20


def test_a_step_may_be_compiled_with_a_state_that_comes_back():
    """As it is on a GPU; on the CPU the public op refuses, since its kernels want values."""
    inputs = STEP.inputs()
    arrays = all_mlx(inputs)
    state = arrays.pop("state")
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus", "state_indices")

    def token(state, x):
        rest = [(arrays | {"x": x}).get(name) for name in names]
        out = step_mlx.run(state, *rest)
        return out, state

    found = mx.compile(token)(state, arrays["x"])
    for x, want in zip(found, steps.truth(STEP, inputs), strict=True):
        assert relative_error(to_torch(x), want) <= FORWARD
    with pytest.raises(ValueError, match=r"ssd_step: mlx traces this call .* use fastlvm.ssd_scan with initial_state"):
        mx.compile(lambda x: STEP.op(**arrays | {"x": x, "state": state}))(arrays["x"])
