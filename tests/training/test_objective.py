from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastlvm.training.negatives import Batch, Negatives
from fastlvm.training.objective import Objective, Projection
from fastlvm.training.options import TrainOptions

# four articles of six rows; row 20 repeats row 2
ARTICLES = torch.arange(24) // 6
GROUPS = torch.arange(24).clone()
GROUPS[20] = 2


def vectors():
    v = F.normalize(torch.randn(24, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    v[20] = v[2]
    return v


def rows(*targets, length=2):
    return Batch(torch.tensor([list(range(t - length, t + 1)) for t in targets]))


def predictions(n):
    return F.normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(1)), dim=-1).requires_grad_()


def build(**options):
    options = {"negatives": "batch", "projection": "none", "temperature": 0.07, **options}
    return objective_of(TrainOptions(**options), vectors(), torch.arange(18))


def objective_of(options, vectors, pool):
    return Objective(options, vectors, Negatives(options, ARTICLES, GROUPS, pool))


def test_in_batch_contrastive_loss():
    batch, y = rows(2, 8, 14), predictions(3)
    target = vectors()[[2, 8, 14]]
    infonce = F.cross_entropy(y @ target.T / 0.07, torch.arange(3))
    cosine = 1 - (y * target).sum(-1).mean()
    loss = build()(y, batch)
    torch.testing.assert_close(loss.infonce, infonce)
    torch.testing.assert_close(loss.total, 0.7 * infonce + 0.3 * cosine)
    assert loss.negatives == 2
    torch.testing.assert_close(build(objective="infonce")(y, batch).total, infonce)


def test_payload_negatives_are_the_training_rows():
    """One softmax over the target and every unmasked training row, each once."""
    batch, y = rows(8), predictions(1)
    keep = [8, *range(6), *range(12, 18)]  # target first, then the rows of the other training articles
    expected = F.cross_entropy(y @ vectors()[keep].T / 0.07, torch.tensor([0]))
    payload = build(negatives="payload", false_negatives="article")
    torch.testing.assert_close(payload(y, batch).infonce, expected)
    both = build(negatives="payload")(predictions(2), rows(8, 14)).infonce
    alone = [build(negatives="payload")(predictions(2)[i : i + 1], rows(t)).infonce for i, t in enumerate((8, 14))]
    torch.testing.assert_close(both, torch.stack(alone).mean())


@pytest.mark.parametrize("negatives", ["batch", "payload", "payload:5"])
@pytest.mark.parametrize("projection", ["none", "mlp"])
def test_bf16_rounds_what_infonce_multiplies_and_nothing_else(negatives, projection):
    torch.manual_seed(0)
    options = {"negatives": negatives, "projection": projection}
    whole, halves = build(**options), build(**options, precision="bf16")
    halves.load_state_dict(whole.state_dict())
    y = [predictions(3) for _ in range(2)]
    exact, rounded = (one(each, rows(2, 8, 14)) for one, each in zip((whole, halves), y, strict=True))
    assert torch.equal(rounded.cosine, exact.cosine)
    assert 0 < abs(rounded.infonce - exact.infonce) <= 2**-6 * exact.infonce
    wanted, found = (torch.autograd.grad(loss.total, each)[0] for loss, each in zip((exact, rounded), y, strict=True))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=2**-5 * float(wanted.abs().max()))


def test_ar_is_cosine_and_squared_error():
    y, target = predictions(3), vectors()[[2, 8, 14]]
    loss = build(objective="ar")(y, rows(2, 8, 14))
    assert loss.infonce is None
    torch.testing.assert_close(loss.total, 1 - F.cosine_similarity(y, target).mean() + ((y - target) ** 2).mean())


def test_some_rows_of_the_payload_are_drawn_anew_in_every_step():
    options = TrainOptions(negatives="payload:5")
    negatives = Negatives(options, ARTICLES, GROUPS, torch.arange(18))
    generator = torch.Generator().manual_seed(0)
    drawn = [negatives.candidates(rows(8), generator).rows.tolist() for _ in range(40)]
    assert all(found[0] == 8 and len(set(found[1:])) == 5 for found in drawn)
    assert set().union(*(found[1:] for found in drawn)) == set(range(18)) and drawn[0] != drawn[1]
    judged = [negatives.candidates(rows(8), None).rows.tolist() for _ in range(2)]
    assert judged[0] == judged[1] == [8, 0, 3, 7, 10, 14]
    objective = objective_of(options, vectors(), torch.arange(18))
    kept = [row for row in judged[0][1:] if row not in (6, 7)]  # the context
    expected = F.cross_entropy(predictions(1) @ vectors()[[8, *kept]].T / 0.05, torch.tensor([0]))
    torch.testing.assert_close(objective(predictions(1), rows(8)).infonce, expected)
    every = Negatives(TrainOptions(negatives="payload:18"), ARTICLES, GROUPS, torch.arange(18))
    assert every.candidates(rows(8), generator).rows.tolist() == [8, *range(18)]


@pytest.mark.parametrize("negatives", ["batch", "payload"])
@pytest.mark.parametrize("rule", ["article", "group"])
def test_a_duplicate_is_never_a_negative(negatives, rule):
    """Moving the other copy's vector changes nothing."""
    losses = []
    for shift in (0.0, 1.0):
        v = vectors()
        v[20] = F.normalize(v[20] + shift, dim=-1)
        options = TrainOptions(negatives=negatives, projection="none", false_negatives=rule)
        objective = objective_of(options, v, torch.arange(24))
        losses.append(objective(predictions(2)[:1], rows(2)).infonce)
        both = objective(predictions(2), Batch(torch.tensor([[0, 1, 2], [18, 19, 20]])))
        assert torch.isfinite(both.total)
    assert torch.equal(losses[0], losses[1])


def test_projection_head():
    head = Projection(16)
    assert [tuple(p.shape) for p in head.parameters()] == [(512, 16), (512,), (256, 512), (256,), (256,), (256,)]
    torch.testing.assert_close(head(vectors()).norm(dim=-1), torch.ones(24))


def test_the_target_branch_does_not_learn():
    """The head's gradient is the one it gets from the queries alone."""
    torch.manual_seed(0)
    objective = build(projection="mlp", infonce_weight=1.0)
    y, batch = predictions(3), rows(2, 8, 14)
    objective(y, batch).total.backward()
    head = objective.projection
    got = [p.grad.clone() for p in head.parameters()]
    keys = head(vectors()[[2, 8, 14]]).detach()
    head.zero_grad()
    F.cross_entropy(head(y.detach()) @ keys.T / 0.07, torch.arange(3)).backward()
    for mine, parameter in zip(got, head.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


def test_only_the_head_is_a_state():
    assert list(build().state_dict()) == []
    assert all(name.startswith("projection.") for name in build(projection="mlp").state_dict())
