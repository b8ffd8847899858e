"""The ops decomposed into torch's own operators: right for every call, and what they are decomposed for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.export import Dim, export

import fastlvm

from . import cases, ssd_cases
from .cases import CONVS, SCANS, Conv, Scan
from .oracle import relative_error
from .ssd_cases import Ssd
from .test_packed import _inputs as packed

FORWARD, GRADIENT = 1e-5, 1e-4
NAMES = {Scan: "ssm_scan", Conv: "causal_conv1d", Ssd: "ssd_scan"}
ONE_EACH = (Scan(), Conv(), Ssd())
LENGTHS = [(), (0,), (6,), (0, 3, 0, 0, 5, 0), (2, 5, 1, 9), (64, 1, 100, 0, 33)]
PACKED = [Scan(state=16), Scan(options=("z",)), Conv(), Conv(width=1), Conv(width=9, options=("bias",))]


def _module(case):
    return ssd_cases if isinstance(case, Ssd) else cases


def _decomposed(name):
    """The decomposition as a function of the arguments of `fastlvm.<name>`."""
    function = fastlvm.ops.decompositions()[getattr(torch.ops.fastlvm, name).default]
    arguments = [a.name for a in getattr(torch.ops.fastlvm, name).default._schema.arguments]

    def call(*, return_final_state=True, activation=None, **given):
        given |= {"return_final_state": return_final_state, "silu": activation is not None, "keep_checkpoints": False}
        given = dict.fromkeys(arguments) | {"delta_softplus": False, "dt_softplus": False} | given
        return function(*(given[a] for a in arguments))[:2]

    return call


def _id(value):
    return f"{NAMES[type(value)]}-{value}" if type(value) in NAMES else None


@pytest.mark.parametrize("case", [*SCANS, *CONVS[::2], *ssd_cases.GRID[::3]], ids=_id)
def test_matches_the_oracle(case):
    outputs, grads = _module(case).gradients(_decomposed(NAMES[type(case)]), case)
    truths, true_grads = _module(case).truth(case)
    assert [o.shape for o in outputs] == [t.shape for t in truths]
    assert all(relative_error(got, want) <= FORWARD for got, want in zip(outputs, truths, strict=True))
    errors = {name: relative_error(grads[name], true_grads[name]) for name in true_grads}
    assert max(errors.values()) <= GRADIENT, errors


@pytest.mark.parametrize("case", ONE_EACH, ids=_id)
def test_float64_is_exact(case):
    outputs, _ = _module(case).gradients(_decomposed(NAMES[type(case)]), case, torch.float64, torch.float64)
    truths, _ = _module(case).truth(case, torch.float64, torch.float64)
    assert all(relative_error(got, want) <= 1e-13 for got, want in zip(outputs, truths, strict=True))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("case", PACKED, ids=_id)
def test_packed_sequences(case, lengths):
    inputs = packed(case, lengths)
    got = _decomposed(NAMES[type(case)])(**inputs)
    want = getattr(fastlvm, NAMES[type(case)])(**inputs, return_final_state=True)
    assert [g.shape for g in got] == [w.shape for w in want]
    assert all(relative_error(g, w) <= FORWARD for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ONE_EACH, ids=_id)
def test_half_precision(case, dtype):
    """Dtypes are the op's, and the state is in float32."""
    inputs = case.inputs(dtype)
    got = _decomposed(NAMES[type(case)])(**inputs)
    want = getattr(fastlvm, NAMES[type(case)])(**inputs, return_final_state=True)
    assert [g.dtype for g in got] == [w.dtype for w in want]
    assert relative_error(got[0], want[0]) <= torch.finfo(dtype).eps
    assert relative_error(got[1], want[1]) <= 1e-6


