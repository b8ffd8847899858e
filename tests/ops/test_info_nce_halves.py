"""info_nce of bfloat16 rows, which the cpu backend multiplies by tiles where the processor can."""

from __future__ import annotations

import pytest
import torch

import fastlvm
from predictor.natives import PRODUCTS, pinned

from .nce_cases import Nce, gradients, truth
from .oracle import relative_error

# Lengths below and above what AMX takes, with and without a rest of 16; blocks, chunks and pairs that are not full.
GRID = [
    *(Nce(b, m, d) for b, m, d in [(1, 1, 16), (2, 3, 32), (7, 9, 48), (17, 40, 144), (65, 241, 272), (300, 530, 160)]),
    *(Nce(66, 131, d, mask=mask, reduction="none") for d in (48, 144) for mask in ("dense", 2)),
    *(Nce(b, b, 144, symmetric=True, reduction=r) for b in (5, 33, 270) for r in ("mean", "none")),
    Nce(257, 300, 144, mask="dense", reduction="sum"),
    Nce(129, 129, 144, symmetric=True, mask=2),
    Nce(40, 60, 160, temperature=0.05),
    Nce(0, 3, 16, reduction="sum"),
]


@pytest.fixture(params=PRODUCTS, ids=str)
def products(request):
    """The products that are at work, with their name for bfloat16."""
    with pinned(request.param) as names:
        yield names


@pytest.mark.parametrize("case", GRID, ids=str)
def test_loss_and_gradients(case, products):
    """The loss is that of float32 arithmetic; gradients are rounded to bfloat16 in the sums, and at the end."""
    loss, grads = gradients(fastlvm.info_nce, case, torch.bfloat16, backend="cpu")
    want, want_grads = truth(case, torch.bfloat16)
    assert loss.dtype == torch.float32
    assert relative_error(loss, want) <= 1e-5
    for name, grad in grads.items():
        assert grad.dtype == torch.bfloat16
        assert relative_error(grad, want_grads[name]) <= torch.finfo(torch.bfloat16).eps / 2, name


def test_tiles_are_multiplied_where_the_processor_can(products):
    """Rounded probabilities show in the last bits of the gradients."""
    case = Nce(40, 60, 160)
    found = gradients(fastlvm.info_nce, case, torch.bfloat16, backend="cpu")[1]["queries"]
    with pinned(PRODUCTS[0]):
        plain = gradients(fastlvm.info_nce, case, torch.bfloat16, backend="cpu")[1]["queries"]
    assert torch.equal(found, plain) == (products["bf16"] != "avx512_amx")


@pytest.mark.parametrize(
    ("rows", "dim", "reference", "in_tiles"),
    [(128, 16, True, True), (129, 16, True, False), (129, 17, True, True), (1025, 17, False, False)],
)
def test_auto_leaves_all_logits_at_once_earlier_for_tiles(rows, dim, reference, in_tiles, products, monkeypatch):
    """Whether the reference is taken: without tiles, and with them."""
    monkeypatch.delenv("FASTLVM_BACKEND", raising=False)
    keys = torch.zeros(rows, dim, dtype=torch.bfloat16)
    verdicts = {v.backend: v for v in fastlvm.explain("info_nce", keys.clone().requires_grad_(), keys)}
    taken = in_tiles if products["bf16"] == "avx512_amx" else reference
    assert ("few logits" in verdicts["cpu"].reason) == taken


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_gradient_alone(wanted, reduction, products):
    case = Nce(70, 131, 144, reduction=reduction)
    inputs = case.inputs(torch.bfloat16)
    for name, want in zip(("queries", "keys"), wanted, strict=True):
        inputs[name].requires_grad_(want)
    name = "queries" if wanted[0] else "keys"
    (grad,) = torch.autograd.grad(fastlvm.info_nce(**inputs, backend="cpu"), inputs[name], case.cotangent())
    assert relative_error(grad, truth(case, torch.bfloat16)[1][name]) <= torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("dim", [144, 145, 150], ids="D{}".format)
@pytest.mark.parametrize("step", [1, 2], ids="step{}".format)
def test_rows_of_a_larger_matrix_full_of_nan(dim, step, products):
    """Nothing is read beyond the rows, whatever their strides."""
    case, tensors = Nce(37, 71, dim), {}
    for name, rows in case.vectors(torch.bfloat16).items():
        around = torch.full((len(rows) + 2, step * dim + 3), torch.nan, dtype=torch.bfloat16)
        tensors[name] = around[1:-1, 2 : 2 + step * dim : step].copy_(rows).detach().requires_grad_()
    loss = fastlvm.info_nce(**tensors, temperature=0.5, backend="cpu")
    found = torch.autograd.grad(loss, list(tensors.values()), case.cotangent())
    want, want_grads = truth(case, torch.bfloat16)
    assert relative_error(loss, want) <= 1e-5
    for grad, wanted in zip(found, want_grads.values(), strict=True):
        assert relative_error(grad, wanted) <= torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("other", [torch.float32, torch.float16], ids=str)
def test_halves_beside_another_float(other, products):
    inputs = Nce(40, 60, 144).inputs(torch.bfloat16)
    mixed = {**inputs, "keys": inputs["keys"].to(other)}
    want = fastlvm.info_nce(**{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in mixed.items()})
    assert relative_error(fastlvm.info_nce(**mixed, backend="cpu"), want) <= 1e-5


@pytest.mark.parametrize(
    "case", [Nce(300, 517, 144), Nce(290, 290, 48, symmetric=True), Nce(70, 9000, 144, mask=2)], ids=str
)
def test_same_bits_every_time_and_on_any_number_of_threads(case, products, threads):
    def bits():
        loss, grads = gradients(fastlvm.info_nce, case, torch.bfloat16, backend="cpu")
        return [loss.numpy().tobytes(), *(grad.view(torch.int16).numpy().tobytes() for grad in grads.values())]

    fastlvm.set_num_threads(1)
    want = bits()
    for count in (1, 2, 3, 5, 2):
        fastlvm.set_num_threads(count)
        assert all(bits() == want for _ in range(2))
