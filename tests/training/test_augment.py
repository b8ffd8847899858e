from __future__ import annotations

import torch

from fastlvm.training.augment import Augment

ARTICLES = torch.tensor([5] * 4 + [7] * 6 + [9] * 2 + [11] * 8)
POOL = torch.cat([torch.arange(0, 4), torch.arange(10, 20)])  # article 7 is no training article


def build(context_dropout=0.0, span_corruption=0.0, seed=0):
    return Augment(POOL, ARTICLES, context_dropout=context_dropout, span_corruption=span_corruption, seed=seed)


def batch(n=400, length=3):
    starts = torch.tensor([0, 1, 12, 17]).repeat(n // 4)
    rows = starts[:, None] + torch.arange(length)
    vectors = torch.arange(1.0, 21.0)[:, None] * torch.ones(20, 2)  # row r holds r + 1: zero is nobody's
    return vectors[rows], vectors, rows


def test_off_changes_nothing_and_never_its_input():
    context, vectors, rows = batch()
    assert torch.equal(build()(context, vectors, rows), context)
    before = context.clone()
    build(1.0, 1.0)(context, vectors, rows)
    assert torch.equal(context, before)


def test_context_dropout_zeroes_the_newest_positions():
    context, vectors, rows = batch(length=3)
    zero = build(context_dropout=1.0)(context, vectors, rows)[..., 0] == 0
    assert set(map(tuple, zero.tolist())) == {(False, False, True), (False, True, True)}
    assert torch.equal(build(context_dropout=1.0)(context, vectors, rows)[~zero], context[~zero])


def test_context_dropout_takes_one_to_three_of_five():
    context = torch.ones(300, 5, 2)
    rows = torch.arange(5).expand(300, 5)
    dropped = (build(context_dropout=1.0)(context, torch.ones(20, 2), rows)[..., 0] == 0).sum(1)
    assert sorted(set(dropped.tolist())) == [1, 2, 3]


def test_probabilities():
    context, vectors, rows = batch(n=4000)
    changed = (build(context_dropout=0.2)(context, vectors, rows) != context).any(-1).any(-1).float().mean()
    assert 0.17 < float(changed) < 0.23
    changed = (build(span_corruption=0.1)(context, vectors, rows) != context).any(-1).any(-1).float().mean()
    assert 0.08 < float(changed) < 0.12


def test_corruption_takes_one_vector_of_another_training_article():
    context, vectors, rows = batch(n=4000)
    after = build(span_corruption=1.0)(context, vectors, rows)
    different = (after != context).any(-1)
    assert bool((different.sum(1) == 1).all())
    assert set(different.nonzero()[:, 1].tolist()) == {0, 1, 2}
    taken = after[different][:, 0].long() - 1
    assert set(taken.tolist()) <= set(POOL.tolist())
    assert bool((ARTICLES[taken] != ARTICLES[rows[:, 0]]).all())
    assert set(taken.tolist()) == set(POOL.tolist())  # all of them are drawn


def test_one_article_has_no_other_to_take_from():
    context = torch.ones(8, 3, 2)
    augment = Augment(torch.arange(4), ARTICLES, context_dropout=0.0, span_corruption=1.0, seed=0)
    assert torch.equal(augment(context, torch.zeros(20, 2), torch.arange(3).expand(8, 3)), context)


def test_the_generator_is_its_whole_state():
    context, vectors, rows = batch()
    first = build(0.5, 0.5)
    first(context, vectors, rows)
    state = first.generator.get_state()
    expected = first(context, vectors, rows)
    second = build(0.5, 0.5, seed=9)
    second.generator.set_state(state)
    assert torch.equal(second(context, vectors, rows), expected)
    assert not torch.equal(build(0.5, 0.5)(context, vectors, rows), build(0.5, 0.5, seed=3)(context, vectors, rows))
