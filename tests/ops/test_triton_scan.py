"""The triton backend of ssm_scan against the float64 oracle: on a GPU, or interpreted."""

from __future__ import annotations

import math

import pytest
import torch

import fastlvm

from . import oracle
from .cases import ALL, SCANS, Scan, truth
from .device import DEVICE, ON_GPU, every, needs_triton, to_device
from .oracle import GRADIENTS, extremes, relative_error
from .test_packed import _inputs as packed_inputs
from .test_packed import _truth as packed_truth
from .test_properties import VIEWS, tensor_view
from .test_ssm_scan import HALF, HALF_CASES

pytestmark = needs_triton
FORWARD, GRADIENT = 1e-5, 1e-4
LONG = Scan(batch=1, channels=2, state=3, length=257)  # two chunks of the backward


def _quick(case):
    """Whether the interpreter is done in seconds: the backward of more than 8 steps walks states one by one."""
    return case.length <= 8 or case.state * math.ceil(case.length / 256) * case.batch < 24


def cases(found):
    unless_quick = pytest.mark.skip(reason="on a GPU only: minutes of the interpreter")
    return [c if ON_GPU or _quick(c) else pytest.param(c, marks=unless_quick) for c in found]


def scan(**inputs):
    """The op on the device, with results in main memory."""
    results = fastlvm.ssm_scan(**to_device(inputs), backend="triton")
    return tuple(r.cpu() for r in results) if isinstance(results, tuple) else results.cpu()


def run(inputs, cotangents):
    """Outputs, and the gradient of every tensor but the offsets."""
    leaves = {
        k: v.detach().requires_grad_()
        for k, v in inputs.items()
        if isinstance(v, torch.Tensor) and v.is_floating_point()
    }
    outputs = scan(**{**inputs, **leaves}, return_final_state=True)
    cotangents = [g.to(o.dtype) for o, g in zip(outputs, cotangents, strict=True)]
    values = list(leaves.values())
    grads = torch.autograd.grad(outputs, values, cotangents, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in outputs], dict(zip(leaves, grads, strict=True))


def gradients(case, dtype=torch.float32, weights=torch.float32):
    return run(case.inputs(dtype, weights), case.cotangents())


def _check(found, wanted):
    (outputs, grads), (true_outputs, true_grads) = found, wanted
    for got, want in zip(outputs, true_outputs, strict=True):
        assert relative_error(got, want) <= FORWARD
    assert grads.keys() == true_grads.keys()
    errors = {name: relative_error(grads[name], true_grads[name]) for name in grads}
    assert max(errors.values(), default=0) <= GRADIENT, errors


MORE = [LONG, Scan(state=20, length=9, channels=2, B=2, batch=1), Scan(batch=1, channels=2, state=5, length=33, C="dn")]


@pytest.mark.parametrize("case", cases([*every(3, SCANS), *MORE]), ids=str)
def test_matches_the_oracle(case):
    outputs, grads = gradients(case)
    assert outputs[0].dtype == outputs[1].dtype == torch.float32
    _check((outputs, grads), truth(case))


@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32-weights", "all-half"])
@pytest.mark.parametrize("dtype", list(HALF), ids=str)
@pytest.mark.parametrize(
    "case", cases([*(HALF_CASES if ON_GPU else HALF_CASES[:2]), Scan(batch=1, channels=2, length=11, state=3)]), ids=str
)
def test_half_precision(case, dtype, weights):
    weights = weights or dtype
    (out, final), grads = gradients(case, dtype, weights)
    (true_out, true_final), true_grads = truth(case, dtype, weights)
    rtol, atol = HALF[dtype]
    assert (out.dtype, final.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), true_out, rtol=rtol, atol=atol)
    assert relative_error(final, true_final) <= FORWARD
    for name, grad in grads.items():
        assert grad.dtype == case.inputs(dtype, weights)[name].dtype
        limits = {"A": (rtol, 5 * atol), "delta": (5 * rtol, 10 * atol)}.get(name, (rtol, atol))
        if weights == torch.float32 and name in ("D", "delta_bias", "initial_state"):
            limits = (1e-3, 1e-3)
        torch.testing.assert_close(grad.double(), true_grads[name], rtol=limits[0], atol=limits[1], msg=name)


