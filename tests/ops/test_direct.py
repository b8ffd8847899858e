"""Past torch's dispatcher: who is let through straight, who is not, and that nobody can tell by the results."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastlvm
from fastlvm import _C

from . import ssd_cases, steps
from .cases import Conv, Scan
from .steps import copied

WHOLE = {"ssm_scan": Scan(), "causal_conv1d": Conv(), "ssd_scan": ssd_cases.Ssd()}
STEPS = {case.name: case for case in steps.BASIC}
CASES = WHOLE | STEPS
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

every = pytest.mark.parametrize("name", CASES)
whole = pytest.mark.parametrize("name", WHOLE)
step = pytest.mark.parametrize("name", STEPS)


@pytest.fixture
def seen(monkeypatch):
    """The names of the ops that are called through the dispatcher."""
    names = []
    call = torch._ops.OpOverload.__call__

    def spy(self, /, *args, **kwargs):
        names.append(self.name())
        return call(self, *args, **kwargs)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", spy)
    return names


class _Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    pass


class _Quiet(torch.Tensor):
    """A subclass of which torch's own functions take no notice."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def _lead(name):
    return "u" if name == "ssm_scan" else "x"


def _inputs(name, dtype=torch.float32, **changes):
    case = CASES[name]
    return (dataclasses.replace(case, **changes) if changes else case).inputs(dtype, dtype)


def _run(name, inputs):
    """All results of a call, the state that it wrote among them."""
    if name in STEPS:
        return getattr(fastlvm, name)(**inputs, backend="cpu"), inputs["state"]
    return getattr(fastlvm, name)(**inputs, return_final_state=True, backend="cpu")


def _dispatched(name, inputs):
    with _Log():
        return _run(name, copied(inputs))


def _equal(got, want):
    pairs = list(zip(got, want, strict=True))
    return all(g.dtype == w.dtype and g.stride() == w.stride() and torch.equal(g, w) for g, w in pairs)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_without_gradients_a_call_is_straight(name, dtype, mode, seen):
    inputs = _inputs(name, dtype)
    want = _dispatched(name, inputs)
    assert f"fastlvm::{name}" in seen
    seen.clear()
    with mode():
        got = _run(name, copied(inputs))
    assert seen == []
    assert not any(g.requires_grad for g in got)
    assert got[0].is_inference() == (mode is torch.inference_mode)
    with torch.inference_mode(mode is torch.inference_mode):
        assert _equal(got, want)


@every
def test_strides_optional_arguments_and_empty_arrays(name, seen):
    lead = _lead(name)
    strided = _inputs(name)
    strided[lead] = strided[lead].transpose(0, 1).contiguous().transpose(0, 1)
    for inputs in (strided, _inputs(name, options=()), _inputs(name, batch=0)):
        want = _dispatched(name, inputs)
        seen.clear()
        assert _equal(_run(name, copied(inputs)), want)
        assert seen == [] or inputs[lead].numel() == 0


@whole
def test_packed_sequences_are_straight(name, seen):
    inputs = _inputs(name, batch=1, options=()) | {"cu_seqlens": torch.tensor([0, 2, 2, 6])}
    want = _dispatched(name, inputs)
    seen.clear()
    assert _equal(_run(name, inputs), want)
    assert seen == []


@step
def test_a_pool_of_states_is_straight(name, seen):
    inputs = _inputs(name, states=5) | {"state_indices": torch.tensor([3, -1, 0])}
    want = _dispatched(name, inputs)
    seen.clear()
    assert _equal(_run(name, inputs), want)
    assert seen == []


@every
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_tensors_of_inference_mode_are_straight(name, inside, seen):
    with torch.inference_mode():
        inputs = copied(_inputs(name))
    want = _dispatched(name, _inputs(name))
    seen.clear()
    with torch.inference_mode(inside):
        got = _run(name, inputs)
        assert _equal(got, want)
    assert seen == []
    assert got[0].is_inference() == inside


