"""info_nce as a torch custom op, what it refuses before a kernel runs, and what it takes in memory."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastlvm
from fastlvm import _C
from fastlvm.ops import dispatch

from .cases import custom_ops
from .nce_cases import Nce
from .oracle import relative_error

CASES = [
    Nce(),
    Nce(5, 9, 3, mask=2, reduction="none"),
    Nce(5, 5, 3, symmetric=True, mask="dense"),
    Nce(0, 3, 4, reduction="sum"),
    Nce(3, 4, 0),
]
every = pytest.mark.parametrize("case", CASES, ids=str)
some = pytest.mark.parametrize("case", CASES[:3], ids=str)


def _leaves(case, dtype=torch.float32):
    inputs = case.inputs(dtype)
    return {k: v.requires_grad_() if k in ("queries", "keys") else v for k, v in inputs.items()}


def _raw(case, wanted):
    """The custom ops and the positional arguments of the forward."""
    inputs = _leaves(case)
    masks = inputs["mask"] if isinstance(inputs["mask"], tuple) else (None, None)
    mask = None if isinstance(inputs["mask"], tuple) else inputs["mask"]
    args = [inputs["queries"], inputs["keys"], case.temperature, case.symmetric, mask, *masks]
    return *custom_ops("info_nce"), [*args, case.reduction != "none", wanted]


@pytest.mark.parametrize("wanted", [[True, True], [False, True], [False, False]], ids=str)
@every
def test_opcheck(case, wanted):
    forward, _, args = _raw(case, wanted)
    torch.library.opcheck(forward, args)


@pytest.mark.parametrize("wanted", [[True, True], [True, False]], ids=str)
@every
def test_opcheck_of_the_backward(case, wanted):
    forward, backward, args = _raw(case, wanted)
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    loss, *rest = forward(*args)
    torch.library.opcheck(backward, (torch.ones_like(loss), *args[:-2], *rest, wanted))


def _flat(case):
    """The op as a function of its float64 tensors alone, and those."""
    inputs = _leaves(case, torch.float64)
    tensors = inputs.pop("queries"), inputs.pop("keys")
    return lambda queries, keys: fastlvm.info_nce(queries, keys, **inputs, backend="cpu"), tensors


@some
def test_gradients_and_second_derivatives(case):
    assert torch.autograd.gradcheck(*_flat(case))
    assert torch.autograd.gradgradcheck(*_flat(case))


def test_third_derivative_is_not_lost():
    function, tensors = _flat(Nce(3, 4, 2))

    def second(*xs):
        first = torch.autograd.grad(function(*xs), xs, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), xs, create_graph=True)

    assert torch.autograd.gradcheck(second, tensors)


def _trained(case, compiler=None):
    """Loss and gradients through `fastlvm.info_nce` itself, validation and dispatch included."""

    def step(inputs):
        return fastlvm.info_nce(**inputs, backend="cpu")

    inputs = _leaves(case)
    function = step if compiler is None else torch.compile(step, fullgraph=True, backend=compiler)
    loss = function(inputs)
    return [loss, *torch.autograd.grad(loss, [inputs["queries"], inputs["keys"]], case.cotangent())]


@some
def test_compile_traces_the_whole_call(case):
    torch._dynamo.reset()
    assert all(torch.equal(e, c) for e, c in zip(_trained(case), _trained(case, "aot_eager"), strict=True))


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    for case in CASES[:2]:
        pairs = zip(_trained(case), _trained(case, "inductor"), strict=True)
        assert all(relative_error(compiled, eager) <= 1e-6 for eager, compiled in pairs)


def test_compile_with_dynamic_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(fastlvm.info_nce, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, keys in [(5, 9), (8, 8), (20, 33)]:
        vectors = Nce(batch, keys).vectors()
        assert torch.equal(compiled(**vectors, backend="cpu"), fastlvm.info_nce(**vectors, backend="cpu"))


def test_meta_tensors_have_shapes_only():
    vectors = {k: v.to("meta") for k, v in Nce().vectors().items()}
    for reduction, shape in [("mean", ()), ("none", (7,))]:
        loss = fastlvm.info_nce(**vectors, reduction=reduction)
        assert (loss.device.type, loss.shape, loss.dtype) == ("meta", shape, torch.float32)


@some
def test_torch_func(case):
    def grads(backend):
        inputs = case.inputs(torch.float64)
        vectors = inputs.pop("queries"), inputs.pop("keys")
        return torch.func.grad(
            lambda q, k: fastlvm.info_nce(q, k, **inputs, backend=backend).sin().sum(), argnums=(0, 1)
        )(*vectors)

    torch.testing.assert_close(grads("cpu"), grads("reference"), rtol=1e-9, atol=1e-9)


def test_forward_mode_is_refused():
    function, (queries, keys) = _flat(Nce())
    with pytest.raises(ValueError, match="info_nce: queries carries a tangent"):
        torch.func.jvp(lambda q: function(q, keys), (queries.detach(),), (torch.ones_like(queries),))


def test_a_backward_can_be_repeated_and_scaled():
    inputs = _leaves(Nce())
    loss = fastlvm.info_nce(**inputs, backend="cpu")
    leaves = inputs["queries"], inputs["keys"]
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, leaves, torch.tensor(2.0), retain_graph=True)
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(once, torch.autograd.grad(loss, leaves), strict=True))


def test_a_learned_temperature():
    scale = torch.tensor(4.0, requires_grad=True)
    vectors = Nce(20, 20).vectors()

    def slope(backend):
        loss = fastlvm.info_nce(vectors["queries"] * scale, vectors["keys"], 1.0, backend=backend)
        return torch.autograd.grad(loss, scale)[0]

    assert relative_error(slope("cpu"), slope("reference")) <= 1e-5


def test_explain_lists_every_backend(isa):
    verdicts = {v.backend: v for v in fastlvm.explain("info_nce", **Nce().inputs())}
    assert verdicts["cpu"].ok and verdicts["reference"].ok
    assert isa in verdicts["cpu"].reason


@pytest.fixture
def chosen(monkeypatch):
    """Names of the backends that ran, in order."""
    ran = []
    for name, module in dispatch._OPS["info_nce"].backends.items():

        def run(queries, *args, name=name):
            ran.append(name)
            return queries.sum()

        monkeypatch.setattr(module, "run", run)
    return ran


def test_auto_takes_what_was_measured_to_be_faster(chosen, monkeypatch):
    monkeypatch.delenv("FASTLVM_BACKEND", raising=False)

    def ran(rows, dtype=torch.float32, gradient=True, reference=True):
        queries, keys = torch.zeros(rows, 1, dtype=dtype, requires_grad=gradient), torch.zeros(rows, 1, dtype=dtype)
        with_grad = fastlvm.info_nce(queries, keys)
        with torch.no_grad():
            fastlvm.info_nce(queries, keys)
        assert with_grad.shape == ()
        verdicts = {v.backend: v for v in fastlvm.explain("info_nce", queries, keys)}
        assert [verdicts[name].ok for name in ("cpu", "reference")] == [True, reference]
        assert ("auto" in verdicts["cpu"].reason) == (chosen[-2] == "reference" or not reference)
        return chosen[-2:]

    assert ran(1024) == ["reference", "cpu"]
    assert ran(1025) == ["cpu", "cpu"]
    assert ran(1024, gradient=False) == ["cpu", "cpu"]
    assert ran(1025, torch.float64) == ["reference", "reference"]
    assert ran(4097, torch.float64) == ["cpu", "cpu"]
    fastlvm.info_nce(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32))
    assert chosen[-1] == "cpu"
    supports = lambda *args: (False, "on holiday")  # noqa: E731
    monkeypatch.setattr(dispatch._OPS["info_nce"].backends["reference"], "supports", supports)
    assert ran(8, reference=False) == ["cpu", "cpu"]


@pytest.fixture(params=["numpy", "torch"])
def inputs(request):
    """Arguments of a call that is fine but for what a test changes."""
    vectors = Nce(3, 5, 4).vectors()
    return vectors if request.param == "torch" else {k: v.numpy() for k, v in vectors.items()}


def _like(x, shape, dtype="float32"):
    return torch.zeros(shape, dtype=getattr(torch, dtype)) if isinstance(x, torch.Tensor) else np.zeros(shape, dtype)


def _fails(inputs, error, *parts, **changes):
    with pytest.raises(error) as caught:
        fastlvm.info_nce(**{**inputs, **changes})
    message = str(caught.value)
    assert message.startswith("info_nce: ") and "\n" not in message, message
    for part in parts:
        assert part in message, message


@pytest.fixture
def no_kernel_runs(monkeypatch):
    def refuse(*args):
        raise AssertionError("a kernel ran on bad input")

    monkeypatch.setattr("fastlvm._C.info_nce", refuse)


@pytest.mark.usefixtures("no_kernel_runs")
class TestBadInput:
    def test_shapes(self, inputs):
        x = inputs["queries"]
        for name in ("queries", "keys"):
            for shape in ((), (3,), (3, 4, 1)):
                _fails(inputs, ValueError, f"{name} has {len(shape)} dimensions", "wants 2", **{name: _like(x, shape)})
        _fails(inputs, ValueError, "keys has shape (5, 3); wants (M, D) = (5, 4)", keys=_like(x, (5, 3)))
        _fails(inputs, ValueError, "keys has 2 rows; wants 3 or more", keys=_like(x, (2, 4)))
        _fails(inputs, ValueError, "keys has 5 rows; wants 3, as queries has, with symmetric=True", symmetric=True)

    def test_dtypes_and_kinds(self, inputs):
        x = inputs["queries"]
        for name in ("queries", "keys"):
            shape = tuple(inputs[name].shape)
            _fails(inputs, TypeError, f"{name} is int64; wants floats", **{name: _like(x, shape, "int64")})
            _fails(inputs, TypeError, "float64 goes with float64 only", **{name: _like(x, shape, "float64")})
            _fails(inputs, TypeError, f"{name} is a list", **{name: [[1.0]]})
            _fails(inputs, TypeError, f"{name} is a NoneType", **{name: None})
        other = np.zeros((5, 4), np.float32) if isinstance(x, torch.Tensor) else torch.zeros(5, 4)
        _fails(inputs, TypeError, "ndarray", "Tensor", keys=other)

    def test_the_temperature(self, inputs):
        for value in (0, -0.07, math.inf, math.nan):
            _fails(inputs, ValueError, f"temperature is {value!r}; wants a positive finite number", temperature=value)
        for value in ("0.07", None, True, [0.07]):
            _fails(inputs, TypeError, f"temperature is {value!r}", temperature=value)
        _fails(inputs, TypeError, "temperature is a Tensor", "queries * scale", temperature=torch.tensor(0.07))

    def test_flags_and_reductions(self, inputs):
        for value in ("no", 1, None):
            _fails(inputs, TypeError, f"symmetric is {value!r}", symmetric=value)
        for value in ("average", None, 1, ["mean"]):
            _fails(inputs, ValueError, f"reduction is {value!r}", '"none"', reduction=value)
        _fails(inputs, ValueError, "backend='gpu' is unknown", backend="gpu")

    def test_masks(self, inputs):
        x = inputs["queries"]
        fine, labels = _like(x, (3, 5), "bool"), _like(x, (3, 2), "int64")
        _fails(inputs, ValueError, "mask has shape (3, 4); wants (B, M) = (3, 5)", mask=fine[:, :4])
        _fails(inputs, ValueError, "mask has 1 dimensions", mask=fine[0])
        _fails(inputs, TypeError, "mask is float32; wants bool", mask=_like(x, (3, 5)))
        _fails(inputs, TypeError, "mask is a str; wants a", "of bool, or a pair", mask="mask")
        other = np.zeros((3, 5), bool) if isinstance(x, torch.Tensor) else torch.zeros(3, 5, dtype=torch.bool)
        _fails(inputs, TypeError, "mask is a", mask=other)
        _fails(inputs, ValueError, "mask has 1 entries; wants a pair", mask=(labels,))
        _fails(inputs, TypeError, "mask[1] is a NoneType", mask=(labels, None))
        _fails(inputs, TypeError, "mask[0] is float32; wants int64", mask=(_like(x, (3, 2)), labels))
        _fails(inputs, ValueError, "mask[1] has shape (3, 2); wants (M, G) = (5, 2)", mask=(labels, labels))
        _fails(inputs, ValueError, "mask[0] has 1 dimensions", mask=(labels[0], labels))
        for columns in (0, 17):
            wrong = _like(x, (3, columns), "int64")
            _fails(inputs, ValueError, f"mask[0] has {columns} columns; wants 1 to 16", mask=(wrong, wrong))

    def test_devices(self):
        vectors = Nce(3, 5, 4).vectors()
        _fails(vectors, ValueError, "keys is on meta but queries is on cpu", keys=vectors["keys"].to("meta"))
        mask = torch.zeros(3, 5, dtype=torch.bool, device="meta")
        _fails(vectors, ValueError, "mask is on meta but queries is on cpu", mask=mask)


def _direct(**changes):
    inputs = {k: v.numpy() for k, v in Nce(3, 5, 4).vectors().items()}
    rest = dict.fromkeys(("mask", "query_labels", "key_labels", "loss", "total", "log_sums", "dqueries", "dkeys"))
    return {**inputs, "temperature": 0.1, "symmetric": False, **rest, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": np.zeros((3, 4, 1), np.float32)}, r"queries: got shape \(3, 4, 1\), wants \(B, D\)"),
        ({"keys": np.zeros((5, 3), np.float32)}, "keys: got shape"),
        ({"keys": np.zeros((2, 4), np.float32)}, "keys: got shape .* M of at least B=3"),
        ({"symmetric": True}, "keys: got shape .* M equal to B=3"),
        ({"keys": np.zeros((5, 4))}, "keys: got float64"),
        ({"temperature": 0.0}, "temperature: wants a positive"),
        ({"mask": np.zeros((3, 4), bool)}, r"mask: got shape \(3, 4\), wants \(3, 5\)"),
        ({"mask": np.zeros((3, 5), np.float32)}, "mask: wants a matrix of bool"),
        ({"key_labels": np.zeros((5, 2), np.int64)}, "key_labels: wants labels of queries and keys"),
        ({"query_labels": np.zeros((3, 2), np.int32)}, "query_labels: wants a matrix of int64"),
        ({"query_labels": np.zeros((2, 3), np.int64).T}, "query_labels: cannot be read"),
        ({"loss": np.zeros(4, np.float32)}, "loss: got shape"),
        ({"total": np.zeros(1, np.float32)}, "total: got shape"),
        ({"log_sums": np.zeros((2, 3), np.float32)}, "log_sums: got shape"),
        ({"dkeys": np.zeros((5, 4))}, "dkeys: got float64"),
        ({"dqueries": np.zeros((4, 3), np.float32).T}, "dqueries: got strides"),
    ],
)
def test_the_extension_checks_for_itself(changes, message):
    _C.info_nce(**_direct())
    with pytest.raises(ValueError, match=message):
        _C.info_nce(**_direct(**changes))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
@pytest.mark.parametrize("case", ["reduction='mean'", "reduction='none'", "symmetric=True"])
def test_no_logits_in_memory(case):
    """16,384 rows of 64: the logits would be a gigabyte, which the dense loss holds three times."""
    code = f"""
        import ctypes, pathlib, torch, fastlvm
        status, clear = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
        def kilobytes(field):
            return next(int(l.split()[1]) for l in status.read_text().splitlines() if l.startswith(field + ":"))
        def call(rows):
            q, k = (torch.randn(rows, 64, requires_grad=True) for _ in range(2))
            torch.autograd.grad(fastlvm.info_nce(q, k, {case}, backend="cpu").sum(), (q, k))
        call(64)
        ctypes.CDLL(None).malloc_trim(0)
        clear.write_text("5")
        before = kilobytes("VmRSS")
        call(16384)
        print(kilobytes("VmHWM") - before)
    """
    lines = "\n".join(line[8:] for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000  # kilobytes
