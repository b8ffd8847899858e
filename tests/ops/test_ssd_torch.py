"""ssd_scan as a torch custom op, and the input it refuses before a kernel runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastlvm
from fastlvm import _C

from .cases import custom_ops
from .oracle import relative_error
from .ssd_cases import NAMES, Ssd

SMALL = {"batch": 1, "length": 3, "heads": 2, "dim": 2, "state": 2}
CASES = [
    Ssd(),
    Ssd(options=()),
    Ssd(groups=1, options=("z", "initial_state"), D_per_channel=True),
    Ssd(length=0),
    Ssd(batch=0),
    Ssd(batch=1, cuts=(2, 2)),
    Ssd(batch=1, cuts=(2, 2), options=()),
]


def _leaves(case, dtype=torch.float32):
    inputs = case.inputs(dtype, dtype)
    return {k: v.requires_grad_() if k in NAMES else v for k, v in inputs.items()}


def _raw(case, return_final_state=True):
    """The custom ops and the positional arguments of the forward."""
    inputs = {"dt_softplus": False, **_leaves(case)}
    names = (*NAMES[:8], "dt_softplus", "initial_state", "cu_seqlens")
    return *custom_ops("ssd_scan"), [*map(inputs.get, names), return_final_state]


@pytest.mark.parametrize("return_final_state", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, return_final_state):
    forward, _, args = _raw(case, return_final_state)
    torch.library.opcheck(forward, args)


@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_opcheck_of_the_backward(case):
    _, backward, args = _raw(case)
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args[:-1]]
    out, state = case.cotangents()
    torch.library.opcheck(backward, (out, state, *plain, [True] * 9))
    torch.library.opcheck(backward, (out, None, *plain, [i == 0 for i in range(9)]))


def _flat(case):
    """The op as a function of its float64 tensors alone, and those."""
    inputs = _leaves(case, torch.float64)
    names = [name for name in NAMES if name in inputs]
    rest = {k: v for k, v in inputs.items() if k not in names}

    def function(*tensors):
        args = dict(zip(names, tensors, strict=True))
        return fastlvm.ssd_scan(**args, **rest, return_final_state=True, backend="cpu")

    return function, tuple(inputs[name] for name in names)


@pytest.mark.parametrize("options", [(), CASES[0].options], ids=["bare", "all"])
@pytest.mark.parametrize("cuts", [None, (1, 1)], ids=["batch", "packed"])
def test_gradients_and_second_derivatives(options, cuts):
    case = Ssd(**SMALL, options=options, cuts=cuts)
    assert torch.autograd.gradcheck(*_flat(case))
    assert torch.autograd.gradgradcheck(*_flat(case))


def test_third_derivative_is_not_lost():
    function, tensors = _flat(Ssd(**SMALL, options=()))

    def first(*xs):
        return torch.autograd.grad(function(*xs)[0].sum(), xs, create_graph=True)

    def second(*xs):
        return torch.autograd.grad(sum(g.sum() for g in first(*xs)), xs, create_graph=True)

    assert torch.autograd.gradcheck(second, tensors)


def _trained(case, compiler=None, return_final_state=True):
    """Outputs and gradients through `fastlvm.ssd_scan` itself, validation and dispatch included."""

    def step(inputs, weights):
        got = fastlvm.ssd_scan(**inputs, return_final_state=return_final_state)
        outputs = got if return_final_state else (got,)
        return sum((o * w).sum() for o, w in zip(outputs, weights, strict=False)), *outputs

    inputs = _leaves(case)
    function = step if compiler is None else torch.compile(step, fullgraph=True, backend=compiler)
    loss, *outputs = function(inputs, case.cotangents())
    return [*outputs, *torch.autograd.grad(loss, [v for k, v in inputs.items() if k in NAMES], allow_unused=True)]


@pytest.mark.parametrize("return_final_state", [True, False])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5]], ids=str)
def test_compile_traces_the_whole_call(case, return_final_state):
    torch._dynamo.reset()
    eager = _trained(case, None, return_final_state)
    compiled = _trained(case, "aot_eager", return_final_state)
    assert all(torch.equal(e, c) for e, c in zip(eager, compiled, strict=True))


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    for case in (CASES[0], CASES[5]):
        pairs = zip(_trained(case), _trained(case, "inductor"), strict=True)
        assert all(relative_error(compiled, eager) <= 1e-6 for eager, compiled in pairs)


def test_compile_with_dynamic_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(fastlvm.ssd_scan, fullgraph=True, backend="aot_eager", dynamic=True)
    for cuts, length in [((2,), 6), ((2, 5), 9), ((1, 4, 4), 17)]:
        inputs = Ssd(batch=1, length=length, cuts=cuts).inputs()
        assert torch.equal(compiled(**inputs), fastlvm.ssd_scan(**inputs))


def test_meta_tensors_have_shapes_only():
    inputs = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in Ssd().inputs().items()}
    out, state = fastlvm.ssd_scan(**inputs, return_final_state=True)
    assert (out.device.type, out.shape, state.shape) == ("meta", (2, 6, 4, 5), (2, 4, 5, 5))


def test_explain_lists_every_backend(isa):
    cpu, *_, reference = fastlvm.explain("ssd_scan", **Ssd().inputs(), return_final_state=True)
    assert (cpu.backend, cpu.ok, reference.backend, reference.ok) == ("cpu", True, "reference", True)
    assert isa in cpu.reason


SHAPES = {
    "dt": (2, 6, 4),
    "A": (4,),
    "B": (2, 6, 2, 5),
    "C": (2, 6, 2, 5),
    "D": (4,),
    "z": (2, 6, 4, 5),
    "dt_bias": (4,),
    "initial_state": (2, 4, 5, 5),
}


@pytest.fixture(params=["numpy", "torch"])
def inputs(request):
    """Arguments of a call that is fine but for what a test changes."""
    inputs = Ssd().inputs()
    if request.param == "torch":
        return inputs
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _like(x, shape, dtype="float32"):
    return torch.zeros(shape, dtype=getattr(torch, dtype)) if isinstance(x, torch.Tensor) else np.zeros(shape, dtype)


def _fails(inputs, error, *parts, **changes):
    with pytest.raises(error) as caught:
        fastlvm.ssd_scan(**{**inputs, **changes})
    message = str(caught.value)
    assert message.startswith("ssd_scan: ") and "\n" not in message, message
    for part in parts:
        assert part in message, message


@pytest.fixture
def no_kernel_runs(monkeypatch):
    def refuse(*args):
        raise AssertionError("a kernel ran on bad input")

    monkeypatch.setattr("fastlvm._C.ssd_scan", refuse)


@pytest.mark.usefixtures("no_kernel_runs")
class TestBadInput:
    @pytest.mark.parametrize("name", SHAPES)
    def test_every_axis_of_every_shape(self, name, inputs):
        shape = SHAPES[name]
        for axis in range(len(shape)):
            if (name, axis) in (("B", 2), ("B", 3)):
                continue  # G and N are what B says
            for size in (shape[axis] + 1, shape[axis] - 1, 0):
                wrong = _like(inputs["x"], (*shape[:axis], size, *shape[axis + 1 :]))
                _fails(inputs, ValueError, f" {name} has shape", str(shape), **{name: wrong})

    @pytest.mark.parametrize("name", ["x", *SHAPES])
    def test_rank_dtype_kind(self, name, inputs):
        for shape in ((), (1, 1, 1, 1, 1)):
            _fails(inputs, ValueError, f" {name} has {len(shape)} dim", "wants", **{name: _like(inputs["x"], shape)})
        shape = tuple(inputs[name].shape)
        for dtype in ("int32", "bool", "complex64"):
            wrong = _like(inputs["x"], shape, dtype)
            _fails(inputs, TypeError, f" {name} is {dtype}", "float32", **{name: wrong})
        _fails(inputs, TypeError, "float64 goes with float64 only", **{name: _like(inputs["x"], shape, "float64")})
        _fails(inputs, TypeError, f" {name} is a list", **{name: [1.0]})
        other = np.zeros(shape, np.float32) if isinstance(inputs["x"], torch.Tensor) else torch.zeros(shape)
        _fails(inputs, TypeError, "ndarray", "Tensor", **{name: other})
        if name in ("x", "dt", "A", "B", "C"):
            _fails(inputs, TypeError, f" {name} is a NoneType", **{name: None})

    @pytest.mark.parametrize("groups", [0, 3, 8])
    def test_groups_divide_the_heads(self, groups, inputs):
        wrong = _like(inputs["x"], (2, 6, groups, 5))
        _fails(inputs, ValueError, f"B has {groups} groups", "divides the 4 heads", B=wrong, C=wrong)

    @pytest.mark.parametrize("name", ["dt_softplus", "return_final_state"])
    def test_flags_are_bools(self, name, inputs):
        for value in ("no", 1, None):
            _fails(inputs, TypeError, f"{name} is {value!r}", **{name: value})

    def test_offsets_that_cannot_be_offsets(self, inputs):
        one = {k: v[:1] if k in ("x", "dt", "B", "C", "z", "initial_state") else v for k, v in inputs.items()}
        fine = _like(inputs["x"], (2,), "int32")
        fine[1] = 6
        _fails(one, TypeError, "cu_seqlens is float32", cu_seqlens=_like(inputs["x"], (2,)))
        _fails(one, TypeError, "cu_seqlens is a list", cu_seqlens=[0, 6])
        _fails(one, ValueError, "cu_seqlens has 2 dimensions", cu_seqlens=fine[None])
        _fails(one, ValueError, "cu_seqlens has shape (0,)", cu_seqlens=fine[:0])
        _fails(inputs, ValueError, "x has batch size 2", cu_seqlens=fine)
        wants = "(S, H, P, N) = (1, 4, 5, 5)"
        _fails(one, ValueError, wants, cu_seqlens=fine, initial_state=inputs["initial_state"])


@pytest.mark.parametrize("offsets", [[1, 6], [0, 5], [0, 7], [0, 4, 3, 6], [0, -1, 6], [6], [0, 2**40]])
def test_offsets_that_do_not_fit(offsets, backend, inputs):
    """Values are looked at where they are read, by every backend."""
    one = {k: v[:1] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items() if k != "initial_state"}
    array = np.array(offsets, np.int64)
    one["cu_seqlens"] = torch.from_numpy(array) if isinstance(inputs["x"], torch.Tensor) else array
    with pytest.raises(ValueError, match="cu_seqlens"):
        fastlvm.ssd_scan(**one, backend=backend)


def _direct(**changes):
    inputs = {**dict.fromkeys(("D", "z", "dt_bias", "initial_state")), "dt_softplus": False}
    inputs |= {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in Ssd(options=()).inputs().items()}
    outputs = {"out": np.zeros((2, 6, 4, 5), np.float32), "final_state": None}
    return {**inputs, **outputs, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((2, 6, 4), np.float32)}, r"x: got shape \(2, 6, 4\), wants \(B, L, H, P\)"),
        ({"B": np.zeros((2, 6, 3, 5), np.float32)}, "G a divisor of H=4"),
        ({"C": np.zeros((2, 6, 1, 5), np.float32)}, "C: got shape"),
        ({"D": np.zeros((4, 4), np.float32)}, r"D: got shape \(4, 4\), wants \(H, P\)"),
        ({"A": np.zeros(4)}, "A: got float64"),
        ({"out": np.zeros((2, 6, 4, 5), np.float16)}, "out: got float16, wants float32"),
        ({"out": np.zeros((2, 6, 4, 4), np.float32)}, "out: got shape"),
        ({"final_state": np.zeros((2, 4, 5, 5, 1), np.float32)[..., 0].transpose(0, 1, 3, 2)}, "final_state: got str"),
        ({"cu_seqlens": np.array([0, 6])}, "x: got shape .* wants a batch size of 1 with cu_seqlens"),
        ({"cu_seqlens": np.array([0, 3])}, "cu_seqlens: ends with 3, wants the length 6"),
        ({"cu_seqlens": np.array([0.0, 6.0])}, "cu_seqlens: wants a vector of int32 or int64"),
    ],
)
def test_the_extension_checks_for_itself(changes, message):
    _C.ssd_scan(**_direct())
    with pytest.raises(ValueError, match=message):
        _C.ssd_scan(**_direct(**changes))