@pytest.mark.parametrize(("how", "length"), [*((how, 6) for how in VIEWS[1:]), ("transposed", 10), ("padded", 10)])
def test_any_strides(how, length):
    """What lies beside an array, NaN here, is not read."""
    case = Scan(batch=2, channels=4, state=2, length=length, B=2)
    inputs = {k: tensor_view(v, how) if isinstance(v, torch.Tensor) else v for k, v in case.inputs().items()}
    want = oracle.run(oracle.ssm_scan, inputs, case.cotangents())
    leaves = {k: to_device(v).detach().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    outputs = fastlvm.ssm_scan(**{**inputs, **leaves}, return_final_state=True, backend="triton")
    cotangents = [to_device(tensor_view(g, "transposed" if how == "expanded" else how)) for g in case.cotangents()]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    _check(([o.detach().cpu() for o in outputs], {k: g.cpu() for k, g in zip(leaves, grads, strict=True)}), want)


@pytest.mark.parametrize("length", [6, 10])
def test_channel_last_stays_channel_last(length):
    case = Scan(batch=2, channels=4, state=1, length=length)
    inputs = to_device(case.inputs())
    leaves = {k: inputs[k].mT.contiguous().mT.requires_grad_() for k in ("u", "delta", "z")}
    out = fastlvm.ssm_scan(**{**inputs, **leaves}, backend="triton")
    grads = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    assert all(x.stride() == leaves["u"].stride() for x in (out, *grads))


PACKED = [Scan(state=4, channels=2), Scan(state=3, B=2, C="dn"), Scan(state=2, B="dn", C=4, options=("z",))]
LENGTHS = [(), (0,), (6,), (0, 3, 0, 0, 5, 0), (2, 5, 1, 9), (40, 0, 257)]
EACH = [(case, lengths) for case in PACKED for lengths in LENGTHS]


@pytest.mark.parametrize(
    ("case", "lengths"), EACH if ON_GPU else [*EACH[: len(LENGTHS)], *EACH[len(LENGTHS) + 3 :: len(LENGTHS)]], ids=str
)
def test_packed_sequences(case, lengths):
    _check_packed(case, lengths)


def _check_packed(case, lengths):
    inputs = packed_inputs(case, lengths)
    want, true_grads = packed_truth(fastlvm.ssm_scan, inputs)
    g = torch.Generator().manual_seed(1)  # the one of `packed_truth`
    _check(run(inputs, [torch.randn(o.shape, generator=g).float() for o in want]), (want, true_grads))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_passes_from_one_sequence_to_the_next(value):
    case, lengths = Scan(state=2), (2, 0, 3)
    inputs = packed_inputs(case, lengths)
    cotangents = [torch.ones(1, 4, 5), torch.ones(3, 4, 2)]
    (want, want_state), want_grads = run(inputs, cotangents)
    inputs["u"][..., 1] = value  # the last of the first sequence
    (out, state), grads = run(inputs, cotangents)
    assert torch.equal(out[..., 2:], want[..., 2:])
    assert torch.equal(state[1:], want_state[1:])
    assert torch.equal(grads["u"][..., 2:], want_grads["u"][..., 2:])


@pytest.mark.parametrize("offsets", [[1, 5], [0, 4], [0, 6], [0, 3, 2, 5]], ids=str)
def test_offsets_that_do_not_fit_are_refused(offsets):
    inputs = packed_inputs(Scan(options=()), (5,)) | {"cu_seqlens": torch.tensor(offsets)}
    with pytest.raises(ValueError, match=r"ssm_scan: cu_seqlens"):
        scan(**inputs)


@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_two_halves_with_carried_state_are_the_whole(cut):
    inputs = Scan(length=9, state=5, B=2).inputs()
    whole, last = scan(**inputs, return_final_state=True)

    def part(span, state):
        timed = {k: inputs[k][..., span] for k in ("u", "delta", "B", "C", "z")}
        return scan(**{**inputs, **timed, "initial_state": state}, return_final_state=True)

    first, state = part(slice(0, cut), inputs["initial_state"])
    second, state = part(slice(cut, None), state)
    assert relative_error(torch.cat([first, second], dim=-1), whole) <= 1e-6
    assert relative_error(state, last) <= 1e-6


@pytest.mark.parametrize("options", [ALL, ("z", "delta_softplus")] if ON_GPU else [ALL], ids="+".join)
def test_a_long_forward_in_segments(options):
    """Few channels: time is cut, and what enters every segment composed of the ones before."""
    from fastlvm.kernels.triton import ssm_scan as kernels

    case = Scan(batch=1, channels=2, state=4, length=1030 if ON_GPU else 300, options=options)
    inputs = case.inputs()
    shape = kernels.Shape.of(*(inputs[k] for k in ("u", "A", "B", "C")), None)
    assert kernels._segments(shape, None, 1)[1] > 1
    (true_out, true_final), _ = oracle.run(oracle.ssm_scan, inputs)
    out, final = scan(**inputs, return_final_state=True)
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(final, true_final) <= FORWARD
    with_gradient = scan(**inputs | {"u": inputs["u"].requires_grad_()})  # which keeps states for the backward
    assert relative_error(with_gradient.detach(), true_out) <= FORWARD


@pytest.mark.parametrize("case", [Scan(state=3), Scan(batch=1, channels=2, state=1, length=9)], ids=str)
def test_one_gradient_alone_and_of_one_output(case):
    _, true_grads = truth(case)
    inputs = case.inputs()
    for name in GRADIENTS:
        leaf = inputs[name].detach().clone().requires_grad_()
        outputs = scan(**{**inputs, name: leaf}, return_final_state=True)
        asked = [(o, g) for o, g in zip(outputs, case.cotangents(), strict=True) if o.requires_grad]
        grad = torch.autograd.grad([o for o, _ in asked], leaf, [g for _, g in asked])[0]
        assert relative_error(grad, true_grads[name]) <= GRADIENT, name
    for kept in (0, 1):
        cotangents = [g if i == kept else torch.zeros_like(g) for i, g in enumerate(case.cotangents())]
        _, wanted = oracle.run(oracle.ssm_scan, inputs, tuple(cotangents))
        leaves = {k: inputs[k].detach().clone().requires_grad_() for k in GRADIENTS}
        output = scan(**{**inputs, **leaves}, return_final_state=True)[kept]
        grads = torch.autograd.grad(
            output, list(leaves.values()), cotangents[kept], allow_unused=True, materialize_grads=True
        )
        _check(([], dict(zip(leaves, grads, strict=True))), ([], wanted))


def test_a_program_of_the_backward_has_channels_in_turn(monkeypatch):
    from fastlvm.kernels.triton import ssm_scan_bwd as kernels

    monkeypatch.setattr(kernels, "BUSY", 1)
    _check_packed(Scan(channels=40, state=2), (0, 9))


@pytest.mark.parametrize("case", [Scan(channels=40), Scan(channels=20, state=1, length=11)], ids=str)
def test_same_bits_every_time(case):
    def bits():
        outputs, grads = gradients(case)
        return [t.contiguous().numpy().tobytes() for t in (*outputs, *grads.values())]

    assert bits() == bits()


@pytest.mark.parametrize(("name", "value"), every(2, extremes(GRADIENTS)))
def test_extreme_values_do_not_crash_and_stay_in_their_batch(name, value):
    case = Scan(state=16, length=8)
    inputs = case.inputs()
    inputs[name][0] = value
    out, final = scan(**inputs, return_final_state=True)
    if name in ("u", "delta", "B", "C", "z", "initial_state"):
        (true_out, true_final), _ = truth(case)
        assert relative_error(out[1], true_out[1]) <= FORWARD
        assert relative_error(final[1], true_final[1]) <= FORWARD
    if name in ("u", "D") and value != value:
        assert bool(out[0, 0].isnan().all())


def test_a_nan_step_reaches_every_later_output():
    inputs = Scan(state=16, length=8).inputs()
    inputs["delta"][0, 0, 3] = math.nan
    out, final = scan(**inputs, return_final_state=True)
    assert bool(out[0, 0, :3].isfinite().all())
    assert bool(out[0, 0, 3:].isnan().all())
    assert bool(final[0, 0].isnan().all())
    assert bool(out[0, 1:].isfinite().all())


def test_inputs_are_left_alone():
    case = Scan(state=16)
    inputs = to_device(case.inputs())
    fastlvm.ssm_scan(**inputs, backend="triton")
    for name, value in to_device(case.inputs()).items():
        assert value is True or torch.equal(inputs[name], value), name


def test_final_state_is_not_the_initial_state():
    inputs = to_device(Scan(length=0).inputs())
    _, final = fastlvm.ssm_scan(**inputs, return_final_state=True, backend="triton")
    assert torch.equal(final, inputs["initial_state"])
    assert final.data_ptr() != inputs["initial_state"].data_ptr()


NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state", "cu_seqlens")


def _raw(inputs):
    from fastlvm.ops.ssm_scan import triton_op  # noqa: F401 - registers the ops

    given = {"delta_softplus": False, **to_device(inputs)}
    args = [given.get(name) for name in NAMES]
    return [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


OPCHECKS = [
    Scan(state=2).inputs(),
    Scan(state=2, B=2, C="dn", options=("z", "initial_state")).inputs(),
    Scan(length=0).inputs(),
    packed_inputs(Scan(state=1, channels=2), (2, 0, 3)),
]


@pytest.mark.parametrize("inputs", OPCHECKS, ids=["all", "groups", "no-steps", "packed"])
def test_opcheck(inputs):
    op = torch.ops.fastlvm.ssm_scan_triton.default
    torch.library.opcheck(op, (*_raw(inputs), False, False))
    # The state before the first chunk, which the backward knows, is not kept: its place holds anything.
    values_aside = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (*_raw(inputs), True, True), test_utils=values_aside)


def test_opcheck_of_the_backward():
    case = Scan(state=2)
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in _raw(case.inputs())]
    out, state = to_device(case.cotangents())
    backward = torch.ops.fastlvm.ssm_scan_triton_bwd.default
    carry = torch.zeros(2, 4, 2, device=DEVICE)
    torch.library.opcheck(backward, (out, state, *plain, carry, [True] * 9))
    torch.library.opcheck(backward, (out, None, *plain, carry, [i == 0 for i in range(9)]))


