"""info_nce on every backend and instruction set against the fp64 oracle, and what must not change its bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastlvm

from .nce_cases import GRID, Nce, gradients, truth
from .oracle import relative_error

FORWARD, GRADIENT = 1e-5, 1e-4


def _close(found, wanted, limit):
    """Relative, or beside 1 where all gradients cancel."""
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    error = relative_error(found, wanted)
    assert min(error, float((found.double() - wanted).norm())) <= limit, error


@pytest.mark.parametrize("case", GRID, ids=str)
def test_loss_and_gradients(case, backend):
    loss, grads = gradients(fastlvm.info_nce, case, backend=backend)
    want, want_grads = truth(case)
    assert loss.dtype == torch.float32
    _close(loss, want, FORWARD)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        _close(grad, want_grads[name], GRADIENT)


SOME = [
    Nce(70, 131, 33, reduction="none"),
    Nce(33, 33, 17, symmetric=True, mask=2),
    Nce(40, 40, 9, mask="dense"),
    Nce(5, 9, 3, reduction="sum"),
]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_float64(case, backend):
    loss, grads = gradients(fastlvm.info_nce, case, torch.float64, backend=backend)
    want, want_grads = truth(case, torch.float64)
    assert loss.dtype == torch.float64
    _close(loss, want, 1e-12)
    for name, grad in grads.items():
        _close(grad, want_grads[name], 1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_half(case, dtype, backend):
    """The loss is of float32; gradients are rounded once, to the dtype."""
    loss, grads = gradients(fastlvm.info_nce, case, dtype, backend=backend)
    want, want_grads = truth(case, dtype)
    assert loss.dtype == torch.float32
    _close(loss, want, FORWARD)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert relative_error(grad, want_grads[name]) <= 4 * torch.finfo(dtype).eps


def test_each_array_has_its_own_float(backend):
    inputs = Nce(9, 12, 5).inputs()
    mixed = {**inputs, "keys": inputs["keys"].half()}
    want = fastlvm.info_nce(**{**inputs, "keys": mixed["keys"].float()}, backend=backend)
    assert relative_error(fastlvm.info_nce(**mixed, backend=backend), want) <= FORWARD


@pytest.mark.parametrize("case", [*SOME, Nce(0, 0, 3, reduction="sum"), Nce(3, 5, 0)], ids=str)
def test_numpy(case, backend):
    as_numpy = lambda x: x.numpy() if isinstance(x, torch.Tensor) else x  # noqa: E731
    inputs = {k: as_numpy(v) for k, v in case.inputs().items()}
    if isinstance(inputs["mask"], tuple):
        inputs["mask"] = tuple(map(as_numpy, inputs["mask"]))
    loss = fastlvm.info_nce(**inputs, backend=backend)
    assert loss.dtype == np.float32
    assert isinstance(loss, np.ndarray if case.reduction == "none" else np.float32)
    _close(torch.as_tensor(loss), truth(case)[0], FORWARD)


def test_the_mean_over_no_query_is_nan(backend):
    queries, keys = torch.zeros(0, 4, requires_grad=True), torch.zeros(3, 4, requires_grad=True)
    loss = fastlvm.info_nce(queries, keys, backend=backend)
    assert loss.isnan()
    assert math.isnan(fastlvm.info_nce(queries.detach().numpy(), keys.detach().numpy(), backend=backend))
    total = fastlvm.info_nce(queries, keys, reduction="sum", backend=backend)
    assert total == 0
    assert [g.abs().sum() for g in torch.autograd.grad(total, (queries, keys))] == [0, 0]


def test_it_is_the_cross_entropy_of_the_logits(backend):
    queries, keys = Nce(90, 150, 40).vectors().values()
    want = F.cross_entropy(queries @ keys.T / 0.07, torch.arange(90))
    assert relative_error(fastlvm.info_nce(queries, keys, backend=backend), want) <= FORWARD


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_negatives_masked(symmetric, reduction, backend):
    inputs = Nce(70, 70, 6, symmetric=symmetric, reduction=reduction).inputs()
    labels = torch.zeros(70, 2, dtype=torch.int64)
    for mask in (torch.ones(70, 70, dtype=torch.bool), (labels, labels)):
        leaves = [inputs[k].clone().requires_grad_() for k in ("queries", "keys")]
        loss = fastlvm.info_nce(*leaves, 0.1, symmetric=symmetric, mask=mask, reduction=reduction, backend=backend)
        assert loss.abs().max() <= 1e-6
        for grad in torch.autograd.grad(loss.sum(), leaves):
            assert grad.abs().max() <= 1e-5


def test_both_kinds_of_mask_agree(backend):
    g = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randint(-1, 9, (n, 3), generator=g) for n in (50, 80))
    ours[0], theirs[1] = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).max
    ours[2], theirs[3] = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).min
    dense = ((ours[:, None] == theirs) & (ours[:, None] >= 0)).any(-1)
    queries, keys = Nce(50, 80, 6).vectors().values()
    calls = [
        fastlvm.info_nce(queries, keys, mask=m, reduction="none", backend=backend) for m in (dense, (ours, theirs))
    ]
    assert torch.equal(*calls)


def test_a_negative_label_masks_nothing(backend):
    queries, keys = Nce(20, 30, 6).vectors().values()
    labels = -torch.ones(20, 2, dtype=torch.int64), -torch.ones(30, 2, dtype=torch.int64)
    assert torch.equal(
        fastlvm.info_nce(queries, keys, mask=labels, backend=backend), fastlvm.info_nce(queries, keys, backend=backend)
    )


def test_ties(backend):
    vectors = torch.ones(50, 4)
    loss = fastlvm.info_nce(vectors, vectors, symmetric=True, reduction="none", backend=backend)
    assert relative_error(loss, torch.full((50,), math.log(50))) <= FORWARD


@pytest.mark.parametrize("sign", [1, -1])
def test_huge_logits_do_not_overflow(sign, backend):
    """Where the positive is by far the largest the loss is 0, where it is by far the smallest it is their distance."""
    leaf = (100 * torch.eye(40)).requires_grad_()
    loss = fastlvm.info_nce(leaf, sign * leaf.detach(), 0.01, reduction="none", backend=backend)
    assert relative_error(loss, torch.zeros(40) if sign > 0 else torch.full((40,), 1e6 + math.log(39))) <= FORWARD
    assert torch.isfinite(torch.autograd.grad(loss.sum(), leaf)[0]).all()


def test_a_nan_stays_with_its_query(backend):
    inputs = Nce(70, 90, 6, reduction="none").inputs()
    inputs["queries"][3, 2] = math.nan
    loss = fastlvm.info_nce(**inputs, backend=backend)
    assert torch.isnan(loss).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strides(reduction, backend):
    case = Nce(37, 53, 19, mask="dense", reduction=reduction)
    want, want_grads = gradients(fastlvm.info_nce, case, backend=backend)
    inputs = case.inputs()

    def laid_out(x):
        yield x.T.contiguous().T
        yield torch.stack([x, x], dim=-1)[..., 0]
        yield torch.stack([x, x], dim=1)[:, 0]

    layouts = zip(*(laid_out(inputs[k]) for k in ("queries", "keys", "mask")), strict=True)
    for queries, keys, mask in layouts:
        assert not queries.is_contiguous() and not mask.is_contiguous()
        leaves = queries.requires_grad_(), keys.requires_grad_()
        loss = fastlvm.info_nce(*leaves, case.temperature, mask=mask, reduction=reduction, backend=backend)
        assert relative_error(loss, want) <= 1e-6
        grads = torch.autograd.grad(loss, leaves, case.cotangent())
        for grad, name in zip(grads, want_grads, strict=True):
            assert relative_error(grad, want_grads[name]) <= 1e-6
    flipped = [inputs[k].flip(0).numpy()[::-1] for k in ("queries", "keys")]
    loss = fastlvm.info_nce(
        *flipped, case.temperature, mask=inputs["mask"].numpy(), reduction=reduction, backend=backend
    )
    assert relative_error(loss, want) <= 1e-6
    one = inputs["keys"].detach()[:1]
    expanded = one.expand(53, 19)
    pair = [fastlvm.info_nce(inputs["queries"].detach(), x, backend=backend) for x in (expanded, expanded.clone())]
    assert relative_error(*pair) <= 1e-6


def test_labels_of_any_layout(backend):
    case = Nce(20, 30, 6, mask=3)
    inputs = case.inputs()
    want = fastlvm.info_nce(**inputs, backend=backend)
    inputs["mask"] = tuple(x.T.contiguous().T for x in inputs["mask"])
    assert torch.equal(fastlvm.info_nce(**inputs, backend=backend), want)


# More than one block and chunk, work that is shared, sizes that divide by nothing.
SHARED = [
    Nce(300, 517, 97),
    Nce(517, 517, 70, symmetric=True, mask=2),
    Nce(300, 517, 97, mask="dense", reduction="none"),
]


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_same_bits_every_time_and_on_any_number_of_threads(case, isa, threads):
    def bits():
        loss, grads = gradients(fastlvm.info_nce, case, backend="cpu")
        return [t.numpy().tobytes() for t in (loss, *grads.values())]

    fastlvm.set_num_threads(1)
    want = bits()
    for count in (1, 2, 3, 5, 2):
        fastlvm.set_num_threads(count)
        assert all(bits() == want for _ in range(3))


def test_the_loss_alone_and_the_loss_with_gradients_agree(isa):
    queries, keys = Nce(300, 517, 33).vectors().values()
    alone = fastlvm.info_nce(queries, keys, backend="cpu")
    assert relative_error(fastlvm.info_nce(queries.requires_grad_(), keys, backend="cpu"), alone) <= 1e-6


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_gradient_alone(wanted, reduction, backend):
    case = Nce(40, 60, 9, reduction=reduction)
    inputs = case.inputs()
    for name, want in zip(("queries", "keys"), wanted, strict=True):
        inputs[name].requires_grad_(want)
    loss = fastlvm.info_nce(**inputs, backend=backend)
    name = "queries" if wanted[0] else "keys"
    (grad,) = torch.autograd.grad(loss, inputs[name], case.cotangent())
    _close(grad, truth(case)[1][name], GRADIENT)
