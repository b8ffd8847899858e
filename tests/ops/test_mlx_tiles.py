"""The loss in plain mlx over tiles of logits: right, under mlx's transformations as well, and in little memory."""

from __future__ import annotations

import functools

import pytest
import torch

from fastlvm.ops.info_nce import reference, reference_mlx, tiles_mlx

from .mlx_arrays import all_mlx, gradients, mx, to_mlx
from .nce_cases import GRID, Nce, truth
from .oracle import relative_error

FORWARD, GRADIENT = 1e-5, 1e-4
CASES = [case for case in GRID if case.batch <= 130]  # the oracle takes seconds for more
SOME = [
    Nce(70, 131, 33, reduction="none"),
    Nce(33, 33, 17, symmetric=True, mask=2),
    Nce(40, 40, 9, mask="dense"),
    Nce(50, 50, 9, symmetric=True, reduction="none"),
]
some = pytest.mark.parametrize("case", SOME, ids=str)


@pytest.fixture(params=[(16, 24), (1024, 1024)], ids=["small-tiles", "own-tiles"])
def tiles(request, monkeypatch):
    """Small tiles: many of them, ragged ones, and others than squares, so that they meet the diagonal anywhere."""
    monkeypatch.setattr(tiles_mlx, "_ROWS", request.param[0])
    monkeypatch.setattr(tiles_mlx, "_COLUMNS", request.param[1])


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles_mlx, "_ROWS", 16)
    monkeypatch.setattr(tiles_mlx, "_COLUMNS", 24)


def _loss(queries, keys, temperature, symmetric, mask, reduction):
    return reference_mlx.run(queries, keys, temperature, symmetric, reference.split(mask), reduction)


def _whole(queries, keys, temperature, symmetric, mask, reduction):
    """The same with all logits in memory, and derivatives by mlx."""
    logits, batch = queries @ keys.T / temperature, len(queries)
    own = mx.arange(batch)[:, None] == mx.arange(len(keys))
    if isinstance(mask, tuple):
        ours, theirs = mask
        mask = mx.any((ours[:, None] == theirs) & (ours[:, None] >= 0), axis=-1)
    if mask is not None:
        logits = mx.where(mask & ~own, -mx.inf, logits)
    each = mx.logsumexp(logits, axis=1)
    if symmetric:
        each = (each + mx.logsumexp(logits, axis=0)) / 2
    return reference_mlx.reduced(each - mx.where(own, logits, 0).sum(1), reduction)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients(case, tiles):
    want, true_grads = truth(case)
    [loss], grads = gradients(_loss, all_mlx(case.inputs()), [to_mlx(case.cotangent())])
    assert loss.dtype == torch.float32
    assert relative_error(loss, want) <= FORWARD
    assert grads.keys() == true_grads.keys()
    assert all(relative_error(grads[name], true_grads[name]) <= GRADIENT for name in grads)


