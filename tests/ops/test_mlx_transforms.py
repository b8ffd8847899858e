"""mlx's transformations over the ops: each gives what plain mlx gives, or is refused in one sentence."""

from __future__ import annotations

import pytest

import fastlvm

from .cases import Conv, Scan
from .mlx_arrays import all_mlx, mx
from .nce_cases import Nce
from .ssd_cases import Ssd

CASES = {"ssm_scan": Scan(length=19, B=2), "causal_conv1d": Conv(), "ssd_scan": Ssd(length=70)}
CASES["info_nce"] = Nce(20, 30, mask="dense")
SYMMETRIC = Nce(20, 20, mask=2, symmetric=True, reduction="none")
LEAD = {"ssm_scan": ("u", "delta", "A", "B", "initial_state"), "causal_conv1d": ("x", "weight", "initial_state")}
LEAD |= {"ssd_scan": ("x", "dt", "A", "C", "initial_state"), "info_nce": ("queries", "keys")}

ops = pytest.mark.parametrize("op", CASES)


def _function(op, backend, case=None):
    """The op as a function of some of its arrays, of all its results; and those arrays."""
    inputs = all_mlx((case or CASES[op]).inputs())
    names = LEAD[op]
    state = {} if op == "info_nce" else {"return_final_state": True}

    def function(*arrays):
        found = getattr(fastlvm, op)(**inputs | dict(zip(names, arrays, strict=True)), **state, backend=backend)
        return list(found) if isinstance(found, tuple) else [found]

    return function, [inputs[name] for name in names]


def _loss(op, backend):
    function, arrays = _function(op, backend)
    return lambda *xs: sum(y.sin().sum() for y in function(*xs)), arrays


def _all(arrays):
    return tuple(range(len(arrays)))


def _close(got, want, tolerance=1e-5):
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert float(mx.linalg.norm(x - y)) <= tolerance * float(mx.linalg.norm(y)) + 1e-7


@ops
def test_value_and_grad(op):
    loss, arrays = _loss(op, "auto")
    plain, _ = _loss(op, "reference")
    value, grads = mx.value_and_grad(loss, argnums=_all(arrays))(*arrays)
    want, want_grads = mx.value_and_grad(plain, argnums=_all(arrays))(*arrays)
    _close([value], [want])
    _close(grads, want_grads, 1e-4)


@ops
def test_one_gradient_alone(op):
    loss, arrays = _loss(op, "auto")
    together = mx.grad(loss, argnums=_all(arrays))(*arrays)
    for i, want in enumerate(together):
        _close([mx.grad(loss, argnums=i)(*arrays)], [want], 1e-6)


@ops
def test_compile(op):
    function, arrays = _function(op, "auto")
    _close(mx.compile(function)(*arrays), function(*arrays))
    loss, _ = _loss(op, "auto")
    gradient = mx.grad(loss, argnums=_all(arrays))
    _close(mx.compile(gradient)(*arrays), gradient(*arrays), 1e-4)


def test_compile_of_other_shapes():
    compiled = mx.compile(lambda u, delta: fastlvm.ssm_scan(u, delta, A, A, A), shapeless=False)
    A = -mx.ones((4, 3))
    for length in (1, 7, 40):
        u = mx.random.normal((2, 4, length))
        _close([compiled(u, mx.abs(u))], [fastlvm.ssm_scan(u, mx.abs(u), A, A, A)])


@ops
def test_vmap(op):
    function, arrays = _function(op, "auto")
    scales = (1.0, 0.5, 0.25)
    stacked = [mx.stack([s * x for s in scales]) for x in arrays]
    each = [function(*(s * x for x in arrays)) for s in scales]
    _close(mx.vmap(function)(*stacked), [mx.stack(ys) for ys in zip(*each, strict=True)])
    axes = (0, *(None for _ in arrays[1:]))
    first = [function(s * arrays[0], *arrays[1:]) for s in scales]
    got = mx.vmap(function, in_axes=axes)(stacked[0], *arrays[1:])
    _close(got, [mx.stack(ys) for ys in zip(*first, strict=True)])


@ops
def test_vmap_of_a_gradient_and_a_gradient_of_vmap(op):
    loss, arrays = _loss(op, "auto")
    stacked = mx.stack([arrays[0], 0.5 * arrays[0]])
    want = mx.stack([mx.grad(loss)(x, *arrays[1:]) for x in stacked])
    _close([mx.vmap(lambda x: mx.grad(loss)(x, *arrays[1:]))(stacked)], [want], 1e-4)
    together = mx.grad(lambda xs: mx.vmap(lambda x: loss(x, *arrays[1:]))(xs).sum())
    _close([together(stacked)], [want], 1e-4)


