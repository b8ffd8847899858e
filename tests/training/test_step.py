"""One batch in parts has the loss and the gradients of the whole, dropout and all."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastlvm.models import create
from fastlvm.training.negatives import Batch, Negatives
from fastlvm.training.objective import Objective
from fastlvm.training.options import TrainOptions
from fastlvm.training.ranks import Ranks
from fastlvm.training.step import Step

ROWS = torch.arange(24)[:, None] + torch.arange(6)
VECTORS = F.normalize(torch.randn(29, 16, generator=torch.Generator().manual_seed(0)), dim=-1)


def run(dropout=0.0, **options):
    """Loss and gradients of a batch, and torch's generator after it."""
    torch.manual_seed(3)
    model = create("mamba-s", vector_dim=16, d_model=16, n_layers=2, d_state=4, dropout=dropout).train()
    with torch.no_grad():
        model.head.weight.normal_(std=0.3)
    chosen = TrainOptions(negatives="batch", projection="mlp", false_negatives="group", **options)
    objective = Objective(chosen, VECTORS, Negatives(chosen, torch.arange(29), torch.arange(29), torch.arange(29)))
    batch = Batch(ROWS, torch.arange(24))
    step = Step(model, objective, chosen, Ranks())
    torch.manual_seed(4)
    loss = step(VECTORS[batch.context], batch, torch.Generator().manual_seed(5), 1.0)
    named = [*model.named_parameters(), *objective.projection.named_parameters()]
    return loss, {name: parameter.grad for name, parameter in named}, torch.get_rng_state()


@pytest.mark.parametrize("micro", [1, 7, 12, 23])
@pytest.mark.parametrize("hard", ["", "same-article:2"])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(micro, hard):
    whole, parts = run(hard_negatives=hard), run(micro_batch=micro, hard_negatives=hard)
    torch.testing.assert_close(parts[0].total, whole[0].total, atol=1e-6, rtol=1e-6)
    assert parts[0].negatives == whole[0].negatives
    for name, gradient in whole[1].items():
        torch.testing.assert_close(parts[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_both_passes_over_a_part_have_the_same_dropout():
    """The gradient is that of the loss it is said to be of: a step down it makes that loss smaller, dropout fixed."""
    one, two = run(dropout=0.5, micro_batch=7), run(dropout=0.5, micro_batch=7)
    for name, gradient in one[1].items():
        assert torch.equal(gradient, two[1][name])
    same_parts = run(dropout=0.5, micro_batch=24)
    again = run(dropout=0.5)
    for name, gradient in again[1].items():
        assert torch.equal(gradient, same_parts[1][name])
    assert torch.equal(one[2], two[2])


def test_gradients_in_parts_with_dropout_are_those_of_the_dropped_forward(monkeypatch):
    """Autograd over the concatenated parts, each under its own saved state, is the oracle."""
    loss, gradients, _ = run(dropout=0.3, micro_batch=12)
    torch.manual_seed(3)
    model = create("mamba-s", vector_dim=16, d_model=16, n_layers=2, d_state=4, dropout=0.3).train()
    with torch.no_grad():
        model.head.weight.normal_(std=0.3)
    options = TrainOptions(negatives="batch", projection="mlp", false_negatives="group")
    objective = Objective(options, VECTORS, Negatives(options, torch.arange(29), torch.arange(29), torch.arange(29)))
    batch = Batch(ROWS, torch.arange(24))
    torch.manual_seed(4)
    predicted = torch.cat([model(part) for part in VECTORS[batch.context].split(12)])
    expected = objective(predicted, batch)
    expected.total.backward()
    torch.testing.assert_close(loss.total, expected.total, atol=1e-6, rtol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_bf16_is_near_and_its_gradients_are_float32():
    plain, half = run(), run(precision="bf16")
    assert 0 < abs(float(half[0].total - plain[0].total)) < 0.02
    assert all(gradient.dtype == torch.float32 for gradient in half[1].values())


def test_a_compiled_model_has_the_same_gradients():
    plain, compiled = run(), run(compile=True)
    torch.testing.assert_close(compiled[0].total, plain[0].total, atol=1e-5, rtol=1e-5)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(compiled[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)