@some
def test_float64(case, small_tiles):
    # mlx's own exp has the precision of float32 in float64, too.
    want, true_grads = truth(case, torch.float64)
    [loss], grads = gradients(_loss, all_mlx(case.inputs(torch.float64)), [to_mlx(case.cotangent().double())])
    assert {x.dtype for x in (loss, *grads.values())} == {torch.float64}
    assert relative_error(loss, want) <= 1e-6
    assert all(relative_error(grads[name], true_grads[name]) <= 1e-6 for name in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@some
def test_halves_are_summed_in_float32(case, dtype, small_tiles):
    want, true_grads = truth(case, dtype)
    [loss], grads = gradients(_loss, all_mlx(case.inputs(dtype)), [to_mlx(case.cotangent())])
    assert loss.dtype == torch.float32
    assert relative_error(loss, want) <= FORWARD
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert relative_error(grad, true_grads[name]) <= torch.finfo(dtype).eps  # rounded once


@pytest.mark.parametrize("symmetric", [False, True])
def test_tiles_of_masked_logits_alone(symmetric, small_tiles):
    """The loss is 0 then; neither it nor a derivative in any mode is NaN."""
    queries, keys = all_mlx(Nce(70, 70, 6).vectors()).values()
    labels = mx.zeros((70, 2), mx.int64)
    for mask in (mx.ones((70, 70), mx.bool_), (labels, labels)):
        loss = functools.partial(_loss, temperature=0.1, symmetric=symmetric, mask=mask, reduction="none")
        assert mx.abs(loss(queries, keys)).max().item() <= 1e-5
        for grad in mx.grad(lambda *xs, loss=loss: loss(*xs).sum(), (0, 1))(queries, keys):
            assert mx.abs(grad).max().item() <= 1e-4
        [moved] = mx.jvp(loss, [queries, keys], [queries, keys])[1]
        assert mx.abs(moved).max().item() <= 1e-3


def test_a_nan_stays_with_its_query(small_tiles):
    inputs = all_mlx(Nce(70, 90, 6, reduction="none").inputs())
    inputs["queries"][3, 2] = mx.nan
    found = mx.isnan(_loss(**inputs)).tolist()
    assert [i for i, is_nan in enumerate(found) if is_nan] == [3]


def _derivatives(loss, case):
    """Functions of queries and keys that mlx's transformations make of a loss, by name; and queries and keys."""
    inputs = all_mlx(case.inputs())
    arrays = [inputs.pop(name) for name in ("queries", "keys")]
    along = [mx.random.normal(x.shape, key=mx.random.key(i)) for i, x in enumerate(arrays)]
    scales = mx.array([1.0, 0.5])[:, None, None]

    def function(queries, keys):
        return loss(queries, keys, **inputs)

    def total(queries, keys):
        return function(queries, keys).sin().sum()

    def directed(queries, keys):
        return sum((a * g).sum() for a, g in zip(along, mx.grad(total, (0, 1))(queries, keys), strict=True))

    gradients = mx.grad(total, (0, 1))
    return {
        "loss": function,
        "gradients": gradients,
        "one gradient": mx.grad(total, 1),
        "second derivatives": mx.grad(directed, (0, 1)),
        "forward mode": lambda *xs: mx.jvp(function, list(xs), along)[1],
        "forward over reverse": lambda *xs: mx.jvp(lambda *ys: list(gradients(*ys)), list(xs), along)[1],
        "vmap": lambda *xs: mx.vmap(function)(*(scales * x for x in xs)),
        "vmap of queries": lambda q, k: mx.vmap(function, in_axes=(0, None))(scales * q, k),
        "vmap of gradients": lambda *xs: mx.vmap(gradients)(*(scales * x for x in xs)),
        "gradients of vmap": mx.grad(lambda *xs: mx.vmap(total)(*(scales * x for x in xs)).sum(), (0, 1)),
        "checkpoint": mx.grad(mx.checkpoint(total), (0, 1)),
    }, arrays


def _agree(found, wanted, name):
    found, wanted = ([x] if isinstance(x, mx.array) else x for x in (found, wanted))
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert float(mx.linalg.norm(x - y)) <= 1e-4 * float(mx.linalg.norm(y)), name


@some
def test_transformations_give_what_all_logits_at_once_give(case, small_tiles):
    functions, arrays = _derivatives(_loss, case)
    wanted, _ = _derivatives(_whole, case)
    for name, function in functions.items():
        _agree(function(*arrays), wanted[name](*arrays), name)


@pytest.mark.parametrize(
    "case",
    [Nce(40, 60, 9, mask=1), Nce(50, 50, 9, symmetric=True, reduction="none"), Nce(40, 40, 9, mask=2, symmetric=True)],
    ids=str,
)
def test_compiled(case, monkeypatch):
    monkeypatch.setattr(tiles_mlx, "_ROWS", 32)  # few kernels to compile
    monkeypatch.setattr(tiles_mlx, "_COLUMNS", 32)
    functions, arrays = _derivatives(_loss, case)
    for name in ("loss", "gradients", "second derivatives"):
        _agree(mx.compile(functions[name])(*arrays), functions[name](*arrays), name)


@pytest.mark.parametrize("kind", ["dense", 2])
def test_a_mask_may_be_mapped(kind, small_tiles):
    """Another one for each, and the same vectors for all."""
    inputs = all_mlx(Nce(50, 50, 9, mask=kind, symmetric=True).inputs())
    first, queries = inputs.pop("mask"), inputs.pop("queries")
    first = first if isinstance(first, tuple) else (first,)
    second = tuple(x[::-1] for x in first)

    def gradient(*masks):
        mask = masks if len(masks) > 1 else masks[0]
        return mx.grad(lambda queries: _loss(queries, mask=mask, **inputs))(queries)

    found = mx.vmap(gradient)(*(mx.stack(pair) for pair in zip(first, second, strict=True)))
    _agree(found, mx.stack([gradient(*first), gradient(*second)]), kind)


def test_a_mask_may_be_an_argument_of_a_compiled_function(monkeypatch):
    monkeypatch.setattr(tiles_mlx, "_ROWS", 32)
    inputs = all_mlx(Nce(50, 60, 9, mask="dense").inputs())
    mask = inputs.pop("mask")
    _agree(mx.compile(lambda mask: _loss(**inputs, mask=mask))(mask), _loss(**inputs, mask=mask), "mask")


def _peak(function, *arrays):
    """Bytes that a call wants beside its arguments, at its peak."""
    mx.eval(*arrays)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(function(*arrays))
    return mx.get_peak_memory() - before


def _gradient(loss, case):
    """The gradient of a loss, and arrays for it; few numbers a vector, as mlx's products take long on a CPU."""
    mask = None
    if case.mask is not None:
        mask = tuple(mx.random.randint(0, 99, (n, case.mask)).astype(mx.int64) for n in (case.batch, case.keys))
        mx.eval(mask)
    rest = {"temperature": 1.0, "symmetric": case.symmetric, "mask": mask, "reduction": "mean"}
    vectors = [mx.random.normal((n, case.dim)) for n in (case.batch, case.keys)]
    return mx.grad(lambda *xs: loss(*xs, **rest), (0, 1)), vectors


in_main_memory = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU has other amounts in flight")


@in_main_memory
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", [Nce(2048, 2048, 4), Nce(2048, 2048, 4, symmetric=True, mask=1)], ids=str)
def test_peak_memory_is_that_of_some_tiles(case, compiled, monkeypatch):
    """Of 256 tiles, 40 at most: what mlx lets its stream be behind by. All logits at once take 512 and more."""
    monkeypatch.setattr(tiles_mlx, "_ROWS", 128)
    monkeypatch.setattr(tiles_mlx, "_COLUMNS", 128)
    gradient, vectors = _gradient(_loss, case)
    peak = _peak(mx.compile(gradient) if compiled else gradient, *vectors)
    assert peak <= 40 * 4 * 128**2
    whole, _ = _gradient(_whole, case)
    assert _peak(whole, *vectors) >= 5 * peak


@in_main_memory
def test_peak_memory_of_8192_rows_is_less_than_a_fifth_of_what_all_logits_take():
    gradient, vectors = _gradient(_loss, Nce(8192, 8192, 4))
    assert _peak(gradient, *vectors) <= 4 * 8192**2 / 5
