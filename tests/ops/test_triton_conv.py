"""The triton backends of causal_conv1d and causal_conv1d_step against the float64 oracle: on a GPU, or interpreted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import fastlvm

from . import steps, test_packed
from .cases import CONVS, Conv, gradients, truth
from .device import ON_GPU, every, needs_triton, to_device
from .oracle import relative_error
from .test_causal_conv1d import HALF

pytestmark = needs_triton
FORWARD, GRADIENT = 1e-5, 1e-4


def conv(**inputs):
    """The op on the device, with results in main memory."""
    return tuple(o.cpu() for o in fastlvm.causal_conv1d(**to_device(inputs), backend="triton"))


@pytest.mark.parametrize("case", every(2, CONVS), ids=str)
def test_matches_the_oracle(case):
    (out, final), grads = gradients(conv, case)
    (true_out, true_final), true_grads = truth(case)
    assert out.dtype == final.dtype == torch.float32
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(final, true_final) == 0
    errors = {name: relative_error(grads[name], true_grads[name]) for name in true_grads}
    assert max(errors.values()) <= GRADIENT, errors


@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32-weights", "all-half"])
@pytest.mark.parametrize("dtype", list(HALF), ids=str)
@pytest.mark.parametrize("case", every(2, [Conv(length=n, width=w) for w in (2, 4) for n in (1, 5, 64)]), ids=str)
def test_half_precision(case, dtype, weights):
    weights = weights or dtype
    (out, final), grads = gradients(conv, case, dtype, weights)
    (true_out, true_final), true_grads = truth(case, dtype, weights)
    rtol, atol = HALF[dtype]
    assert out.dtype == final.dtype == dtype
    torch.testing.assert_close(out.double(), true_out, rtol=rtol, atol=atol)
    assert relative_error(final, true_final) == 0
    for name, grad in grads.items():
        tolerance = (1e-3, 1e-3) if weights == torch.float32 and name in ("weight", "bias") else (rtol, atol)
        torch.testing.assert_close(grad.double(), true_grads[name], rtol=tolerance[0], atol=tolerance[1], msg=name)


def laid_out(x, how):
    """The values of x [.., D, L] in another layout, NaN in the gaps."""
    if how == "channel":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., 3::2] = x
    return wide[..., 3::2]


# Tiles of one time and many channels, of many times and one channel, of both; whole or not; one or several.
SIZES = [(300, 5, 4), (40, 9, 1), (40, 20, 4), (2, 700, 2), (3, 260, 6)]


@pytest.mark.parametrize("how", ["time", "channel", "gaps"])
@pytest.mark.parametrize(("channels", "length", "width"), SIZES)
def test_layouts_and_tiles(channels, length, width, how, monkeypatch):
    from fastlvm.kernels.triton import causal_conv1d as kernels

    for module in (kernels, kernels.short):
        monkeypatch.setattr(module, "_PROGRAMS", 1)  # that one goes through several tiles
    case = Conv(channels=channels, length=length, width=width)

    def op(x, initial_state, **inputs):
        x, initial_state, inputs = to_device((x, initial_state, inputs))
        if how != "time":
            x, initial_state = laid_out(x, how), laid_out(initial_state, how)
        out, state = fastlvm.causal_conv1d(x, **inputs, initial_state=initial_state, backend="triton")
        assert out.stride() == torch.empty_like(x).stride()
        # A view of the output gives the kernel a cotangent in that view's memory.
        return (laid_out(out, how) if how == "gaps" else out).cpu(), state.cpu()

    (out, final), grads = gradients(op, case)
    (true_out, true_final), true_grads = truth(case)
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(final, true_final) == 0
    errors = {name: relative_error(grads[name], true_grads[name]) for name in true_grads}
    assert max(errors.values()) <= GRADIENT, errors


def test_an_expanded_input():
    inputs = Conv(channels=6, options=()).inputs()
    inputs["x"] = inputs["x"][:, :1].expand(2, 6, 6)
    want = fastlvm.causal_conv1d(**inputs, backend="reference")
    x, weight = to_device((inputs["x"][:, :1], inputs["weight"]))
    assert relative_error(fastlvm.causal_conv1d(x.expand(2, 6, 6), weight, backend="triton").cpu(), want) <= FORWARD


PACKED = [(case, lengths) for op, case, lengths in test_packed.CASES if op is fastlvm.causal_conv1d]


@pytest.mark.parametrize(("case", "lengths"), every(2, PACKED), ids=str)
def test_packed_sequences(case, lengths):
    inputs = test_packed._inputs(case, lengths)
    outputs, grads = test_packed._run(conv, inputs, return_final_state=True)
    truths, true_grads = test_packed._true(fastlvm.causal_conv1d, case, lengths)
    assert relative_error(outputs[0], truths[0]) <= FORWARD
    assert outputs[1].shape == truths[1].shape and relative_error(outputs[1], truths[1]) == 0
    errors = {name: relative_error(grads[name], true_grads[name]) for name in true_grads}
    assert max(errors.values()) <= GRADIENT, errors


def test_packed_sequences_in_channel_last_memory():
    inputs = test_packed._inputs(Conv(channels=20), (5, 0, 40, 2), offsets=torch.int64)
    want, want_grads = test_packed._run(conv, inputs, return_final_state=True)
    inputs["x"] = laid_out(inputs["x"], "channel")
    got, grads = test_packed._run(conv, inputs, return_final_state=True)
    assert all(relative_error(a, b) <= 1e-6 for a, b in zip(got, want, strict=True))
    assert all(relative_error(grads[k], want_grads[k]) <= 1e-5 for k in grads)


@pytest.mark.parametrize(("offsets", "message"), test_packed.WRONG, ids=str)
def test_offsets_that_do_not_fit_are_refused(offsets, message):
    inputs = test_packed._inputs(Conv(options=()), (5,)) | {"cu_seqlens": torch.tensor(offsets)}
    with pytest.raises(ValueError, match=f"causal_conv1d: cu_seqlens.* {message}.* wants"):
        conv(**inputs, return_final_state=True)


@pytest.mark.parametrize("width", [1, 2, 7])
def test_two_halves_with_carried_state_are_the_whole(width):
    inputs = Conv(length=9, width=width).inputs()
    whole, last = conv(**inputs, return_final_state=True)
    for cut in every(2, (1, 0, 4, 9)):
        state, parts = inputs["initial_state"], []
        for part in (inputs["x"][..., :cut], inputs["x"][..., cut:]):
            out, state = conv(**{**inputs, "x": part, "initial_state": state}, return_final_state=True)
            parts.append(out)
        assert relative_error(torch.cat(parts, dim=-1), whole) <= 1e-6
        assert torch.equal(state, last)


@pytest.mark.parametrize("kept", [(True, False), (False, True)], ids=["output-alone", "state-alone"])
def test_a_gradient_from_one_output_alone(kept):
    def grads(backend):
        inputs = to_device(Conv().inputs())
        tensors = [v.requires_grad_() for v in inputs.values() if isinstance(v, torch.Tensor)]
        outputs = fastlvm.causal_conv1d(**inputs, return_final_state=True, backend=backend)
        loss = sum(o.sin().sum() for o, keep in zip(outputs, kept, strict=True) if keep)
        return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)

    for got, want in zip(grads("triton"), grads("reference"), strict=True):
        assert relative_error(got.cpu(), want.cpu()) <= GRADIENT


@pytest.mark.parametrize("name", ["x", "weight", "bias", "initial_state"])
def test_one_gradient_alone(name):
    case = Conv(length=7)
    inputs = to_device(case.inputs())
    inputs[name].requires_grad_()
    outputs = fastlvm.causal_conv1d(**inputs, return_final_state=True, backend="triton")
    asked = [(o, g.to(o)) for o, g in zip(outputs, case.cotangents(), strict=True) if o.requires_grad]
    (grad,) = torch.autograd.grad([o for o, _ in asked], inputs[name], [g for _, g in asked])
    assert relative_error(grad.cpu(), truth(case)[1][name]) <= GRADIENT


def test_second_derivatives():
    def second(backend):
        inputs = to_device(Conv(length=3, channels=2).inputs())
        tensors = [v.requires_grad_() for v in inputs.values() if isinstance(v, torch.Tensor)]
        out = fastlvm.causal_conv1d(**inputs, backend=backend)
        first = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), tensors)

    for got, want in zip(second("triton"), second("reference"), strict=True):
        assert relative_error(got.cpu(), want.cpu()) <= GRADIENT


def test_same_bits_every_time():
    case = Conv(channels=20, length=40)

    def bits():
        outputs, grads = gradients(conv, case)
        return [t.numpy().tobytes() for t in (*outputs, *grads.values())]

    assert bits() == bits()


@pytest.mark.parametrize("name", ["x", "initial_state"])
def test_a_nan_stays_in_its_row(name):
    case = Conv(length=33)
    inputs = case.inputs()
    inputs[name][0, 0] = float("nan")
    out, _ = conv(**inputs, return_final_state=True)
    (true_out, _), _ = truth(case)
    assert relative_error(out[1], true_out[1]) <= FORWARD
    assert relative_error(out[0, 1:], true_out[0, 1:]) <= FORWARD
    assert bool(out[0, 0, :3].isnan().all())


def test_what_has_no_kernel():
    inputs = to_device(Conv().inputs())
    wide = {"weight": to_device(torch.zeros(4, 17)), "initial_state": None}
    for changes, message in [
        ({k: v.double() for k, v in inputs.items() if isinstance(v, torch.Tensor)}, "float64 has no kernel"),
        (wide, "a filter of 17 taps has no kernel; wants 16 or less"),
        ({k: v.cpu().numpy() for k, v in inputs.items() if isinstance(v, torch.Tensor)}, "wants torch tensors"),
    ]:
        with pytest.raises(ValueError, match=f"causal_conv1d: backend='triton' cannot run this call: {message}"):
            fastlvm.causal_conv1d(**{**inputs, **changes}, backend="triton")


def _ops():
    import fastlvm.ops.causal_conv1d.triton_op  # noqa: F401, registers both

    return torch.ops.fastlvm.causal_conv1d_triton.default, torch.ops.fastlvm.causal_conv1d_triton_bwd.default


@pytest.mark.parametrize("how", ["whole", "channel", "packed", "bare"])
def test_opcheck(how):
    inputs = Conv(options=()).inputs() if how == "bare" else Conv().inputs()
    if how == "packed":
        inputs = test_packed._inputs(Conv(), (2, 0, 3))
    if how == "channel":
        inputs["x"] = laid_out(inputs["x"], how)
    inputs = to_device(inputs)
    names = ("x", "weight", "bias", "activation", "initial_state", "cu_seqlens")
    args = [inputs.get(name) for name in names]
    args[3] = args[3] is not None
    forward, backward = _ops()
    leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    torch.library.opcheck(forward, leaves)
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    wanted = [a is not None for a in (args[0], args[1], args[2], args[4])]
    grads = [torch.ones_like(o) for o in forward(*args)]
    torch.library.opcheck(backward, (*grads, *args, wanted))


def test_compile_traces_the_whole_call():
    torch._dynamo.reset()

    def step(inputs):
        return fastlvm.causal_conv1d(**inputs, return_final_state=True, backend="triton")

    inputs = to_device(Conv().inputs())
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(inputs), step(inputs), strict=True))


# One token


STEPS = [
    steps.Conv(),
    steps.Conv(options=()),
    steps.Conv(width=1),
    steps.Conv(width=9, channels=70),
    steps.Conv(extra=2),
    steps.Conv(width=1, extra=2),
    steps.Conv(batch=2, channels=300, width=3),
    steps.Conv(batch=0),
    steps.Conv(channels=0),
]


def advance(inputs):
    """Output of the step and its states afterwards, in main memory; the inputs are left alone."""
    inputs = to_device(steps.copied(inputs))
    out = fastlvm.causal_conv1d_step(**inputs, backend="triton")
    return out.cpu(), inputs["state"].cpu()


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_a_step_matches_the_oracle(case):
    out, state = advance(case.inputs())
    true_out, true_state = steps.basic_truth(case)
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(state, true_state) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_step_in_half_precision(dtype):
    for weights in (torch.float32, dtype):
        inputs = steps.Conv().inputs(dtype, weights)
        true_out, true_state = steps.truth(steps.Conv(), inputs)
        out, state = advance(inputs)
        assert (out.dtype, state.dtype) == (dtype, weights)
        assert relative_error(out, true_out) <= torch.finfo(dtype).eps
        assert relative_error(state, true_state) == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("slots", [[4, 0, 2], [-1, 3, -7], [-1, -1, -1]], ids=str)
def test_rows_advance_the_states_they_name(slots, dtype):
    case = steps.Conv(states=5)
    inputs = case.inputs() | {"state_indices": torch.tensor(slots, dtype=dtype)}
    inputs["state"].view(torch.int32)[1] = 0x7FC00001  # a NaN to be kept
    padding = [i for i, slot in enumerate(slots) if slot < 0]
    inputs["x"][padding] = float("nan")
    true_out, true_state = steps.truth(case, inputs)
    out, state = advance(inputs)
    assert relative_error(out, true_out) <= FORWARD
    assert not out[padding].any()
    used = [slot for slot in slots if slot >= 0]
    assert relative_error(state[used], true_state[used]) == 0
    others = [s for s in range(5) if s not in slots]
    assert torch.equal(state[others].view(torch.int32), inputs["state"][others].view(torch.int32))


def test_an_index_too_large_touches_nothing_and_gives_nan():
    case = steps.Conv(states=5)
    inputs = case.inputs() | {"state_indices": torch.tensor([1, 5, 2**40])}
    out, state = advance(inputs)
    assert out[0].isfinite().all() and out[1:].isnan().all()
    assert torch.equal(state[[0, 2, 3, 4]], inputs["state"][[0, 2, 3, 4]])


def test_indices_may_be_strided():
    case = steps.Conv(states=5)
    indices = torch.tensor([4, 9, 0, 9, 2, 9])
    want = advance(case.inputs() | {"state_indices": indices[::2].clone()})
    inputs = to_device(case.inputs())
    out = fastlvm.causal_conv1d_step(**inputs, state_indices=to_device(indices)[::2], backend="triton")
    assert torch.equal(out.cpu(), want[0]) and torch.equal(inputs["state"].cpu(), want[1])


@pytest.mark.parametrize("how", ["channel", "gaps"])
def test_a_state_is_written_where_it_lies(how):
    inputs = to_device(steps.Conv(channels=40).inputs())
    want, after = advance(inputs)
    there = laid_out(inputs["state"], how)
    whole = there._base if there._base is not None else there
    gaps = whole.isnan()
    out = fastlvm.causal_conv1d_step(**{**inputs, "state": there, "x": laid_out(inputs["x"], how)}, backend="triton")
    assert torch.equal(out.cpu(), want)
    assert torch.equal(there.cpu(), after)
    assert torch.equal(whole.isnan(), gaps)


def test_a_state_that_overlaps_is_refused():
    inputs = to_device(steps.Conv().inputs())
    windows = to_device(torch.zeros(200)).as_strided((3, 4, 3), (20, 1, 1))
    with pytest.raises(ValueError, match="state: got memory in which elements may overlap"):
        fastlvm.causal_conv1d_step(**{**inputs, "state": windows}, backend="triton")


def test_many_steps_are_the_convolution():
    inputs = to_device(Conv(length=5).inputs())
    want, final = fastlvm.causal_conv1d(**inputs, return_final_state=True, backend="reference")
    x, state = inputs.pop("x"), inputs.pop("initial_state").clone()
    tokens = [fastlvm.causal_conv1d_step(x[..., t], state, **inputs, backend="triton") for t in range(5)]
    assert relative_error(torch.stack(tokens, dim=-1).cpu(), want.cpu()) <= FORWARD
    assert torch.equal(state, final)


@pytest.mark.parametrize("indices", [None, [3, -1, 0]], ids=["all", "indices"])
def test_opcheck_of_a_step(indices):
    from fastlvm.ops.causal_conv1d_step import triton_op

    inputs = dataclasses.replace(steps.Conv(), states=None if indices is None else 5).inputs()
    inputs["state_indices"] = None if indices is None else torch.tensor(indices)
    inputs = to_device(inputs)
    names = ("x", "state", "weight", "bias", "activation", "state_indices")
    args = [True if name == "activation" else inputs[name] for name in names]
    torch.library.opcheck(triton_op.causal_conv1d_step, args)


def test_autograd_sees_that_a_saved_state_was_written():
    inputs = to_device(steps.Conv().inputs())
    weight = torch.ones_like(inputs["state"], requires_grad=True)
    loss = (weight * inputs["state"]).sum()
    fastlvm.causal_conv1d_step(**inputs, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_steps_in_a_cuda_graph():
    inputs = to_device(steps.Conv(channels=300).inputs())
    want = advance(inputs)
    advance(inputs)
    before = inputs["state"].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastlvm.causal_conv1d_step(**inputs, backend="triton")
    inputs["state"].copy_(before)
    graph.replay()
    assert torch.equal(out.cpu(), want[0]) and torch.equal(inputs["state"].cpu(), want[1])


def test_explain_lists_the_backend():
    for op, inputs in [("causal_conv1d", Conv().inputs()), ("causal_conv1d_step", steps.Conv().inputs())]:
        verdicts = {v.backend: v for v in fastlvm.explain(op, **to_device(inputs))}
        assert list(verdicts) == ["cpu", "triton", "mlx", "reference"]
        assert verdicts["triton"].ok and "Triton" in verdicts["triton"].reason


def test_a_large_batch_is_addressed_in_64_bits():
    if not ON_GPU or torch.cuda.mem_get_info()[0] < 12 * 1024**3:
        pytest.skip("wants 12 GB on a GPU")
    x = torch.zeros(2, 4, 2**29 + 8, device="cuda", dtype=torch.bfloat16)
    x[1, 3, -1] = 1.0
    out = fastlvm.causal_conv1d(x, torch.ones(4, 2, device="cuda"), backend="triton")
    assert np.allclose(out[1, 3, -2:].float().cpu(), [0.0, 1.0]) and float(out.float().abs().sum()) == 1.0