def test_second_derivatives_are_those_of_the_reference():
    case = Scan(batch=1, channels=2, state=2, length=3)

    def second(backend):
        inputs = to_device(case.inputs())
        leaves = [inputs[k].requires_grad_() for k in GRADIENTS]
        out = fastlvm.ssm_scan(**inputs, backend=backend)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return [g.cpu() for g in torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    for got, want in zip(second("triton"), second("reference"), strict=True):
        assert relative_error(got, want) <= GRADIENT


def test_compile_traces_the_whole_call():
    torch._dynamo.reset()

    def step(inputs):
        return fastlvm.ssm_scan(**inputs, return_final_state=True, backend="triton")

    def trained(call):
        inputs = to_device(Scan(channels=2, state=3).inputs())
        leaves = [inputs[k].requires_grad_() for k in GRADIENTS]
        outputs = call(inputs)
        return *outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), leaves)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(got, want) for got, want in zip(trained(compiled), trained(step), strict=True))


@pytest.mark.skipif(not ON_GPU, reason="on a GPU only: CUDA graphs")
@pytest.mark.parametrize("length", [5, 600])
def test_a_forward_and_backward_in_a_cuda_graph(length):
    given = to_device(Scan(length=length, state=16).inputs())
    leaves = [given[k].requires_grad_() for k in GRADIENTS]

    def step():
        out = fastlvm.ssm_scan(**given, backend="triton")
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        given["u"].mul_(2.0)
    graph.replay()
    assert all(torch.equal(got, want) for got, want in zip(found, step(), strict=True))


def test_what_has_no_kernel():
    case = Scan(state=3)
    with pytest.raises(ValueError, match=r"triton.*float64 has no kernel"):
        scan(**case.inputs(torch.float64, torch.float64))
    arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in case.inputs().items()}
    with pytest.raises(ValueError, match=r"triton.*wants torch tensors on a GPU"):
        fastlvm.ssm_scan(**arrays, backend="triton")


def test_explain_lists_the_backend():
    said = fastlvm.explain("ssm_scan", *list(to_device(Scan(options=()).inputs()).values()))
    assert "triton" in str(said)
    assert "kernels in Triton" in str(said) or "interpreted" in str(said)
