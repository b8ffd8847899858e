"""The triton backend of info_nce against the float64 oracle: on a GPU, or interpreted, where rows are slow."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastlvm

from . import nce_cases
from .device import ON_GPU, every, needs_triton, to_device
from .nce_cases import GRID, Nce, truth
from .oracle import relative_error
from .test_info_nce import _close

pytestmark = needs_triton
FORWARD, GRADIENT = 1e-5, 1e-4


def loss_of(*args, **inputs):
    """The op on the device, with the loss in main memory."""
    return fastlvm.info_nce(*to_device(args), **to_device(inputs), backend="triton").cpu()


def gradients(case, dtype=torch.float32):
    return nce_cases.gradients(loss_of, case, dtype)


SMALL = [case for case in GRID if ON_GPU or case.batch * (1 + case.symmetric) <= 70]


@pytest.mark.parametrize("case", every(2, SMALL), ids=str)
def test_loss_and_gradients(case):
    loss, grads = gradients(case)
    want, want_grads = truth(case)
    assert loss.dtype == torch.float32
    _close(loss, want, FORWARD)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        _close(grad, want_grads[name], GRADIENT)


SOME = [
    Nce(20, 131, 33, reduction="none"),
    Nce(17, 17, 17, symmetric=True, mask=2),
    Nce(20, 20, 9, mask="dense"),
    Nce(5, 9, 3, reduction="sum"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_half(case, dtype):
    """The loss is of float32; probabilities and gradients are rounded to the dtype."""
    loss, grads = gradients(case, dtype)
    want, want_grads = truth(case, dtype)
    assert loss.dtype == torch.float32
    _close(loss, want, FORWARD)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert relative_error(grad, want_grads[name]) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [1e-30, 1e5, 1e30])
def test_weights_beyond_the_range_of_float16(size):
    from fastlvm.kernels.triton import info_nce as kernels

    case, half = Nce(9, 14, 5, reduction="none"), torch.float16
    vectors = case.vectors(half)
    logits = vectors["queries"].double() @ vectors["keys"].double().T / case.temperature
    log_sums = torch.logsumexp(logits, 1).float()[None]
    got = to_device([torch.empty(x.shape) for x in vectors.values()])
    inputs = to_device([size * case.cotangent(), *vectors.values()])
    kernels.backward(*inputs, case.temperature, False, None, None, None, to_device(log_sums), *got)
    for found, want in zip(got, truth(case, half)[1].values(), strict=True):
        assert relative_error(found.cpu().double() / size, want) <= 4 * torch.finfo(half).eps


def test_each_array_has_its_own_float():
    inputs = Nce(9, 12, 5).inputs()
    mixed = {**inputs, "keys": inputs["keys"].half()}
    want = fastlvm.info_nce(**{**inputs, "keys": mixed["keys"].float()}, backend="reference")
    assert relative_error(loss_of(**mixed), want) <= FORWARD


# Some blocks, the last one smaller; rows of several tiles.
BLOCKS = [
    Nce(19, 23, 7),
    Nce(19, 19, 7, symmetric=True, mask=2, reduction="none"),
    Nce(19, 40, 7, mask="dense", reduction="none"),
    Nce(5, 4500, 3, mask=1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_blocks_of_rows_and_tiles_of_keys(case, dtype, monkeypatch):
    from fastlvm.kernels.triton import info_nce as kernels

    monkeypatch.setattr(kernels, "BLOCK_BYTES", 0)
    monkeypatch.setattr(kernels, "LEAST_ROWS", 8)
    loss, grads = gradients(case, dtype)
    want, want_grads = truth(case, dtype)
    _close(loss, want, FORWARD)
    for name, grad in grads.items():
        limit = GRADIENT if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        assert relative_error(grad, want_grads[name]) <= limit


def test_blocks_are_of_a_size():
    from fastlvm.kernels.triton.info_nce import BLOCK_BYTES, LEAST_ROWS, _rows_of_a_block

    for batch, keys in [(1, 16), (32768, 32768), (513, 32768), (1000, 10_000_000), (5, 10_000_000)]:
        rows = _rows_of_a_block(batch, keys)
        assert 1 <= rows <= batch
        assert rows <= LEAST_ROWS or 4 * rows * keys <= BLOCK_BYTES
        assert rows == batch or rows % LEAST_ROWS == 0
    assert _rows_of_a_block(32768, 32768) == 768


def test_the_mean_over_no_query_is_nan():
    queries, keys = torch.zeros(0, 4, requires_grad=True), torch.zeros(3, 4, requires_grad=True)
    assert loss_of(queries, keys).isnan()
    total = loss_of(queries, keys, reduction="sum")
    assert total == 0
    assert [g.abs().sum() for g in torch.autograd.grad(total, (queries, keys))] == [0, 0]


def test_it_is_the_cross_entropy_of_the_logits():
    queries, keys = Nce(30, 50, 40).vectors().values()
    want = F.cross_entropy(queries @ keys.T / 0.07, torch.arange(30))
    assert relative_error(loss_of(queries, keys), want) <= FORWARD


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_negatives_masked(symmetric, reduction):
    inputs = Nce(12, 12, 6, symmetric=symmetric, reduction=reduction).inputs()
    labels = torch.zeros(12, 2, dtype=torch.int64)
    for mask in (torch.ones(12, 12, dtype=torch.bool), (labels, labels)):
        leaves = [inputs[k].clone().requires_grad_() for k in ("queries", "keys")]
        loss = loss_of(*leaves, 0.1, symmetric=symmetric, mask=mask, reduction=reduction)
        assert loss.abs().max() <= 1e-6
        for grad in torch.autograd.grad(loss.sum(), leaves):
            assert grad.abs().max() <= 1e-5


def test_both_kinds_of_mask_agree():
    g = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randint(-1, 9, (n, 3), generator=g) for n in (20, 80))
    for value, column in ((torch.iinfo(torch.int64).max, 0), (torch.iinfo(torch.int64).min, 2)):
        ours[column], theirs[column + 1] = value, value
    dense = ((ours[:, None] == theirs) & (ours[:, None] >= 0)).any(-1)
    queries, keys = Nce(20, 80, 6).vectors().values()
    labels = tuple(x.T.contiguous().T for x in (ours, theirs))
    calls = [loss_of(queries, keys, mask=m, reduction="none") for m in (dense, (ours, theirs), labels)]
    assert torch.equal(calls[0], calls[1]) and torch.equal(calls[0], calls[2])


def test_a_negative_label_masks_nothing():
    queries, keys = Nce(10, 15, 6).vectors().values()
    labels = -torch.ones(10, 2, dtype=torch.int64), -torch.ones(15, 2, dtype=torch.int64)
    assert torch.equal(loss_of(queries, keys, mask=labels), loss_of(queries, keys))


def test_ties():
    vectors = torch.ones(20, 4)
    loss = loss_of(vectors, vectors, symmetric=True, reduction="none")
    assert relative_error(loss, torch.full((20,), math.log(20))) <= FORWARD


@pytest.mark.parametrize("sign", [1, -1])
def test_huge_logits_do_not_overflow(sign):
    """Where the positive is by far the largest the loss is 0, where it is by far the smallest it is their distance."""
    leaf = (100 * torch.eye(20)).requires_grad_()
    loss = loss_of(leaf, sign * leaf.detach(), 0.01, reduction="none")
    assert relative_error(loss, torch.zeros(20) if sign > 0 else torch.full((20,), 1e6 + math.log(19))) <= FORWARD
    assert torch.isfinite(torch.autograd.grad(loss.sum(), leaf)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_stays_with_its_query(dtype):
    inputs = Nce(20, 30, 6, reduction="none").inputs(dtype)
    inputs["queries"][3, 2] = math.nan
    queries = inputs.pop("queries").requires_grad_()
    loss = loss_of(queries, **inputs)
    assert torch.isnan(loss).nonzero().flatten().tolist() == [3]
    grad = torch.autograd.grad(loss.sum(), queries)[0]
    assert torch.isnan(grad).any(1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strides(reduction):
    case = Nce(9, 33, 19, mask="dense", reduction=reduction)
    want, want_grads = gradients(case)
    inputs = to_device(case.inputs())

    def laid_out(x):
        yield x.T.contiguous().T
        yield torch.stack([x, x], dim=-1)[..., 0]
        yield torch.stack([x, x], dim=1)[:, 0]

    layouts = zip(*(laid_out(inputs[k]) for k in ("queries", "keys", "mask")), strict=True)
    for queries, keys, mask in layouts:
        leaves = queries.requires_grad_(), keys.requires_grad_()
        loss = fastlvm.info_nce(*leaves, case.temperature, mask=mask, reduction=reduction, backend="triton")
        assert relative_error(loss.cpu(), want) <= 1e-6
        grads = torch.autograd.grad(loss, leaves, case.cotangent().to(loss))
        for grad, name in zip(grads, want_grads, strict=True):
            assert relative_error(grad.cpu(), want_grads[name]) <= 1e-6
    expanded = inputs["keys"].detach()[:1].expand(33, 19)
    pair = [fastlvm.info_nce(inputs["queries"].detach(), x, backend="triton") for x in (expanded, expanded.clone())]
    assert relative_error(pair[0].cpu(), pair[1].cpu()) <= 1e-6


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_gradient_alone(wanted, reduction, symmetric):
    case = Nce(12, 12, 9, symmetric=symmetric, reduction=reduction)
    inputs = case.inputs()
    for name, want in zip(("queries", "keys"), wanted, strict=True):
        inputs[name].requires_grad_(want)
    loss = loss_of(**inputs)
    name = "queries" if wanted[0] else "keys"
    (grad,) = torch.autograd.grad(loss, inputs[name], case.cotangent())
    _close(grad, truth(case)[1][name], GRADIENT)


def test_the_loss_alone_and_the_loss_with_gradients_agree():
    queries, keys = Nce(12, 50, 33).vectors().values()
    alone = loss_of(queries, keys)
    assert torch.equal(loss_of(queries.requires_grad_(), keys), alone)


@pytest.mark.parametrize("case", [Nce(12, 50, 9, mask=2), Nce(9, 9, 5, symmetric=True, reduction="none")], ids=str)
def test_same_bits_every_time(case):
    def bits():
        loss, grads = gradients(case)
        return [t.numpy().tobytes() for t in (loss, *grads.values())]

    assert bits() == bits()


def test_a_backward_can_be_repeated_and_scaled():
    inputs = Nce().inputs()
    leaves = inputs["queries"].requires_grad_(), inputs["keys"].requires_grad_()
    loss = loss_of(**inputs)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, leaves, torch.tensor(2.0), retain_graph=True)
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(once, torch.autograd.grad(loss, leaves), strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(reduction):
    def second(backend):
        inputs = to_device(Nce(3, 4, 2, reduction=reduction).inputs())
        leaves = inputs["queries"].requires_grad_(), inputs["keys"].requires_grad_()
        loss = fastlvm.info_nce(**inputs, backend=backend)
        first = torch.autograd.grad(loss.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)

    for got, want in zip(second("triton"), second("reference"), strict=True):
        assert relative_error(got.cpu(), want.cpu()) <= GRADIENT


CASES = [Nce(5, 8, 3, mask=2), Nce(6, 6, 3, symmetric=True, reduction="none"), Nce(0, 0, 4, reduction="sum")]


@pytest.mark.parametrize("wanted", [[True, True], [False, True], [False, False]], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, wanted):
    import fastlvm.ops.info_nce.triton_op  # noqa: F401, registers both

    inputs = to_device(case.inputs())
    masks = inputs["mask"] if isinstance(inputs["mask"], tuple) else (None, None)
    leaves = inputs["queries"].requires_grad_(), inputs["keys"].requires_grad_()
    args = [*leaves, case.temperature, case.symmetric, None, *masks, case.reduction != "none", wanted]
    torch.library.opcheck(torch.ops.fastlvm.info_nce_triton.default, args)
    if not any(wanted):
        return
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    loss, *rest = torch.ops.fastlvm.info_nce_triton.default(*args)
    backward = torch.ops.fastlvm.info_nce_triton_bwd.default
    torch.library.opcheck(backward, (torch.ones_like(loss), *args[:-2], *rest, wanted))


def test_compile_traces_the_whole_call():
    torch._dynamo.reset()

    def step(queries, keys):
        return fastlvm.info_nce(queries, keys, backend="triton")

    def trained(function):
        leaves = [x.requires_grad_() for x in to_device(Nce().vectors()).values()]
        loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(trained(compiled), trained(step), strict=True))


def test_what_has_no_kernel():
    vectors = to_device(Nce().vectors(torch.float64))
    with pytest.raises(ValueError, match="info_nce: backend='triton' cannot run this call: float64 has no kernel"):
        fastlvm.info_nce(**vectors, backend="triton")


def test_explain_lists_the_backend():
    verdicts = {v.backend: v for v in fastlvm.explain("info_nce", **to_device(Nce().vectors()))}
    assert list(verdicts) == ["cpu", "triton", "mlx", "reference"]
    assert verdicts["triton"].ok and ("auto" in verdicts["triton"].reason) == (not ON_GPU)


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_batch_of_the_real_size(dtype):
    """Against the dense loss, and without its memory: a block of logits, the gradients, and them in half precision."""
    vectors = {k: F.normalize(x, dim=-1) for k, x in Nce(8192, 16384, 256).vectors().items()}
    leaves = [x.to("cuda", dtype).requires_grad_() for x in vectors.values()]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = fastlvm.info_nce(*leaves, backend="triton")
    grads = torch.autograd.grad(loss, leaves)
    extra = torch.cuda.max_memory_allocated() - before
    elements = sum(x.numel() for x in leaves)
    assert extra <= 64 * 1024**2 + 6 * elements + 16 * 1024**2
    wanted = [x.detach().double().requires_grad_() for x in leaves]
    want = F.cross_entropy(wanted[0] @ wanted[1].T / 0.07, torch.arange(8192, device="cuda"))
    assert relative_error(loss.cpu(), want.cpu()) <= FORWARD
    for grad, true in zip(grads, torch.autograd.grad(want, wanted), strict=True):
        assert relative_error(grad.cpu(), true.cpu()) <= 4 * torch.finfo(dtype).eps