@every
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_are_straight_without_grad_mode(name, mode, seen):
    inputs = _inputs(name)
    want = _dispatched(name, inputs)
    seen.clear()
    inputs = {k: torch.nn.Parameter(v.clone()) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with mode():
        got = _run(name, inputs)
        assert _equal(got, want)
    assert seen == []
    assert type(got[0]) is torch.Tensor


@whole
def test_gradients_go_through_the_op(name, seen):
    for key in [k for k, v in _inputs(name).items() if isinstance(v, torch.Tensor)]:
        inputs = _inputs(name)
        leaf = inputs[key].requires_grad_()
        out, state = _run(name, inputs)
        (out.sum() + state.sum()).backward()
        assert leaf.grad.abs().sum() > 0
    assert f"fastlvm::{name}_bwd" in seen


@step
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_the_version_of_a_state_rises(name, mode):
    inputs = _inputs(name)
    before = inputs["state"]._version
    with mode():
        _run(name, inputs)
    assert inputs["state"]._version == before + 1


@step
def test_autograd_notices_a_state_that_was_written(name):
    inputs = _inputs(name)
    weight = torch.ones_like(inputs["state"]).requires_grad_()
    loss = (weight * inputs["state"]).sum()  # saves the state
    with torch.no_grad():
        _run(name, inputs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every
@pytest.mark.parametrize("watcher", [_Log, _Functions, lambda: FlopCounterMode(display=False), forward_ad.dual_level])
def test_a_mode_sees_the_op(name, watcher, seen):
    inputs = _inputs(name)
    want = _run(name, copied(inputs))
    seen.clear()
    with watcher() as mode:
        got = _run(name, inputs)
    assert f"fastlvm::{name}" in (mode.names if isinstance(mode, _Log) else seen)
    assert _equal(got, want)


@every
def test_a_profiler_sees_the_op(name):
    inputs = _inputs(name)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _run(name, inputs)
    assert f"fastlvm::{name}" in {event.key for event in profile.key_averages()}


@every
@pytest.mark.parametrize("subclass", [_Subclass, _Quiet])
def test_a_subclass_goes_through_the_op(name, subclass, seen):
    inputs = _inputs(name)
    want = _run(name, copied(inputs))
    inputs[_lead(name)] = inputs[_lead(name)].as_subclass(subclass)
    got = _run(name, inputs)
    assert f"fastlvm::{name}" in seen
    assert isinstance(got[0], torch.Tensor)
    assert _equal(got, want)


@every
def test_memory_that_is_not_what_it_says_goes_through_the_op(name, seen):
    """A view that negates lazily, and a tensor of zeros that has no memory."""
    inputs, lead = _inputs(name), _lead(name)
    negated = torch.complex(inputs[lead], inputs[lead]).conj().imag
    for odd in (negated, torch._efficientzerotensor(inputs[lead].shape)):
        want = _run(name, copied(inputs) | {lead: torch.zeros_like(odd) + odd})
        seen.clear()
        assert _equal(_run(name, copied(inputs) | {lead: odd}), want)
        assert f"fastlvm::{name}" in seen


@every
def test_the_compiler_sees_the_op(name):
    torch._dynamo.reset()
    graphs = []

    def keep(module, inputs):
        graphs.append(module)
        return module

    inputs = _inputs(name)
    want = _run(name, copied(inputs))
    with torch.no_grad():
        assert _equal(torch.compile(_run, fullgraph=True, backend=keep)(name, inputs), want)
    [graph] = graphs
    assert f"fastlvm.{name}" in str(graph.graph)


@every
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_holds_the_op(name):
    inputs, lead = _inputs(name), _lead(name)

    def call(x):
        return _run(name, copied(inputs) | {lead: x})[0]

    assert f"fastlvm::{name}" in str(torch.jit.trace(call, (inputs[lead],), check_trace=False).graph)
    for early in (False, True):
        assert f"fastlvm.{name}" in str(make_fx(call, pre_dispatch=early)(inputs[lead]).graph)


@every
def test_fake_tensors_have_shapes_only(name):
    from torch._subclasses import FakeTensor, FakeTensorMode

    inputs = _inputs(name)
    want = _run(name, copied(inputs))
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        within = _run(name, fakes)
    for got in (within, _run(name, fakes)):
        assert all(isinstance(g, FakeTensor) for g in got)
        assert [(g.shape, g.dtype) for g in got] == [(w.shape, w.dtype) for w in want]


@every
def test_meta_tensors_have_shapes_only(name):
    inputs = _inputs(name)
    want = _run(name, copied(inputs))
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    call = getattr(fastlvm, name)
    got = (call(**meta), meta["state"]) if name in STEPS else call(**meta, return_final_state=True)
    assert [(g.device.type, g.shape) for g in got] == [("meta", w.shape) for w in want]


@every
def test_a_torch_without_the_private_functions_dispatches(name, monkeypatch, seen):
    monkeypatch.setattr("fastlvm.ops._direct._QUIET", ())
    _run(name, _inputs(name))
    assert f"fastlvm::{name}" in seen


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_torch_that_tells_c_nothing_gives_the_same(name, dtype, monkeypatch):
    inputs = _inputs(name, dtype)
    want = _run(name, copied(inputs))
    monkeypatch.setattr("fastlvm.ops._autograd._TOLD_IN_C", False)
    assert _equal(_run(name, inputs), want)


def test_the_extension_refuses_tensors_without_memory():
    from torch._subclasses import FakeTensorMode

    x, weight, out, state = torch.ones(1, 4, 6), torch.ones(4, 3), torch.empty(1, 4, 6), torch.empty(1, 4, 2)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    for bad in (fake, x.to("meta"), torch._efficientzerotensor(x.shape)):
        with pytest.raises((ValueError, RuntimeError), match=r"got an array without memory|tensors on meta"):
            _C.causal_conv1d(bad, weight, None, False, None, out, state, None)


def test_a_tensor_can_grow_after_a_call():
    """A numpy view would have pinned its memory for good."""
    x = torch.ones(1, 4, 6)
    fastlvm.causal_conv1d(x, torch.ones(4, 3))
    assert x.resize_(2, 4, 6).shape == (2, 4, 6)
