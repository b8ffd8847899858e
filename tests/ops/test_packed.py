"""Packed sequences: one call gives, forward and backward, what every sequence alone would."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastlvm
from fastlvm.ops._extension import _C

from . import oracle
from .cases import ALL, Conv, Scan, custom_ops
from .oracle import relative_error
from .test_properties import VIEWS, tensor_view

FORWARD, GRADIENT = 1e-5, 1e-4
TIMED = ("u", "delta", "z", "x")  # B and C too, where they vary in time

LENGTHS = [(), (0,), (6,), (1, 1, 1), (0, 3, 0, 0, 5, 0), (2, 5, 1, 9), (64, 1, 257, 0, 33)]
SCANS = [Scan(state=16), Scan(B=2, C="dn"), Scan(B="dn", C=4, options=("z",)), Scan(options=("initial_state",))]
CONVS = [Conv(), Conv(width=3, channels=17), Conv(width=1), Conv(width=9, options=("bias",)), Conv(width=2, options=())]
CASES = [(fastlvm.ssm_scan, case, lengths) for case in SCANS for lengths in LENGTHS]
CASES += [(fastlvm.causal_conv1d, case, lengths) for case in CONVS for lengths in LENGTHS]
SHORT = [(op, case, (2, 0, 3)) for op, case in [(fastlvm.ssm_scan, SCANS[1]), (fastlvm.causal_conv1d, CONVS[0])]]


def _id(value):
    return str(value) if isinstance(value, (Scan, Conv)) else getattr(value, "__name__", None)


def _tensors(inputs):
    return {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


def _inputs(case, lengths, dtype=torch.float32, weights=torch.float32, offsets=torch.int32, seed=0) -> dict:
    """Arguments of one call: one batch entry of all the time, states [S, ..]."""

    def resized(batch, length):
        return type(case)(**{**vars(case), "batch": batch, "length": length}).inputs(dtype, weights, seed)

    inputs = resized(1, sum(lengths))
    if "initial_state" in inputs:
        inputs["initial_state"] = resized(len(lengths), 1)["initial_state"]
    ends = itertools.accumulate(lengths, initial=0)
    return inputs | {"cu_seqlens": torch.tensor(list(ends), dtype=offsets)}


def _alone(op, *, cu_seqlens, initial_state=None, **inputs):
    """Outputs and final states of every sequence by itself, put side by side."""
    bounds = cu_seqlens.tolist()
    outs, states = [], []
    for s, (begin, end) in enumerate(itertools.pairwise(bounds)):
        part = {k: v[..., begin:end] if _is_timed(k, v) else v for k, v in inputs.items()}
        out, state = op(**part, initial_state=None if initial_state is None else initial_state[s : s + 1])
        outs.append(out)
        states.append(state)
    if not outs:
        out, state = op(**inputs)
        return out, state[:0]
    return torch.cat(outs, dim=-1), torch.cat(states)


def _is_timed(name, value):
    return name in TIMED or (name in ("B", "C") and value.ndim > 2)


def _cotangents(outputs, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=g).to(o.dtype) for o in outputs]


def _run(op, inputs, **kwargs):
    """Outputs and the gradient of every floating tensor."""
    leaves = {k: v.detach().requires_grad_() for k, v in _tensors(inputs).items()}
    outputs = op(**{**inputs, **leaves}, **kwargs)
    # Without a sequence the reference computes states from nothing.
    asked = [(o, g) for o, g in zip(outputs, _cotangents(outputs), strict=True) if o.requires_grad]
    values = list(leaves.values())
    grads = torch.autograd.grad(
        [o for o, _ in asked], values, [g for _, g in asked], allow_unused=True, materialize_grads=True
    )
    return [o.detach() for o in outputs], dict(zip(leaves, grads, strict=True))


def _truth(op, inputs):
    double = {k: v.double() if k in _tensors(inputs) else v for k, v in inputs.items()}
    return _run(functools.partial(_alone, getattr(oracle, op.__name__)), double)


@functools.cache
def _true(op, case, lengths, dtype=torch.float32):
    return _truth(op, _inputs(case, lengths, dtype, dtype))


@pytest.mark.parametrize(("op", "case", "lengths"), CASES, ids=_id)
def test_matches_the_oracle_alone(op, case, lengths, backend):
    inputs = _inputs(case, lengths)
    outputs, grads = _run(op, inputs, return_final_state=True, backend=backend)
    truths, true_grads = _true(op, case, lengths)
    assert outputs[0].shape == inputs["u" if op is fastlvm.ssm_scan else "x"].shape
    assert outputs[1].shape[0] == len(lengths)
    for got, want in zip(outputs, truths, strict=True):
        assert relative_error(got, want) <= FORWARD
    errors = {name: relative_error(grads[name], true_grads[name]) for name in true_grads}
    assert max(errors.values()) <= GRADIENT, errors


@pytest.mark.parametrize(("op", "case", "lengths"), CASES[4::9], ids=_id)
def test_float64_is_exact(op, case, lengths, backend):
    inputs = _inputs(case, lengths, torch.float64, torch.float64)
    outputs, grads = _run(op, inputs, return_final_state=True, backend=backend)
    truths, true_grads = _true(op, case, lengths, torch.float64)
    assert all(relative_error(got, want) <= 1e-13 for got, want in zip(outputs, truths, strict=True))
    errors = {name: relative_error(grads[name], true_grads[name]) for name in true_grads}
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "case", "lengths"), SHORT, ids=_id)
def test_half_precision(op, case, lengths, dtype, backend):
    """Rounded once, at the end: as close to the truth as the dtype allows."""
    inputs = _inputs(case, lengths, dtype)
    outputs = op(**inputs, return_final_state=True, backend=backend)
    truths, _ = _truth(op, inputs)
    assert outputs[0].dtype == dtype
    assert all(relative_error(got, want) <= 4e-3 for got, want in zip(outputs, truths, strict=True))


@pytest.mark.parametrize(
    ("op", "case", "lengths", "offsets"),
    [(*case, ("int32", "int64")[i % 2]) for i, case in enumerate([*CASES[::5], *CASES[1::7]])],
    ids=_id,
)
def test_numpy_is_torch(op, case, lengths, offsets, backend):
    inputs = _inputs(case, lengths, offsets=getattr(torch, offsets))
    arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    wants = op(**inputs, return_final_state=True, backend=backend)
    gots = op(**arrays, return_final_state=True, backend=backend)
    assert all(type(got) is np.ndarray for got in gots)
    assert all(np.array_equal(got, want.numpy()) for got, want in zip(gots, wants, strict=True))


@pytest.mark.parametrize(("op", "case", "lengths"), CASES[1::4], ids=_id)
def test_one_call_is_many(op, case, lengths, backend):
    """The kernel against itself: far closer than to the oracle."""
    inputs = _inputs(case, lengths)
    alone = functools.partial(_alone, functools.partial(op, return_final_state=True, backend=backend))
    outputs, grads = _run(op, inputs, return_final_state=True, backend=backend)
    wants, want_grads = _run(alone, inputs)
    assert all(relative_error(got, want) <= 1e-6 for got, want in zip(outputs, wants, strict=True))
    errors = {name: relative_error(grads[name], want_grads[name]) for name in want_grads}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize(("op", "case"), [(fastlvm.ssm_scan, SCANS[0]), (fastlvm.causal_conv1d, CONVS[0])], ids=_id)
def test_channel_last_memory(op, case, backend):
    inputs = _inputs(case, (5, 0, 40, 2))
    swapped = {
        k: v.transpose(1, 2).contiguous().transpose(1, 2) if k in (*TIMED, "B", "C") else v for k, v in inputs.items()
    }
    wants, want_grads = _run(op, inputs, return_final_state=True, backend=backend)
    gots, grads = _run(op, swapped, return_final_state=True, backend=backend)
    assert all(relative_error(got, want) <= 1e-6 for got, want in zip(gots, wants, strict=True))
    assert all(relative_error(grads[k], want_grads[k]) <= 1e-5 for k in grads)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("op", [fastlvm.ssm_scan, fastlvm.causal_conv1d], ids=_id)
def test_any_lengths_and_strides(op, data, every_isa):
    channels = data.draw(st.sampled_from([1, 4, 18]))
    if op is fastlvm.ssm_scan:
        options = data.draw(st.sets(st.sampled_from(ALL)))
        layouts = st.sampled_from(["dn", "bnl", 1, channels])
        case = Scan(1, channels, data.draw(st.sampled_from([1, 5, 16, 128])), 0, *(data.draw(layouts) for _ in "BC"))
    else:
        options = data.draw(st.sets(st.sampled_from(["bias", "activation", "initial_state"])))
        case = Conv(channels=channels, width=data.draw(st.integers(1, 6)))
    case = type(case)(**{**vars(case), "options": tuple(sorted(options))})
    lengths = tuple(data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 40]), max_size=6)))
    inputs = _inputs(case, lengths)
    for name, x in _tensors(inputs).items():
        inputs[name] = tensor_view(x, data.draw(st.sampled_from(VIEWS), label=name))
    wants, want_grads = _truth(op, inputs)
    for isa in every_isa():
        outputs, grads = _run(op, inputs, return_final_state=True, backend="cpu")
        for got, want in [*zip(outputs, wants, strict=True), *((grads[k], want_grads[k]) for k in grads)]:
            floor = max(1.0, want.numel() ** 0.5 / max(float(want.norm()), 1e-30))
            assert relative_error(got, want) <= GRADIENT * floor, isa


@pytest.mark.parametrize(("op", "case"), [(fastlvm.ssm_scan, SCANS[1]), (fastlvm.causal_conv1d, CONVS[1])], ids=_id)
def test_same_bits_on_any_number_of_threads(op, case, isa, threads):
    channels = 64 if op is fastlvm.ssm_scan else 301
    case = type(case)(**{**vars(case), "channels": channels})
    inputs = _inputs(case, (3, 0, 501, 1, 2, 90, 40))

    def bits():
        outputs, grads = _run(op, inputs, return_final_state=True, backend="cpu")
        return [t.numpy().tobytes() for t in (*outputs, *grads.values())]

    fastlvm.set_num_threads(1)
    want = bits()
    for count in (2, 3):
        fastlvm.set_num_threads(count)
        assert all(bits() == want for _ in range(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("op", "case", "lengths"), SHORT, ids=_id)
def test_nothing_passes_from_one_sequence_to_the_next(op, case, lengths, value, backend):
    inputs = _inputs(case, lengths)
    (want, want_state), want_grads = _run(op, inputs, return_final_state=True, backend=backend)
    name = "u" if op is fastlvm.ssm_scan else "x"
    inputs[name][..., 1] = value  # the last of the first sequence
    (out, state), grads = _run(op, inputs, return_final_state=True, backend=backend)
    assert relative_error(out[..., 2:], want[..., 2:]) <= 1e-6
    assert relative_error(state[1:], want_state[1:]) <= 1e-6
    assert relative_error(grads[name][..., 2:], want_grads[name][..., 2:]) <= 1e-6


# Offsets are values: tracing cannot see them, so whoever reads them checks them.
WRONG = [
    ([1, 5], "begins with 1"),
    ([-1, 5], "begins with -1"),
    ([0, 4], "ends with 4"),
    ([0, 6], "ends with 6"),
    ([0], "ends with 0"),
    ([0, 3, 2, 5], "falls from 3 to 2"),
    ([0, 6, 5], "falls from 6 to 5"),
    ([0, -(2**31), 5], "falls from 0 to -2147483648"),
]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(("offsets", "message"), WRONG, ids=str)
@pytest.mark.parametrize("case", [Scan(), Conv()], ids=["ssm_scan", "causal_conv1d"])
def test_offsets_that_do_not_fit_are_refused(case, offsets, message, kind, backend):
    op = fastlvm.ssm_scan if isinstance(case, Scan) else fastlvm.causal_conv1d
    inputs = _inputs(type(case)(options=()), (5,))
    inputs["cu_seqlens"] = torch.tensor(offsets)
    if kind == "numpy":
        inputs = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with pytest.raises(ValueError, match=f"cu_seqlens.* {message}.* wants") as caught:
        op(**inputs, backend=backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(("op", "case", "lengths"), SHORT, ids=_id)
def test_what_tracing_sees_is_refused_before_any_kernel(op, case, lengths, kind, monkeypatch):
    monkeypatch.setattr(_C, op.__name__, lambda *args: pytest.fail("a kernel ran on bad input"))
    torch_inputs = _inputs(case, lengths)
    numpy_inputs = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in torch_inputs.items()}
    good, other = (numpy_inputs, torch_inputs) if kind == "numpy" else (torch_inputs, numpy_inputs)
    lead, offsets = ("u" if op is fastlvm.ssm_scan else "x"), good["cu_seqlens"]
    asarray = np.asarray if kind == "numpy" else torch.as_tensor
    twice = np.concatenate if kind == "numpy" else torch.cat

    def fails(error, *parts, **changes):
        with pytest.raises(error) as caught:
            op(**{**good, **changes})
        message = str(caught.value)
        assert message.startswith(f"{op.__name__}: "), message
        assert all(part in message for part in parts), message
        assert "\n" not in message

    fails(TypeError, "cu_seqlens is float32", "int32 or int64", cu_seqlens=asarray(offsets, dtype=good[lead].dtype))
    fails(
        TypeError,
        "cu_seqlens is a list",
        "wants a numpy array, a torch tensor or an mlx array",
        cu_seqlens=offsets.tolist(),
    )
    fails(TypeError, "ndarray", "Tensor", cu_seqlens=other["cu_seqlens"])
    fails(ValueError, "cu_seqlens has 2 dimensions (1, 4)", "(S + 1,)", cu_seqlens=offsets[None])
    fails(ValueError, "cu_seqlens has shape (0,)", "(S + 1,)", cu_seqlens=offsets[:0])
    fails(ValueError, "initial_state has shape", "(S, D, ", cu_seqlens=offsets[1:])
    entries = {k: twice([v, v]) for k, v in good.items() if k in (*TIMED, "B") and k in good}
    fails(ValueError, f"{lead} has batch size 2", "wants 1 with cu_seqlens", **entries)
    if kind == "torch":
        fails(ValueError, "cu_seqlens is on meta", "cpu", cu_seqlens=offsets.to("meta"))
        fails(TypeError, "cu_seqlens has layout", cu_seqlens=offsets.to_sparse())
        fails(TypeError, "cu_seqlens is bool", cu_seqlens=offsets.bool())
    else:
        fails(TypeError, "cu_seqlens is >i4", cu_seqlens=offsets.astype(">i4"))


def test_an_entry_of_one_sequence_needs_no_offsets(backend):
    inputs = _inputs(Conv(), (9,))
    offsets = inputs.pop("cu_seqlens")
    want = fastlvm.causal_conv1d(**inputs, backend=backend)
    assert torch.equal(fastlvm.causal_conv1d(**inputs, cu_seqlens=offsets, backend=backend), want)
    assert torch.equal(fastlvm.causal_conv1d(*_positional(inputs), offsets, backend=backend), want)


def _positional(inputs):
    return (inputs["x"], inputs["weight"], inputs["bias"], inputs["activation"], inputs["initial_state"], False)


def test_offsets_in_any_memory(backend):
    inputs = _inputs(Conv(), (2, 0, 7))
    want = fastlvm.causal_conv1d(**inputs, backend=backend)
    offsets = inputs["cu_seqlens"]
    wide = torch.full((8,), 77, dtype=torch.int32)
    wide[::2] = offsets
    assert torch.equal(fastlvm.causal_conv1d(**{**inputs, "cu_seqlens": wide[::2]}, backend=backend), want)
    arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    arrays["cu_seqlens"] = offsets.numpy()[::-1].copy()[::-1]
    assert np.array_equal(fastlvm.causal_conv1d(**arrays, backend=backend), want.numpy())


def _raw(op, inputs):
    """The custom op, its backward, and their positional arguments."""
    if op is fastlvm.ssm_scan:
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state", "cu_seqlens")
        args = [inputs.get(name, False if name == "delta_softplus" else None) for name in names]
        return *custom_ops("ssm_scan"), args
    rest = ["activation" in inputs, inputs.get("initial_state"), inputs["cu_seqlens"]]
    return *custom_ops("causal_conv1d"), [*map(inputs.get, ("x", "weight", "bias")), *rest]


@pytest.mark.parametrize("lengths", [(2, 0, 3), (0,), ()], ids=str)
@pytest.mark.parametrize(("op", "case"), [(op, case) for op, case, _ in SHORT], ids=_id)
def test_opcheck(op, case, lengths):
    inputs = _inputs(case, lengths)
    forward, backward, args = _raw(op, inputs)
    leaves = [a.detach().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    flags = [True, True] if op is fastlvm.ssm_scan else []  # final state, checkpoints
    torch.library.opcheck(forward, (*leaves, *flags))
    out, state, *checkpoints = forward(*args, *flags)
    cotangents = _cotangents((out, state))
    wanted = [a is not None for a in args[:-1] if not isinstance(a, bool)]
    torch.library.opcheck(backward, (*cotangents, *args, *checkpoints, wanted))


def _flat(op, case, lengths):
    """`op` as a function of its float64 tensors alone, and those."""
    inputs = _inputs(case, lengths, torch.float64, torch.float64)
    tensors = _tensors(inputs)

    def function(*values):
        return op(**{**inputs, **dict(zip(tensors, values, strict=True))}, return_final_state=True, backend="cpu")

    return function, tuple(v.requires_grad_() for v in tensors.values())


@pytest.mark.parametrize(("op", "case", "lengths"), SHORT, ids=_id)
def test_gradcheck(op, case, lengths):
    assert torch.autograd.gradcheck(*_flat(op, case, lengths))


SMALL = [
    (fastlvm.ssm_scan, Scan(channels=2, state=2, B=1, C="dn"), (1, 0, 2)),
    (fastlvm.causal_conv1d, Conv(channels=2, width=3), (1, 0, 3)),
]


@pytest.mark.parametrize(("op", "case", "lengths"), SMALL, ids=_id)
def test_double_backward(op, case, lengths):
    assert torch.autograd.gradgradcheck(*_flat(op, case, lengths))


@pytest.mark.parametrize(
    ("op", "case", "lengths", "dynamic"), [(*case, bool(i)) for i, case in enumerate(SHORT)], ids=_id
)
def test_compile_traces_the_whole_call(op, case, lengths, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for packing in (lengths, (3, 2), (1, 1, 1, 4)):
        inputs = _inputs(case, packing)
        wants, want_grads = _run(op, inputs, return_final_state=True)
        gots, grads = _run(compiled, inputs, return_final_state=True)
        assert all(torch.equal(got, want) for got, want in zip(gots, wants, strict=True))
        assert all(torch.equal(grads[name], want_grads[name]) for name in want_grads)


def test_compiled_code_takes_other_offsets():
    """The offsets are data, not constants of the trace."""
    torch._dynamo.reset()
    compiled = torch.compile(fastlvm.causal_conv1d, fullgraph=True, backend="aot_eager")
    for packing in ((2, 3), (4, 1), (0, 5)):
        inputs = _inputs(Conv(), packing)
        assert torch.equal(compiled(**inputs), fastlvm.causal_conv1d(**inputs))
    with pytest.raises(ValueError, match=r"cu_seqlens.* ends with 4"):
        compiled(**{**inputs, "cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32)})


@pytest.mark.parametrize(("op", "case", "lengths"), SHORT, ids=_id)
def test_export(op, case, lengths):
    class Packed(torch.nn.Module):
        def forward(self, inputs):
            return op(**inputs, return_final_state=True)

    inputs = _inputs(case, lengths)
    program = torch.export.export(Packed(), (inputs,))
    for got, want in zip(program.module()(inputs), op(**inputs, return_final_state=True), strict=True):
        assert torch.equal(got, want)


def test_explain_knows_the_argument():
    inputs = _inputs(Conv(), (2, 3))
    assert {v.backend: v.ok for v in fastlvm.explain("causal_conv1d", **inputs)}.items() >= {
        ("cpu", True),
        ("reference", True),
    }
    with pytest.raises(ValueError, match="batch size 2"):
        fastlvm.explain("causal_conv1d", **{**inputs, "x": inputs["x"].expand(2, -1, -1)})


class TestStraightThroughTheExtension:
    """What Python has checked is checked again: no call may read beyond an array."""

    @staticmethod
    def _conv(**changes):
        x = np.ones((1, 3, 5), np.float32)
        args = {"x": x, "weight": np.ones((3, 4), np.float32), "bias": None, "silu": False, "initial_state": None}
        args |= {"out": np.empty_like(x), "final_state": None, "cu_seqlens": np.array([0, 2, 5])}
        _C.causal_conv1d(**args | changes)

    @staticmethod
    def _scan(**changes):
        u, A = np.ones((1, 3, 5), np.float32), -np.ones((3, 4), np.float32)
        args = {"u": u, "delta": u, "A": A, "B": A, "C": A, "D": None, "z": None, "delta_bias": None}
        args |= {"delta_softplus": False, "initial_state": None, "out": np.empty_like(u), "final_state": None}
        _C.ssm_scan(**args | {"cu_seqlens": np.array([0, 2, 5])} | changes)

    @pytest.mark.parametrize("name", ["_conv", "_scan"])
    def test_offsets(self, name):
        call = getattr(self, name)
        for offsets in ([], [1, 5], [0, 6], [0, 4], [0, 7, 5], [0, -1, 5], [0, 2**40, 5]):
            with pytest.raises(ValueError, match="cu_seqlens: "):
                call(cu_seqlens=np.array(offsets, np.int64))
        for wrong in (np.array([0.0, 5.0]), np.array([[0, 5]]), np.array([0, 5], ">i8"), np.array([0, 5], np.int16)):
            with pytest.raises(ValueError, match="cu_seqlens: wants a vector of int32 or int64"):
                call(cu_seqlens=wrong)

    @pytest.mark.parametrize("name", ["_conv", "_scan"])
    def test_shapes(self, name):
        call, last = getattr(self, name), 3 if name == "_conv" else 4
        for state in ("initial_state", "final_state"):
            for shape in ((1, 3, last), (3, 3, last)):
                with pytest.raises(ValueError, match=rf"{state}: got shape .* = \(2, 3, {last}\)"):
                    call(**{state: np.zeros(shape, np.float32)})
        two = np.ones((2, 3, 5), np.float32)
        many = {"x": two} if name == "_conv" else {"u": two, "delta": two}
        with pytest.raises(ValueError, match="batch size of 1 with cu_seqlens"):
            call(**many, out=np.empty_like(two))
        with pytest.raises(ValueError, match="out: got shape"):
            call(out=np.empty((1, 3, 4), np.float32))