@ops
def test_vmap_over_cotangents(op):
    """Rows of a Jacobian: the forward has run already when the backward is traced."""
    function, arrays = _function(op, "auto")
    shapes = [y.shape for y in function(*arrays)]
    cotangents = [mx.random.normal((3, *shape)) for shape in shapes]

    def pull(*ct):
        return mx.vjp(function, arrays, list(ct))[1]

    want = [mx.stack(gs) for gs in zip(*(pull(*(c[i] for c in cotangents)) for i in range(3)), strict=True)]
    _close(mx.vmap(pull)(*cotangents), want, 1e-4)


@ops
def test_forward_mode(op):
    function, arrays = _function(op, "auto")
    plain, _ = _function(op, "reference")
    tangents = [mx.random.normal(x.shape) for x in arrays]
    _close(mx.jvp(function, arrays, tangents)[1], mx.jvp(plain, arrays, tangents)[1], 1e-4)
    one = mx.jvp(lambda x: function(x, *arrays[1:]), arrays[:1], tangents[:1])[1]
    _close(one, mx.jvp(lambda x: plain(x, *arrays[1:]), arrays[:1], tangents[:1])[1], 1e-4)


@ops
def test_second_and_third_derivatives(op):
    """Each along fixed directions of the one before."""

    def derivative(backend, order):
        loss, arrays = _loss(op, backend)
        along = mx.random.normal(arrays[0].shape, key=mx.random.key(order))

        def of_first(x):
            return loss(x, *arrays[1:])

        function = of_first
        for _ in range(order - 1):
            function = lambda x, f=function: (along * mx.grad(f)(x)).sum()  # noqa: E731
        return mx.grad(function)(arrays[0])

    for order in (2, 3):
        _close([derivative("auto", order)], [derivative("reference", order)], 1e-4)


@ops
def test_checkpoint_and_export(op, tmp_path):
    loss, arrays = _loss(op, "auto")
    _close([mx.grad(lambda x: mx.checkpoint(loss)(x, *arrays[1:]))(arrays[0])], [mx.grad(loss)(*arrays)], 1e-6)
    function, _ = _function(op, "auto")
    path = str(tmp_path / "op.mlxfn")
    mx.export_function(path, lambda *xs: tuple(function(*xs)), *arrays)
    _close(mx.import_function(path)(*arrays), function(*arrays))


@ops
def test_the_named_backend_says_that_mlx_traces(op):
    function, arrays = _function(op, "mlx")
    for transform in (mx.compile, mx.vmap):
        with pytest.raises(ValueError, match=f"{op}: backend='mlx' cannot run this call: mlx traces this call"):
            transform(function)(*(x[None] if transform is mx.vmap else x for x in arrays))


def test_explain_while_mlx_traces():
    function, arrays = _function("ssm_scan", "auto")
    found = []

    def traced(*xs):
        inputs = all_mlx(CASES["ssm_scan"].inputs()) | dict(zip(LEAD["ssm_scan"], xs, strict=True))
        found.extend(fastlvm.explain("ssm_scan", **inputs))
        return function(*xs)

    mx.compile(traced)(*arrays)
    assert [(v.backend, v.ok) for v in found[2:4]] == [("mlx", False), ("reference", True)]
    assert "mlx traces" in found[2].reason


@pytest.mark.parametrize("transform", [mx.compile, mx.vmap], ids=["compile", "vmap"])
def test_symmetric_loss_with_labels(transform):
    function, arrays = _function("info_nce", "auto", SYMMETRIC)
    if transform is mx.vmap:
        _close(mx.vmap(function)(*(x[None] for x in arrays)), [y[None] for y in function(*arrays)])
    else:
        _close(mx.compile(function)(*arrays), function(*arrays))


@pytest.mark.parametrize("op", ["ssm_scan", "causal_conv1d"])
def test_offsets_of_packed_sequences_are_constants_while_mlx_traces(op):
    case = Scan(batch=1, options=()) if op == "ssm_scan" else Conv(batch=1, options=())
    inputs, offsets = all_mlx(case.inputs()), mx.array([0, 2, 6])
    want = getattr(fastlvm, op)(**inputs, cu_seqlens=offsets)
    lead = next(iter(inputs))

    def call(x, cu_seqlens=offsets):
        return getattr(fastlvm, op)(**inputs | {lead: x}, cu_seqlens=cu_seqlens)

    _close([mx.compile(call)(inputs[lead])], [want])
    with pytest.raises(ValueError, match=f"{op}: cu_seqlens: mlx traces this call .* wants a constant"):
        mx.compile(call)(inputs[lead], offsets)