@pytest.mark.parametrize("step", [1e-4, 0.5])
def test_a_long_sequence_keeps_its_precision(step):
    """States that forget nothing, and states that forget all: no factor is ever divided by."""
    case = Scan(batch=1, channels=2, state=3, length=5000, step=step)
    got, want = (f(**case.inputs(), return_final_state=True) for f in (_decomposed("ssm_scan"), fastlvm.ssm_scan))
    assert all(relative_error(g, w) <= FORWARD for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("case", [Scan(length=9), Ssd(length=9)], ids=_id)
def test_a_nan_reaches_every_later_output_and_no_earlier_one(case):
    inputs = case.inputs()
    lead, time = ("u", 2) if isinstance(case, Scan) else ("x", 1)
    inputs[lead].select(time, 5).fill_(float("nan"))
    out, _ = _decomposed(NAMES[type(case)])(**inputs)
    assert not out.narrow(time, 0, 5).isnan().any()
    assert out.narrow(time, 5, 4).isnan().all()


class _Block(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, inputs):
        return self.op(**inputs, return_final_state=True)


def _exported(case, inputs=None, sizes=None):
    inputs = case.inputs() if inputs is None else inputs
    shapes = None if sizes is None else ({name: sizes.get(name) for name in inputs},)
    return export(_Block(getattr(fastlvm, NAMES[type(case)])), (inputs,), dynamic_shapes=shapes)


def _sizes(case, batch, length):
    time = 1 if isinstance(case, Ssd) else 2
    sizes = {name: {0: batch, time: length} for name in ("u", "x", "delta", "dt", "B", "C", "z")}
    return sizes | {"initial_state": {0: batch}}


def _calls(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def _is_torch_alone(program):
    operators = [t for t in _calls(program) if isinstance(t, torch._ops.OpOverload)]
    return bool(operators) and {t.namespace for t in operators} == {"aten"}


@pytest.mark.parametrize("case", ONE_EACH, ids=_id)
def test_a_program_holds_torchs_operators_alone(case):
    program = _exported(case).run_decompositions(fastlvm.ops.decompositions())
    assert _is_torch_alone(program)
    want = getattr(fastlvm, NAMES[type(case)])(**case.inputs(), return_final_state=True)
    for got, wanted in zip(program.module()(case.inputs()), want, strict=True):
        assert relative_error(got, wanted) <= FORWARD


@pytest.mark.parametrize("case", ONE_EACH, ids=_id)
def test_beside_torchs_own_decompositions_only_its_core_is_left(case):
    """What ExecuTorch and other backends take."""
    table = torch.export.default_decompositions()
    table.update(fastlvm.ops.decompositions())
    for target in _calls(_exported(case).run_decompositions(table)):
        assert torch.Tag.core in target.tags, target


@pytest.mark.parametrize("case", ONE_EACH, ids=_id)
def test_sizes_stay_symbols(case):
    sizes = _sizes(case, Dim("batch", max=8), Dim("length", max=40))
    program = _exported(case, sizes=sizes).run_decompositions(fastlvm.ops.decompositions())
    run = program.module()
    for batch, length in [(2, 6), (1, 1), (3, 33), (8, 40), (2, 0), (0, 3)]:
        inputs = type(case)(batch=batch, length=length).inputs()
        want = getattr(fastlvm, NAMES[type(case)])(**inputs, return_final_state=True)
        for got, wanted in zip(run(inputs), want, strict=True):
            assert got.shape == wanted.shape
            assert relative_error(got, wanted) <= FORWARD, (batch, length)


@pytest.mark.parametrize("case", [Scan(), Conv()], ids=_id)
def test_offsets_stay_data(case):
    """As many sequences as a call has, of any lengths."""
    sequences, length = Dim("sequences"), Dim("length", max=400)
    sizes = {name: {2: length} for name in ("u", "x", "delta", "B", "C", "z")}
    sizes |= {"initial_state": {0: sequences}, "cu_seqlens": {0: sequences + 1}}
    program = _exported(case, packed(case, (3, 0, 5)), sizes).run_decompositions(fastlvm.ops.decompositions())
    assert _is_torch_alone(program)
    run = program.module()
    for lengths in [(3, 0, 5), (1,), (), (0, 0, 7, 0), (64, 100, 1, 9)]:
        inputs = packed(case, lengths)
        want = getattr(fastlvm, NAMES[type(case)])(**inputs, return_final_state=True)
        assert all(relative_error(g, w) <= FORWARD for g, w in zip(run(inputs), want, strict=True)), lengths


def test_a_graph_grows_with_the_logarithm_of_the_bound():
    sizes = [_sizes(Scan(), None, Dim("length", max=bound)) for bound in (256, 65536)]
    programs = [_exported(Scan(), sizes=s).run_decompositions(fastlvm.ops.decompositions()) for s in sizes]
    assert len(_calls(programs[1])) < 2 * len(_calls(programs[0])) < 1000


@pytest.mark.parametrize("length", [Dim("length"), Dim.DYNAMIC])
def test_a_length_without_a_bound_is_refused(length):
    program = _exported(Scan(), sizes=_sizes(Scan(), None, length))
    with pytest.raises(ValueError, match=r"ssm_scan: the length .* give it an upper bound .*max=4096") as caught:
        program.run_decompositions(fastlvm.ops.decompositions())
    assert "\n" not in str(caught.value).partition("While executing")[0].strip()


def test_a_convolution_wants_no_bound():
    sizes = _sizes(Conv(), None, Dim("length"))
    assert _is_torch_alone(_exported(Conv(), sizes=sizes).run_decompositions(fastlvm.ops.decompositions()))


@pytest.mark.parametrize("case", ONE_EACH, ids=_id)
def test_a_decomposed_program_can_be_trained(case):
    run = _exported(case).run_decompositions(fastlvm.ops.decompositions()).module()
    _, want = _module(case).truth(case)
    _, grads = _module(case).gradients(lambda return_final_state, **inputs: run(inputs), case)
    errors = {name: relative_error(grads[name], want[name]) for name in want}
    assert max(errors.values()) <= GRADIENT, errors


def test_a_step_decomposes_where_it_is_exported_by_the_reference():
    class Step(torch.nn.Module):
        def forward(self, state, x, delta, A, B, C):
            return fastlvm.ssm_step(state, x, delta, A, B, C, backend="reference")

    x, A, B = torch.rand(2, 3), -torch.rand(3, 4), torch.rand(2, 4)
    program = export(Step(), (torch.zeros(2, 3, 4), x, x, A, B, B)).run_decompositions({})
    assert _is_torch_alone(program)
    state, want = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    assert relative_error(program.module()(state, x, x, A, B, B), fastlvm.ssm_step(want, x, x, A, B, B)) <= FORWARD
    assert relative_error(state, want) <= FORWARD


def test_runs_where_fastlvm_is_not(tmp_path):
    programs = {NAMES[type(case)]: _exported(case) for case in ONE_EACH}
    for case in ONE_EACH:
        name = NAMES[type(case)]
        torch.export.save(programs[name].run_decompositions(fastlvm.ops.decompositions()), tmp_path / f"{name}.pt2")
        want = getattr(fastlvm, name)(**case.inputs(), return_final_state=True)
        torch.save((case.inputs(), want), tmp_path / f"{name}.pt")
    code = f"""
import sys
sys.modules["fastlvm"] = None  # cannot be imported
import pathlib, torch
for path in sorted(pathlib.Path({str(tmp_path)!r}).glob("*.pt2")):
    inputs, want = torch.load(path.with_suffix(".pt"))
    torch.testing.assert_close(torch.export.load(path).module()(inputs), want)
    print(path.stem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == sorted(NAMES.values()), done.stderr


def test_onnx(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnxruntime

    sizes = _sizes(Scan(), Dim("batch", max=8), Dim("length", max=40))
    program = _exported(Scan(), sizes=sizes).run_decompositions(fastlvm.ops.decompositions())
    path = tmp_path / "scan.onnx"
    torch.onnx.export(program, f=path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, length in [(2, 6), (1, 1), (3, 33)]:
        inputs = Scan(batch=batch, length=length).inputs()
        tensors = [x.numpy() for x in inputs.values() if isinstance(x, torch.Tensor)]
        got = session.run(None, dict(zip([i.name for i in session.get_inputs()], tensors, strict=True)))
        want = fastlvm.ssm_scan(**inputs, return_final_state=True)
        assert all(relative_error(torch.from_numpy(g), w) <= FORWARD for g, w in zip(got, want, strict=True))
