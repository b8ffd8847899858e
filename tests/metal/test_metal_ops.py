"""The public ops where mlx's default device is the GPU: which kernels they launch, emulated, and what comes of it."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

import fastlvm  # noqa: E402
from fastlvm.ops import _metal  # noqa: E402
from ops import oracle, steps  # noqa: E402
from ops.cases import ALL, Conv, Scan, truth  # noqa: E402
from ops.mlx_arrays import all_mlx, floats, gradients, to_mlx, to_torch  # noqa: E402
from ops.oracle import relative_error  # noqa: E402
from ops.steps import Ssm  # noqa: E402
from ops.test_packed import _inputs as packed_inputs  # noqa: E402
from ops.test_packed import _truth as packed_truth  # noqa: E402

from .calls import FORWARD, HALF, check  # noqa: E402

OPS = {Scan: fastlvm.ssm_scan, Conv: fastlvm.causal_conv1d}
SCANS = [Scan(length=n, state=16) for n in (0, 1, 5, 8, 40)]
SCANS += [Scan(length=5, state=128, channels=9), Scan(length=9, state=300, B=2, channels=2), Scan(state=0)]
SCANS += [Scan(length=260, batch=1, channels=2, state=16)]  # three chunks
SCANS += [Scan(state=16, B=b, C=c) for b, c in [("dn", "bnl"), (1, 4), (2, "dn")]]
SCANS += [Scan(state=16, options=o) for o in [(), ("z",), ("D", "delta_softplus"), ALL[1:4]]]
SCANS += [Scan(batch=0, state=16), Scan(channels=0, state=16)]
CONVS = [Conv(length=n) for n in (0, 1, 2, 33)]
CONVS += [Conv(width=w) for w in (1, 9)] + [Conv(options=o) for o in [(), ("bias",), ("initial_state",)]]
CONVS += [Conv(batch=0)]
STEPS = [Ssm(state=n, channels=6) for n in (0, 16, 128)] + [Ssm(options=()), Ssm(B=1, C=4), Ssm(batch=0)]
STEPS += [steps.Conv(), steps.Conv(width=1, options=()), steps.Conv(width=2, extra=3), steps.Conv(batch=0)]
BASIC = {"ssm_scan": Scan(state=16), "causal_conv1d": Conv(), "ssm_step": Ssm(), "causal_conv1d_step": steps.Conv()}
LONG = Scan(length=260, batch=1, channels=2, state=16)

ops = pytest.mark.parametrize("op", BASIC)
whole = pytest.mark.parametrize("case", [BASIC["ssm_scan"], BASIC["causal_conv1d"]], ids=["ssm_scan", "causal_conv1d"])
tokens = pytest.mark.parametrize("case", [Ssm(), steps.Conv()], ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """What mlx says on a Mac; it goes on computing on the CPU here, and the recorder launches the kernels."""
    monkeypatch.delenv("FASTLVM_BACKEND", raising=False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)


def _run(inputs, cotangents, backend="mlx", **more):
    """Outputs of the op the inputs belong to, and every gradient by name, as torch tensors."""
    op = fastlvm.causal_conv1d if "x" in inputs else fastlvm.ssm_scan
    op = functools.partial(op, return_final_state=True, backend=backend)
    return gradients(op, all_mlx(inputs) | more, [to_mlx(g) for g in cotangents])


def _launched(recorder):
    return [launch.name.removeprefix("fastlvm_") for launch in recorder.launches]


@pytest.mark.parametrize("case", [*SCANS, *CONVS], ids=lambda case: f"{type(case).__name__}-{case}")
def test_matches_the_oracle(case, recorder):
    inputs = case.inputs()
    check(inputs, *_run(inputs, case.cotangents()), truth(case))
    name = OPS[type(case)].__name__
    nothing = 0 in (case.batch, case.channels, case.length, getattr(case, "state", 1))
    assert [each.removesuffix("_short") for each in _launched(recorder)] == ([] if nothing else [name, f"{name}_bwd"])


@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32-weights", "all-half"])
@pytest.mark.parametrize("dtype", list(HALF), ids=str)
@pytest.mark.parametrize("case", [Scan(length=33, state=16, B=2), Conv(length=33)], ids=["ssm_scan", "causal_conv1d"])
def test_half_precision(case, dtype, weights):
    inputs = case.inputs(dtype, weights or dtype)
    of_state = dtype if isinstance(case, Conv) else torch.float32
    out, state = case.cotangents()
    outputs, grads = _run(inputs, (out.to(dtype), state.to(of_state)))
    wants, true_grads = truth(case, dtype, weights or dtype)
    rtol, atol = HALF[dtype]
    assert [x.dtype for x in outputs] == [dtype, of_state]
    for got, want in zip(outputs, wants, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert relative_error(grad, true_grads[name]) <= {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype], name


@pytest.mark.parametrize("turn", [0, 2])
@whole
def test_each_array_may_have_a_dtype_of_its_own(case, turn):
    kinds = itertools.islice(itertools.cycle([torch.float32, torch.float16, torch.bfloat16]), turn, None)
    inputs = {key: x.to(next(kinds)) if torch.is_tensor(x) else x for key, x in case.inputs().items()}
    lead = next(iter(inputs.values())).dtype
    out, state = case.cotangents()
    cotangents = (out.to(lead), state.to(lead if isinstance(case, Conv) else torch.float32))
    outputs, grads = _run(inputs, cotangents)
    assert outputs[0].dtype == lead
    formula = oracle.causal_conv1d if isinstance(case, Conv) else oracle.ssm_scan
    wants, true_grads = oracle.run(formula, inputs, cotangents)
    for got, want in zip(outputs, wants, strict=True):
        assert relative_error(got, want) <= torch.finfo(got.dtype).eps + FORWARD
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert relative_error(grad, true_grads[name]) <= torch.finfo(grad.dtype).eps + 1e-4, name


PACKED = [(Scan(state=16), (2, 5, 0, 9), torch.int64), (Scan(state=16), (300, 0, 270), torch.int32)]
PACKED += [(Scan(state=16, options=("z",)), (), torch.int32)]
PACKED += [(Conv(), (40, 0, 1, 30), torch.int32), (Conv(), (3, 0, 4), torch.int64), (Conv(), (), torch.int32)]


@pytest.mark.parametrize(("case", "lengths", "dtype"), PACKED, ids=str)
def test_packed_sequences(case, lengths, dtype):
    inputs = packed_inputs(case, lengths, offsets=dtype)
    wants, true_grads = packed_truth(OPS[type(case)], inputs)
    g = torch.Generator().manual_seed(1)  # the one of `packed_truth`
    cotangents = [torch.randn(o.shape, generator=g).float() for o in wants]
    check(inputs, *_run(inputs, cotangents), (wants, true_grads))


@pytest.mark.parametrize("how", ["channel-last", "every-other", "backwards"])
@whole
def test_strides_are_read_as_they_are(case, how):
    ways = {
        "channel-last": lambda x: mx.contiguous(x.swapaxes(-1, -2)).swapaxes(-1, -2) if x.ndim > 1 else x,
        "every-other": lambda x: mx.repeat(x, 2, axis=-1)[..., ::2],
        "backwards": lambda x: mx.contiguous(x[..., ::-1])[..., ::-1],
    }
    inputs = case.inputs()
    views = {key: ways[how](x) for key, x in floats(all_mlx(inputs)).items()}
    outputs, grads = _run(inputs, case.cotangents(), **views)
    check(inputs, outputs, grads, truth(case))


@pytest.mark.parametrize("case", [LONG, *BASIC.values()], ids=lambda case: f"{type(case).__name__}-{case}")
def test_auto_takes_the_kernels_once(case, recorder):
    """The states a long scan keeps reach its backward: it is not run again."""
    if isinstance(case, Scan | Conv):
        _run(case.inputs(), case.cotangents(), backend="auto")
        name = OPS[type(case)].__name__
        assert [each.removesuffix("_short") for each in _launched(recorder)] == [name, f"{name}_bwd"]
        if case is LONG:
            assert recorder.launches[0].stores["kept"][0] > 0
            assert recorder.launches[1].loads["kept"][0] > 0
    else:
        case.op(**all_mlx(case.inputs()))
        assert _launched(recorder) == [case.name]


@pytest.mark.parametrize("case", [BASIC["ssm_scan"], LONG], ids=str)
def test_one_gradient_alone_and_none_of_the_final_state(case, recorder):
    inputs = all_mlx(case.inputs())

    def loss(B, backend="auto"):
        return fastlvm.ssm_scan(**inputs | {"B": B}, backend=backend).square().sum()

    value, grad = mx.value_and_grad(loss)(inputs["B"])
    want, want_grad = mx.value_and_grad(functools.partial(loss, backend="reference"))(inputs["B"])
    assert abs(value.item() - want.item()) <= FORWARD * want.item()
    assert relative_error(to_torch(grad), to_torch(want_grad)) <= 1e-4
    assert [each.removesuffix("_short") for each in _launched(recorder)] == ["ssm_scan", "ssm_scan_bwd"]
    assert recorder.launches[0].stores["final_state"][0] == recorder.launches[1].loads["grad_final"][0] == 0
    checkpointed = mx.grad(lambda B: mx.checkpoint(loss)(B))(inputs["B"])
    assert mx.array_equal(checkpointed, grad).item()


@pytest.mark.parametrize("case", [LONG, BASIC["causal_conv1d"]], ids=["ssm_scan", "causal_conv1d"])
def test_forward_mode_and_second_derivatives_are_those_of_plain_mlx(case):
    inputs = all_mlx(case.inputs())
    lead, x = next(iter(inputs.items()))
    along = mx.random.normal(x.shape, key=mx.random.key(1))

    def function(backend):
        def run(x):
            op = OPS[type(case)]
            return sum(y.sin().sum() for y in op(**inputs | {lead: x}, return_final_state=True, backend=backend))

        return run

    for of in (
        lambda f: mx.jvp(f, [x], [along])[1][0],
        lambda f: mx.grad(lambda x: (along * mx.grad(f)(x)).sum())(x),
    ):
        got, want = (to_torch(of(function(backend))) for backend in ("mlx", "reference"))
        assert relative_error(got, want) <= 1e-4


class _Reached(Exception):
    """A compiled function came to a launch, of which the arguments are to be computed first."""


def _compiled(function, arrays, recorder, monkeypatch, states=None):
    """`mx.compile(function)(*arrays)`, each launch emulated on what a compiled graph gives it.

    mlx evaluates no Metal kernel here, so the function is compiled once for every launch, up to its arguments, and at
    last with all their results as constants. `states` is a list of arrays that the function may replace.
    """
    done, pending = [], []

    def kernel(**built):
        def launch(**call):
            turn = next(turns)
            if turn == len(done):
                pending.append((recorder.metal_kernel(**built), call))
                raise _Reached
            return done[turn]

        return launch

    def traced(*xs):
        try:
            return function(*xs)
        except _Reached:
            return pending[-1][1]["inputs"]

    monkeypatch.setattr(mx.fast, "metal_kernel", kernel)
    _metal.kernel.cache_clear()
    how = {} if states is None else {"inputs": states, "outputs": states}
    while True:
        turns, before = itertools.count(), len(pending)
        found = mx.compile(lambda *xs: traced(*xs), **how)(*arrays)
        if len(pending) == before:
            return found
        emulated, call = pending[-1]
        mx.eval(found)
        done.append(emulated(**{**call, "inputs": found}))


@pytest.mark.parametrize("case", [Scan(state=16), LONG, Conv()], ids=str)
def test_compiled(case, recorder, monkeypatch):
    """Nothing can be evaluated while mlx traces: an op that tried would go on to plain mlx."""
    inputs, cotangents = case.inputs(), [to_mlx(g) for g in case.cotangents()]
    arrays = floats(all_mlx(inputs))
    flags = {key: x for key, x in inputs.items() if key not in arrays}

    def function(*xs):
        named = dict(zip(arrays, xs, strict=True))
        return list(OPS[type(case)](**named, **flags, return_final_state=True))

    def pulled(*xs):
        outputs, grads = mx.vjp(function, list(xs), cotangents)
        return [*outputs, *grads]

    found = [to_torch(x) for x in _compiled(pulled, list(arrays.values()), recorder, monkeypatch)]
    check(inputs, found[:2], dict(zip(arrays, found[2:], strict=True)), truth(case))
    name = OPS[type(case)].__name__
    assert [each.removesuffix("_short") for each in _launched(recorder)] == [name, f"{name}_bwd"]


@tokens
def test_a_compiled_step_replaces_a_state_that_mlx_knows_of(case, recorder, monkeypatch):
    inputs = case.inputs()
    arrays = all_mlx(inputs)
    x, cache = arrays.pop("x"), [arrays.pop("state")]

    def function(x):
        return [case.op(x=x, state=cache[0], **arrays)]

    (out,) = _compiled(function, [x], recorder, monkeypatch, cache)
    for got, want in zip((out, cache[0]), steps.truth(case, inputs), strict=True):
        assert relative_error(to_torch(got), want) <= FORWARD
    assert _launched(recorder) == [case.name]


@whole
def test_packed_sequences_of_a_compiled_function_have_constant_offsets(case, recorder, monkeypatch):
    inputs = packed_inputs(case, (2, 0, 4))
    wants, _ = packed_truth(OPS[type(case)], inputs)
    arrays = all_mlx(inputs)
    lead, offsets = next(iter(arrays)), arrays.pop("cu_seqlens")

    def function(x, cu_seqlens=offsets, backend="auto"):
        return [OPS[type(case)](**arrays | {lead: x}, cu_seqlens=cu_seqlens, backend=backend)]

    (out,) = _compiled(function, [arrays[lead]], recorder, monkeypatch)
    assert relative_error(to_torch(out), wants[0]) <= FORWARD
    assert _launched(recorder) == [OPS[type(case)].__name__]
    with pytest.raises(ValueError, match=r"cu_seqlens: mlx traces this call .* wants a constant"):
        mx.compile(function)(arrays[lead], offsets)
    with pytest.raises(ValueError, match="backend='mlx' cannot run this call: cu_seqlens: mlx traces"):
        mx.compile(functools.partial(function, backend="mlx"))(arrays[lead], offsets)


@pytest.mark.parametrize(("offsets", "says"), [([1, 6], "begins with 1"), ([0, 4, 3, 6], "falls"), ([0, 5], "ends")])
@whole
def test_packed_sequences_that_do_not_fit(case, offsets, says, recorder):
    inputs = all_mlx(type(case)(batch=1, options=()).inputs())
    with pytest.raises(ValueError, match=f"{OPS[type(case)].__name__}: cu_seqlens {says}"):
        OPS[type(case)](**inputs, cu_seqlens=mx.array(offsets))
    assert not recorder.launches


def _mapped(function, arrays):
    """mx.vmap over the first of them."""
    return mx.vmap(function, in_axes=(0, *[None] * (len(arrays) - 1)))(mx.stack([arrays[0]] * 2), *arrays[1:])


@pytest.fixture
def hollow(monkeypatch):
    """Kernels that give the sum of all their inputs, lazily, by an operation that mx.vmap does not know either."""

    def kernel(**built):
        def launch(*, inputs, output_shapes, output_dtypes, **call):
            launched.append(built["name"])
            total = sum(x.astype(mx.float32).sum() for x in inputs)
            first = mx.array([0])
            total = mx.gather_mm(total.reshape(1, 1, 1), mx.ones((1, 1, 1)), first, first).reshape(())
            pairs = zip(output_shapes, output_dtypes, strict=True)
            return [(total + mx.zeros(shape)).astype(dtype) for shape, dtype in pairs]

        return launch

    launched = []

    monkeypatch.setattr(mx.fast, "metal_kernel", kernel)
    _metal.kernel.cache_clear()
    return launched


@ops
def test_vmap_is_refused_in_one_sentence(op, hollow):
    arrays = all_mlx(BASIC[op].inputs())
    says = "mx.vmap does not go through a Metal kernel; make its axis part of the batch, or use backend='reference'"
    if op.endswith("step"):
        says = "a step in place has no mx.vmap; make its axis part of the batch"
    for name in ("x", "state", "weight", "u", "A", "z"):  # whichever of the arrays it is
        if name not in arrays:
            continue
        with pytest.raises(ValueError, match=f"^{op}: {says}"):
            _mapped(lambda x, name=name: getattr(fastlvm, op)(**arrays | {name: x}), [arrays[name]])


@whole
def test_vmap_of_a_gradient_or_over_cotangents_is_refused_and_plain_mlx_takes_it(case, hollow):
    op, arrays = OPS[type(case)], all_mlx(case.inputs())
    lead, x = next(iter(arrays.items()))

    def function(x, backend="auto"):
        return op(**arrays | {lead: x}, backend=backend)

    with pytest.raises(ValueError, match=f"^{op.__name__}: mx.vmap does not go"):
        _mapped(mx.grad(lambda x: function(x).sum()), [x])
    with pytest.raises(ValueError, match=f"^{op.__name__}: mx.vmap does not go"):
        _mapped(lambda g: mx.vjp(function, [x], [g])[1][0], [mx.ones(x.shape)])
    out = _mapped(functools.partial(function, backend="reference"), [x])
    assert relative_error(to_torch(out[1]), truth(case)[0][0]) <= FORWARD


def _late(path, x):
    """An array that reads its values from a file when it is evaluated, zeros until `arrive` is called; and that."""
    np.save(path, np.zeros_like(x))
    array = mx.load(str(path))

    def arrive():
        with path.open("r+b") as file:
            file.seek(-x.nbytes, 2)
            file.write(x.tobytes())

    return array, arrive


@pytest.mark.parametrize("backend", ["auto", "mlx"])
@ops
def test_nothing_is_evaluated_before_the_caller_does(op, backend, hollow, tmp_path):
    """Values that come after the call count."""

    def results(given):
        """The output, and gradients or the state; and whether the op said it would run here."""
        call = functools.partial(getattr(fastlvm, op), backend=backend)
        verdicts = {v.backend: v.ok for v in fastlvm.explain(op, **given)}
        if op.endswith("step"):
            return [call(**given), given["state"]], verdicts
        leaves = floats(given)
        out, grads = mx.vjp(
            lambda *xs: [call(**given | dict(zip(leaves, xs, strict=True)))], list(leaves.values()), [cotangent]
        )
        return [*out, *grads], verdicts

    tensors = BASIC[op].inputs()
    values = {key: x.numpy() for key, x in tensors.items() if torch.is_tensor(x)}
    now = all_mlx(tensors)
    lead = next(iter(values))
    pairs = {key: _late(tmp_path / f"{key}.npy", x) for key, x in values.items()}
    cotangent, arrive = _late(tmp_path / "cotangent.npy", values[lead] + 1)
    late, verdicts = results(now | {key: array for key, (array, _) in pairs.items()})
    assert verdicts["mlx"] and len(hollow) == (1 if op.endswith("step") else 2)
    for come in (arrive, *(come for _, come in pairs.values())):
        come()
    mx.eval(late)
    cotangent = mx.array(values[lead] + 1)
    want, _ = results(now)
    for x, y in zip(late, want, strict=True):
        assert mx.array_equal(x, y).item()
        assert mx.abs(y).max().item() > 0


@pytest.mark.parametrize("case", STEPS, ids=lambda case: f"{case.name}-{case}")
def test_steps_match_the_oracle(case):
    inputs = case.inputs()
    arrays = all_mlx(inputs)
    state = arrays["state"]
    kept = mx.array(state), state[1:], state + 0  # an mlx array is a value: what was made of it stays
    out = case.op(**arrays, backend="mlx")
    want, after = steps.truth(case, inputs)
    assert relative_error(to_torch(out), want) <= FORWARD
    assert relative_error(to_torch(state), after) <= FORWARD
    for x, before in zip(kept, (inputs["state"], inputs["state"][1:], inputs["state"]), strict=True):
        assert torch.equal(to_torch(x), before)


@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32-state", "all-half"])
@pytest.mark.parametrize("dtype", list(HALF), ids=str)
@pytest.mark.parametrize("case", [Ssm(state=16), steps.Conv()], ids=lambda case: case.name)
def test_steps_in_half_precision(case, dtype, weights):
    inputs = case.inputs(dtype, weights or dtype)
    arrays = all_mlx(inputs)
    out = to_torch(case.op(**arrays))
    after = to_torch(arrays["state"])
    assert (out.dtype, after.dtype) == (dtype, weights or dtype)
    rtol, atol = HALF[dtype]
    for got, want in zip((out, after), steps.truth(case, inputs), strict=True):
        torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", [Ssm(batch=4, states=6), steps.Conv(batch=4, states=6)], ids=lambda case: case.name)
def test_steps_of_a_pool(case, kind):
    inputs = case.inputs() | {"state_indices": torch.tensor([5, -1, 0, 3], dtype=kind)}
    arrays = all_mlx(inputs)
    found = case.op(**arrays), arrays["state"]
    for got, want in zip(found, steps.truth(case, inputs), strict=True):
        assert relative_error(to_torch(got), want) <= FORWARD


@pytest.mark.parametrize("case", [Ssm(batch=3, states=2), steps.Conv(batch=3, states=2)], ids=lambda case: case.name)
def test_an_index_of_no_state_is_not_noticed_but_moves_nothing(case):
    inputs = case.inputs() | {"state_indices": torch.tensor([2, 1, 99])}
    arrays = all_mlx(inputs)
    out = to_torch(case.op(**arrays))
    assert bool(out[[0, 2]].isnan().all()) and bool(out[1].isfinite().all())
    assert torch.equal(to_torch(arrays["state"])[0], inputs["state"][0])
    with pytest.raises(ValueError, match="state_indices: got 2, wants less than 2"):  # plain mlx looks at them
        case.op(**all_mlx(inputs), backend="reference")
    indices = arrays.pop("state_indices")
    with pytest.raises(ValueError, match=f"{case.name}: state_indices: mlx traces this call .* wants a constant"):
        mx.compile(lambda i: case.op(**arrays, state_indices=i, backend="reference"))(indices)


@pytest.mark.parametrize("backend", ["mlx", "reference"])
@tokens
def test_a_step_has_no_gradient(case, backend):
    arrays = all_mlx(case.inputs())
    x = arrays.pop("x")
    with pytest.raises(ValueError, match=f"{case.name}: a step in place has no gradient; use fastlvm"):
        mx.grad(lambda x: case.op(x=x, **arrays, backend=backend).sum())(x)
    with pytest.raises(ValueError, match=f"{case.name}: a step in place has no gradient"):
        mx.jvp(lambda x: case.op(x=x, **arrays, backend=backend), [x], [mx.ones_like(x)])


@tokens
def test_a_step_of_plain_mlx_has_no_vmap(case):
    arrays = all_mlx(case.inputs())
    x = arrays.pop("x")
    with pytest.raises(ValueError, match=f"{case.name}: a step in place has no mx.vmap; make its axis part"):
        _mapped(lambda x: case.op(x=x, **arrays, backend="reference"), [x])


@ops
def test_explain_says_what_would_run(op, monkeypatch, recorder):
    inputs = all_mlx(BASIC[op].inputs())

    def mlx():
        return next(v for v in fastlvm.explain(op, **inputs) if v.backend == "mlx")

    assert mlx().ok and mlx().reason == f"Metal kernels, mlx {mx.__version__}"
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert not mlx().ok and "gpu without Metal" in mlx().reason
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    assert mlx().ok and "compiled kernels" in mlx().reason
    getattr(fastlvm, op)(**inputs)
    assert not recorder.launches


@ops
def test_float64_is_refused(op, recorder):
    inputs = all_mlx(BASIC[op].inputs(torch.float64, torch.float64))
    with pytest.raises(
        ValueError, match=f"{op}: backend='mlx' cannot run this call: float64 has no Metal kernel; wants"
    ):
        getattr(fastlvm, op)(**inputs, backend="mlx")
    getattr(fastlvm, op)(**inputs)  # plain mlx
    assert not recorder.launches


@pytest.mark.parametrize("case", [Conv(width=17), steps.Conv(width=17)], ids=["causal_conv1d", "causal_conv1d_step"])
def test_a_wide_filter_goes_to_plain_mlx(case, recorder, monkeypatch):
    op = getattr(case, "op", fastlvm.causal_conv1d)
    inputs = all_mlx(case.inputs())
    with pytest.raises(ValueError, match=r"cannot run this call: a filter of 17 taps has no Metal kernel; wants 16"):
        op(**inputs, backend="mlx")
    out = op(**inputs)
    want = truth(case)[0][0] if isinstance(case, Conv) else steps.truth(case, case.inputs())[0]
    assert relative_error(to_torch(out), want) <= FORWARD
    assert not recorder.launches
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    op(**inputs, backend="mlx")  # the compiled kernels take any
