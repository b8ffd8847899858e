"""The triton backends of ssd_scan and ssd_step against the float64 oracle: on a GPU, or interpreted."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import fastlvm

from . import steps
from .device import DEVICE, ON_GPU, needs_triton, to_device
from .oracle import relative_error, run
from .ssd_cases import ALL, GRID, NAMES, TIMED, Ssd, gradients, ssd_oracle, truth
from .test_properties import VIEWS, tensor_view
from .test_ssd_scan import HALF, HALF_CASES
from .test_ssd_step import CASES as STEPS

pytestmark = needs_triton
FORWARD, GRADIENT = 1e-5, 1e-4


def scan(**inputs):
    """The op on the device, with results in main memory."""
    results = fastlvm.ssd_scan(**to_device(inputs), backend="triton")
    return tuple(r.cpu() for r in results) if isinstance(results, tuple) else results.cpu()


def _check(got, want, limit=GRADIENT):
    assert got.keys() == want.keys()
    errors = {name: relative_error(got[name], want[name]) for name in got}
    assert max(errors.values()) <= limit, errors


SMALL = [case for case in GRID if case.batch * case.length * case.heads < 500]  # what is quickly interpreted


@pytest.mark.parametrize("case", GRID if ON_GPU else SMALL[::5], ids=str)
def test_matches_the_oracle(case):
    (out, final), grads = gradients(scan, case)
    (true_out, true_final), true_grads = truth(case)
    assert out.dtype == final.dtype == torch.float32
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(final, true_final) <= FORWARD
    _check(grads, true_grads)


CHUNKED = [  # several chunks, the last one in part; heads and tiles that do not divide evenly
    Ssd(batch=1, length=150, heads=2, groups=1, state=17),
    Ssd(batch=1, length=70, heads=2, dim=34, groups=2, state=33, options=()),
    Ssd(batch=2, length=130, heads=1, groups=1, state=16, options=("z", "dt_softplus")),
    Ssd(batch=1, length=200, heads=1, groups=1, cuts=(70, 70)),
]


@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_chunks(case):
    (out, final), grads = gradients(scan, case)
    (true_out, true_final), true_grads = truth(case)
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(final, true_final) <= FORWARD
    _check(grads, true_grads)
    assert torch.equal(scan(**case.inputs()), out)


HALF_SMALL = [*(replace(c, batch=1, heads=2, groups=1) for c in HALF_CASES[2:]), Ssd(1, 140, 1, 16, 1, 16)]


# The final state is kept as exactly as from float32; where no one asks for it, 16-bit products are enough for the rest.
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32-weights", "all-half"])
@pytest.mark.parametrize("dtype", list(HALF), ids=str)
@pytest.mark.parametrize("case", HALF_SMALL, ids=str)
def test_half_precision(case, dtype, weights):
    weights = weights or dtype
    (out, final), grads = gradients(scan, case, dtype, weights)
    (true_out, true_final), true_grads = truth(case, dtype, weights)
    rtol, atol = HALF[dtype]
    assert (out.dtype, final.dtype) == (dtype, torch.float32)
    scale = max(1.0, float(true_out.abs().max()) / 10)  # a product of rounded terms is off by what the largest is off
    torch.testing.assert_close(out.double(), true_out, rtol=rtol, atol=atol * scale)
    assert relative_error(final, true_final) <= FORWARD
    for name, grad in grads.items():
        assert grad.dtype == case.inputs(dtype, weights)[name].dtype
        assert relative_error(grad, true_grads[name]) <= rtol, name


def test_every_array_has_a_dtype_of_its_own():
    case = Ssd(batch=1, length=20, heads=2, groups=1)
    dtypes = {"x": torch.bfloat16, "B": torch.float16, "dt": torch.float16, "z": torch.float16, "D": torch.bfloat16}
    inputs = {k: v.to(dtypes[k]) if k in dtypes else v for k, v in case.inputs().items()}
    want, true_grads = run(ssd_oracle, inputs, case.cotangents())
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    got = scan(**inputs, return_final_state=True)
    grads = torch.autograd.grad(
        got, list(leaves.values()), [g.to(o.dtype) for g, o in zip(case.cotangents(), got, strict=True)]
    )
    assert [o.dtype for o in got] == [torch.bfloat16, torch.float32]
    assert relative_error(got[0], want[0]) <= 1e-2
    assert relative_error(got[1], want[1]) <= FORWARD
    assert [g.dtype for g in grads] == [v.dtype for v in leaves.values()]
    _check(dict(zip(leaves, grads, strict=True)), true_grads, 1e-2)


@pytest.mark.parametrize("how", VIEWS[1:])
def test_any_strides(how):
    """What lies beside an array, NaN here, is not read; what lies beside a result is not written."""
    case = Ssd(length=9, heads=2, groups=1, options=ALL, D_per_channel=True)
    (true_out, true_final), true_grads = truth(case)
    inputs = case.inputs()
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    shown = {k: v if isinstance(v, bool) else tensor_view(v.detach(), how) for k, v in inputs.items()}
    if how == "expanded":  # of values that a stride of 0 can show
        (true_out, true_final), true_grads = run(ssd_oracle, shown, case.cotangents())
    leaves = {k: to_device(v).requires_grad_() for k, v in shown.items() if not isinstance(v, bool)}
    out, final = fastlvm.ssd_scan(**leaves, dt_softplus=True, return_final_state=True, backend="triton")
    cotangents = [to_device(tensor_view(g, "transposed" if how == "expanded" else how)) for g in case.cotangents()]
    grads = torch.autograd.grad((out, final), list(leaves.values()), cotangents)
    assert relative_error(out.detach().cpu(), true_out) <= FORWARD
    assert relative_error(final.detach().cpu(), true_final) <= FORWARD
    _check({k: g.cpu() for k, g in zip(leaves, grads, strict=True)}, true_grads)


@pytest.mark.parametrize("decay", [1e4, 1e-8])
def test_decays_of_any_strength(decay):
    """Strong and weak decays beside each other in time and over heads: right, not only finite."""
    case = Ssd(batch=1, length=90, heads=4, state=16, options=("initial_state", "z"))
    inputs = case.inputs()
    inputs["A"] = -decay * torch.tensor([1.0, 1e-2, 1e-4, 0.0])
    inputs["dt"][:, ::7] *= 50
    inputs["dt"][:, 1::7] *= 1e-6
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    got = scan(**leaves, return_final_state=True)
    want, true_grads = run(ssd_oracle, inputs, case.cotangents())
    assert all(relative_error(g, w) <= FORWARD for g, w in zip(got, want, strict=True))
    grads = torch.autograd.grad(got, list(leaves.values()), case.cotangents())
    _check(dict(zip(leaves, grads, strict=True)), true_grads)


@pytest.mark.parametrize("case", [Ssd(batch=1, length=9, cuts=c) for c in [(0,), (1, 1, 6)]], ids=str)
def test_packed_is_every_sequence_alone(case):
    inputs = case.inputs()
    out, states = scan(**inputs, return_final_state=True)
    inputs["cu_seqlens"] = inputs["cu_seqlens"].long()
    assert torch.equal(scan(**inputs), out)
    for i, (begin, end) in enumerate(pairwise(case.offsets)):
        alone = {k: v for k, v in inputs.items() if k != "cu_seqlens"}
        alone |= {k: inputs[k][:, begin:end] for k in TIMED} | {"initial_state": inputs["initial_state"][i : i + 1]}
        part, state = scan(**alone, return_final_state=True)
        assert relative_error(out[:, begin:end], part) <= 1e-6
        assert relative_error(states[i : i + 1], state) <= 1e-6


def test_no_sequence_at_all():
    inputs = Ssd(batch=1, length=0).inputs()
    inputs |= {"cu_seqlens": torch.zeros(1, dtype=torch.int32), "initial_state": torch.zeros(0, 4, 5, 5)}
    out, state = scan(**inputs, return_final_state=True)
    assert (out.shape, state.shape) == ((1, 0, 4, 5), (0, 4, 5, 5))


@pytest.mark.parametrize("offsets", [[1, 6], [0, 5], [0, 4, 3, 6], [0, 2**40]])
def test_offsets_that_do_not_fit(offsets):
    inputs = Ssd(batch=1, options=()).inputs() | {"cu_seqlens": torch.tensor(offsets)}
    with pytest.raises(ValueError, match="ssd_scan: cu_seqlens"):
        scan(**inputs)


def test_only_what_is_wanted():
    """A gradient of the final state alone, and gradients of one input at a time."""
    case = Ssd(batch=1, length=9, heads=1, groups=1)
    _, true_grads = truth(case)
    inputs = case.inputs()
    for name in NAMES:
        leaf = inputs[name].detach().clone().requires_grad_()
        outputs = scan(**{**inputs, name: leaf}, return_final_state=True)
        assert relative_error(torch.autograd.grad(outputs, leaf, case.cotangents())[0], true_grads[name]) <= GRADIENT
    leaves = {k: inputs[k].requires_grad_() for k in NAMES}
    _, final = scan(**inputs, return_final_state=True)
    grads = torch.autograd.grad(final, list(leaves.values()), case.cotangents()[1])
    want, wanted = torch.zeros_like(case.cotangents()[0]), case.cotangents()[1]
    _, true_grads = run(ssd_oracle, {k: v.detach() if k in NAMES else v for k, v in inputs.items()}, (want, wanted))
    _check(dict(zip(leaves, grads, strict=True)), true_grads)


def test_same_bits_every_time():
    case = Ssd(batch=1, length=70, heads=2, groups=1)

    def bits():
        outputs, grads = gradients(scan, case)
        return [t.contiguous().numpy().tobytes() for t in (*outputs, *grads.values())]

    assert bits() == bits()


OPCHECKS = [Ssd(batch=1, heads=2, groups=1), Ssd(length=0), Ssd(batch=1, cuts=(2, 2), options=())]


def _raw(case):
    from fastlvm.ops.ssd_scan import triton_op  # noqa: F401 - registers the ops

    names = (*NAMES[:8], "dt_softplus", "initial_state", "cu_seqlens")
    inputs = {"dt_softplus": False, **to_device(case.inputs())}
    return [inputs.get(name) for name in names]


@pytest.mark.parametrize("case", OPCHECKS, ids=str)
def test_opcheck(case):
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in _raw(case)]
    torch.library.opcheck(torch.ops.fastlvm.ssd_scan_triton.default, (*args, case.cuts is None))


def test_opcheck_of_the_backward():
    args, (out, state) = _raw(OPCHECKS[0]), to_device(OPCHECKS[0].cotangents())
    backward = torch.ops.fastlvm.ssd_scan_triton_bwd.default
    torch.library.opcheck(backward, (out, state, *args, [True] * 9))
    torch.library.opcheck(backward, (out, None, *args, [i == 0 for i in range(9)]))


def test_second_derivatives_are_those_of_the_reference():
    case = Ssd(batch=1, length=3, heads=2, dim=2, groups=1, state=2)

    def second(backend):
        inputs = to_device(case.inputs())
        leaves = [inputs[k].requires_grad_() for k in NAMES]
        out = fastlvm.ssd_scan(**inputs, backend=backend)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return [g.cpu() for g in torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    for got, want in zip(second("triton"), second("reference"), strict=True):
        assert relative_error(got, want) <= GRADIENT


def test_compile_traces_the_whole_call():
    torch._dynamo.reset()
    inputs = to_device(Ssd(batch=1, heads=2, groups=1).inputs())
    compiled = torch.compile(fastlvm.ssd_scan, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs, backend="triton"), fastlvm.ssd_scan(**inputs, backend="triton"))


def test_double_precision_is_refused():
    with pytest.raises(ValueError, match=r"triton.*float64 has no kernel"):
        scan(**Ssd().inputs(torch.float64, torch.float64))


def step(case, inputs):
    """Output and states after one step on the device, in main memory; the inputs are left alone."""
    inputs = to_device(steps.copied(inputs))
    out = case.op(**inputs, backend="triton")
    return out.cpu(), inputs["state"].cpu()


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_step_matches_the_oracle(case):
    true_out, true_state = steps.basic_truth(case)
    out, state = step(case, case.inputs())
    assert out.dtype == torch.float32
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(state, true_state) <= FORWARD


@pytest.mark.parametrize("dtype", list(HALF), ids=str)
@pytest.mark.parametrize("case", [steps.Ssd(state=16), steps.Ssd(whole_D=True, channels=70)], ids=str)
def test_step_in_half_precision(case, dtype):
    true_out, true_state = steps.basic_truth(case, dtype)
    out, state = step(case, case.inputs(dtype, dtype))
    rtol, atol = HALF[dtype]
    assert out.dtype == state.dtype == dtype
    torch.testing.assert_close(out.double(), torch.from_numpy(true_out), rtol=rtol, atol=atol)
    torch.testing.assert_close(state.double(), torch.from_numpy(true_state), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_step_of_some_states(dtype):
    case = replace(steps.Ssd(batch=5), states=6)
    inputs = case.inputs() | {"state_indices": torch.tensor([3, -1, 0, 6, 2**31 - 1], dtype=dtype)}
    out, state = step(case, inputs)
    kept = {k: v[:3] if k in ("x", "dt", "B", "C", "z", "state_indices") else v for k, v in inputs.items()}
    true_out, true_state = steps.truth(case, kept)
    assert relative_error(out[:3], true_out) <= FORWARD
    assert not out[1].any()
    assert bool(out[3:].isnan().all())
    assert relative_error(state, true_state) <= FORWARD
    assert all(torch.equal(state[i], inputs["state"][i]) for i in (1, 2, 4, 5))


def test_step_writes_a_strided_state_and_nothing_beside_it():
    case = steps.Ssd(channels=6)
    inputs = to_device(case.inputs())
    true_out, true_state = steps.basic_truth(case)
    wide = torch.full((6, 5, 12, 4), 7.0, device=DEVICE)  # [n, h, 2 p, b]
    there = wide[1:, 1:, ::2, 1:].permute(3, 1, 2, 0)
    there.copy_(inputs["state"])
    inputs["x"] = inputs["x"].transpose(0, 2).contiguous().transpose(0, 2)
    out = fastlvm.ssd_step(**{**inputs, "state": there}, backend="triton")
    assert out.stride() == inputs["x"].stride()
    assert relative_error(out.cpu(), true_out) <= FORWARD
    assert relative_error(there.cpu(), true_state) <= FORWARD
    there.fill_(7.0)
    assert bool((wide == 7.0).all())


def test_the_loop_of_steps_is_the_scan():
    case = steps.Ssd(batch=1, heads=2, channels=8, state=16)
    tokens = [case.inputs(seed=t) for t in range(12)]
    fixed = {k: v for k, v in tokens[0].items() if k in ("A", "D", "dt_bias", "dt_softplus")}
    moving = ("x", "dt", "B", "C", "z")
    whole = {k: torch.stack([now[k] for now in tokens], dim=1) for k in moving}
    state = to_device(tokens[0]["state"].clone())
    want, last = scan(**whole, **fixed, initial_state=tokens[0]["state"], return_final_state=True)
    outs = []
    for now in tokens:
        args = to_device({k: now[k] for k in moving} | fixed)
        outs.append(fastlvm.ssd_step(state, **args, backend="triton").cpu())
    assert relative_error(torch.stack(outs, dim=1), want) <= 2e-6
    assert relative_error(state.cpu(), last) <= 2e-6


def test_opcheck_of_the_step():
    from fastlvm.ops.ssd_step import triton_op  # noqa: F401 - registers the op

    case = replace(steps.Ssd(batch=2), states=3)
    inputs = to_device(case.inputs())
    names = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus")
    indices = torch.tensor([2, -1], device=DEVICE)
    args = [*map(inputs.get, names), indices]
    torch.library.opcheck(torch.ops.fastlvm.ssd_step_triton.default, args)
