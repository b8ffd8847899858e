"""The one-token ops as torch custom ops: mutation in the schema, torch.compile, inference mode, and no gradient."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest
import torch

import fastlvm

from .oracle import relative_error
from .steps import BASIC, Conv, Ssd, Ssm, advance, copied

SSM, CONV, SSD = BASIC


def on(*cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


steps = on(*BASIC)
CASES = [
    *BASIC,
    Ssm(options=()),
    Ssm(batch=0),
    Ssm(state=0),
    Conv(options=()),
    Conv(width=1),
    Conv(extra=2),
    Ssd(options=()),
    Ssd(whole_D=True),
]


def _raw(case, inputs):
    """The custom op itself and its positional arguments."""
    module = importlib.import_module(f"fastlvm.ops.{case.name}.custom_op")
    args = [inputs.get(name) for name in inspect.signature(case.op).parameters if name != "backend"]
    flag = 4 if isinstance(case, Conv) else 9
    args[flag] = bool(args[flag])  # the activation of a convolution is a flag here
    return getattr(module, case.name), args


def _with_indices(case, slots=(3, -1, 0)):
    return dataclasses.replace(case, states=5).inputs() | {"state_indices": torch.tensor(slots)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case}")
def test_opcheck(case):
    op, args = _raw(case, case.inputs())
    torch.library.opcheck(op, args)


@steps
def test_opcheck_with_indices_and_strides(case):
    inputs = _with_indices(case)
    inputs["state"] = inputs["state"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["x"] = inputs["x"][:, :1].expand_as(inputs["x"])
    op, args = _raw(case, inputs)
    torch.library.opcheck(op, args)


@steps
def test_the_schema_names_what_is_written(case):
    op, _ = _raw(case, case.inputs())
    written = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["state"]


def _tokens(case, inputs, compiler=None, **options):
    """Outputs of three steps through the public op, and the states after them."""

    def loop(inputs):
        return [case.op(**inputs) for _ in range(3)]

    run = loop if compiler is None else torch.compile(loop, fullgraph=True, backend=compiler, **options)
    inputs = copied(inputs)
    return [*run(inputs), inputs["state"]]


@steps
def test_compile_traces_the_whole_call(case):
    torch._dynamo.reset()
    inputs = _with_indices(case)
    for eager, compiled in zip(_tokens(case, inputs), _tokens(case, inputs, "aot_eager"), strict=True):
        assert torch.equal(eager, compiled)


@on(SSD)
def test_compile_writes_a_strided_state(case):
    torch._dynamo.reset()
    inputs = case.inputs()
    wide = torch.full((*inputs["state"].shape[:-1], 11), 7.0)
    there = wide[..., : inputs["state"].shape[-1]]
    there.copy_(inputs["state"])
    out = torch.compile(case.op, fullgraph=True, backend="aot_eager")(**{**inputs, "state": there})
    want, after = advance(case, inputs)
    assert torch.equal(out, want)
    assert torch.equal(there, after)
    assert bool((wide[..., inputs["state"].shape[-1] :] == 7.0).all())


@pytest.mark.slow
@on(SSM)
def test_compile_with_inductor(case):
    torch._dynamo.reset()
    inputs = _with_indices(case)
    for eager, compiled in zip(_tokens(case, inputs), _tokens(case, inputs, "inductor"), strict=True):
        assert relative_error(compiled, eager) <= 1e-6


@on(CONV)
def test_compile_with_dynamic_sizes(case):
    torch._dynamo.reset()
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 6):
        inputs = dataclasses.replace(case, batch=batch).inputs()
        want, after = advance(case, inputs)
        assert torch.equal(compiled(**inputs), want)
        assert torch.equal(inputs["state"], after)


@pytest.mark.parametrize(("case", "backend"), [(SSM, "cpu"), (CONV, "reference")], ids=str)
def test_compile_with_a_pinned_backend(case, monkeypatch, backend):
    torch._dynamo.reset()
    monkeypatch.setenv("FASTLVM_BACKEND", backend)
    inputs = _with_indices(case)
    want, after = advance(case, inputs)
    out = torch.compile(case.op, fullgraph=True, backend="aot_eager")(**inputs)
    assert relative_error(out, want) <= 1e-6
    assert relative_error(inputs["state"], after) <= 1e-6


@on(SSM)
def test_compiled_code_refuses_a_bad_index_when_it_runs(case):
    torch._dynamo.reset()
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    compiled(**_with_indices(case))
    with pytest.raises(ValueError, match="state_indices: got 5, wants less than 5"):
        compiled(**_with_indices(case, (0, 1, 5)))


class _Block(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, inputs):
        return self.op(**inputs)


@steps
def test_export(case):
    torch._dynamo.reset()
    inputs = case.inputs()
    program = torch.export.export(_Block(case.op), (copied(inputs),))
    assert f"fastlvm.{case.name}" in str(program.graph)
    want, after = advance(case, inputs)
    assert torch.equal(program.module()(inputs), want)
    assert torch.equal(inputs["state"], after)


@steps
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_everything_runs(case, mode, backend):
    want, after = advance(case, case.inputs(), backend=backend)
    inputs = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in case.inputs().items()}
    with mode():
        out = case.op(**inputs, backend=backend)
    assert not out.requires_grad
    assert torch.equal(out, want)
    assert torch.equal(inputs["state"], after)


@steps
def test_tensors_of_inference_mode(case, backend):
    want, after = advance(case, case.inputs(), backend=backend)
    with torch.inference_mode():
        inputs = copied(case.inputs())
        out = case.op(**inputs, backend=backend)
    assert inputs["state"].is_inference()
    assert torch.equal(out.clone(), want)
    assert torch.equal(inputs["state"], after)


TENSORS = [(case, name) for case in BASIC for name, x in case.inputs().items() if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(("case", "name"), TENSORS, ids=lambda v: v if isinstance(v, str) else v.name)
def test_a_gradient_is_refused(case, name, backend):
    inputs = case.inputs()
    before = inputs["state"].clone()
    inputs[name].requires_grad_()
    scan = case.name.replace("_step", "") if case.name.startswith("causal") else case.name.replace("step", "scan")
    message = f"{case.name}: {name} requires grad, .* use fastlvm.{scan}, or call it under torch.no_grad"
    with pytest.raises(ValueError, match=message):
        case.op(**inputs, backend=backend)
    assert torch.equal(inputs["state"], before)


@on(SSD)
def test_compile_refuses_a_gradient(case):
    torch._dynamo.reset()
    inputs = case.inputs()
    inputs["x"].requires_grad_()
    with pytest.raises(ValueError, match="x requires grad"):
        torch.compile(case.op, backend="aot_eager")(**inputs)


@steps
def test_autograd_sees_that_a_saved_state_was_written(case, backend):
    inputs = case.inputs()
    weight = torch.ones_like(inputs["state"], requires_grad=True)
    loss = (weight * inputs["state"]).sum()
    case.op(**inputs, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@steps
def test_lazily_negated_memory(case, backend):
    """The imaginary part of a conjugate carries its sign as a flag, not in memory: read, but nothing to write to."""

    def negated(x):
        return torch.complex(x, -x).conj().imag

    inputs = case.inputs()
    want, after = advance(case, inputs, backend=backend)
    with pytest.raises(ValueError, match="state is a view that negates lazily; wants memory to write"):
        case.op(**{**inputs, "state": negated(inputs["state"])}, backend=backend)
    assert torch.equal(case.op(**{**inputs, "x": negated(inputs["x"])}, backend=backend), want)
    assert torch.equal(inputs["state"], after)


@steps
def test_meta_tensors_have_shapes_only(case):
    inputs = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in _with_indices(case).items()}
    out = case.op(**inputs)
    assert (out.device.type, out.shape, out.dtype) == ("meta", inputs["x"].shape, torch.float32)


@steps
def test_an_output_is_laid_out_as_its_input(case):
    inputs = case.inputs()
    inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    assert case.op(**inputs, backend="cpu").stride() == inputs["x"].stride()


def test_a_step_does_not_load_the_compiler():
    import subprocess
    import sys

    code = (
        "import sys, torch, fastlvm; x = torch.ones(1, 2); A = -torch.ones(2, 4);"
        "fastlvm.ssm_step(torch.zeros(1, 2, 4), x, x, A, torch.ones(1, 4), torch.ones(1, 4));"
        "fastlvm.causal_conv1d_step(x, torch.zeros(1, 2, 3), A, state_indices=torch.tensor([0]), backend='reference');"
        "h = torch.ones(1, 2, 3); fastlvm.ssd_step(torch.zeros(1, 2, 3, 4), h, x, A[:, 0], A[None], A[None]);"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "False", done.stderr


def test_the_ops_are_public():
    assert {case.name for case in BASIC} <= set(fastlvm.__all__)
