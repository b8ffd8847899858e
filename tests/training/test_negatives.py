"""Which rows a target is told from: the sources, what is masked, and that an epoch's number of them is true."""

from __future__ import annotations

import pytest
import torch

from fastlvm.errors import InputError
from fastlvm.training.negatives import Batch, Negatives, false_negatives
from fastlvm.training.options import TrainOptions, parse_hard

# four articles of six rows; row 20 repeats row 2
ARTICLES = torch.arange(24) // 6
GROUPS = torch.arange(24).clone()
GROUPS[20] = 2


def rows(*targets, length=2):
    return torch.tensor([list(range(t - length, t + 1)) for t in targets])


def build(pool=24, **options):
    return Negatives(TrainOptions(**{"negatives": "batch", **options}), ARTICLES, GROUPS, torch.arange(pool))


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def counted(found, window):
    """Rows that are negatives of a window, each as often as it counts."""
    keep = ~found.masked[window]
    keep[window] = False
    return found.rows[keep].tolist()


def test_false_negatives_by_article():
    masked = false_negatives(Batch(rows(2)), torch.arange(24), ARTICLES, GROUPS, "article")
    assert masked[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 20]


def test_false_negatives_by_group_cover_target_and_context():
    masked = false_negatives(Batch(rows(2, 4)), torch.arange(24), ARTICLES, GROUPS, "group")
    assert masked[0].nonzero().flatten().tolist() == [0, 1, 2, 20]
    assert masked[1].nonzero().flatten().tolist() == [2, 3, 4, 20]


@pytest.mark.parametrize("rule", ["article", "group"])
def test_false_negatives_are_those_of_every_row_compared_with_every_window(rule):
    g = draws()
    articles = torch.randint(0, 40, (700,), generator=g)
    groups = torch.arange(700)
    groups[torch.randint(0, 700, (200,), generator=g)] = torch.randint(0, 700, (200,), generator=g)
    windows = torch.randint(0, 700, (30, 6), generator=g)
    candidates = torch.randint(0, 700, (300,), generator=g)  # some of them twice, and many windows' rows missing
    masked = false_negatives(Batch(windows), candidates, articles, groups, rule)
    own, compared = groups[candidates][:, None], windows[:, -1:] if rule == "article" else windows
    want = (own[None] == groups[compared][:, None]).any(2)
    if rule == "article":
        want |= articles[candidates] == articles[windows[:, -1:]]
    assert torch.equal(masked, want)


@pytest.mark.parametrize("rule", ["article", "group"])
def test_false_negatives_of_no_window_and_among_no_candidates(rule):
    nobody, nothing = torch.empty(0, dtype=torch.int64), Batch(rows(2, 4), own=torch.empty(0, dtype=torch.int64))
    assert false_negatives(Batch(rows(2, 4)), nobody, ARTICLES, GROUPS, rule).shape == (2, 0)
    assert false_negatives(nothing, torch.arange(24), ARTICLES, GROUPS, rule).shape == (0, 24)


def test_a_batch_of_1024_has_1023_negatives():
    articles, windows = torch.arange(1024 * 3) // 3, torch.arange(1024 * 3).reshape(1024, 3)
    found = Negatives(TrainOptions(negatives="batch"), articles, torch.arange(1024 * 3), windows[:, -1]).candidates(
        Batch(windows), None
    )
    assert found.rows.tolist() == windows[:, -1].tolist()
    assert ((~found.masked).sum(1) - 1 == 1023).all()


def test_the_queue_holds_the_targets_of_the_batches_before():
    negatives = build(queue=3)
    for targets in ((2, 8), (9, 14), (15, 21)):
        negatives.remember(Batch(rows(*targets)))
    assert negatives.queue.tolist() == [14, 15, 21]
    found = negatives.candidates(Batch(rows(5)), draws())
    assert counted(found, 0) == [14, 15, 21]
    assert counted(negatives.candidates(Batch(rows(16)), draws()), 0) == [21]  # 14 and 15 are of its article
    assert counted(negatives.candidates(Batch(rows(5)), None), 0) == []  # validation has none


@pytest.mark.parametrize("rule", ["article", "group"])
def test_hard_negatives_of_the_same_article_count_for_their_window_whatever_the_rule(rule):
    negatives = build(hard_negatives="same-article:40", false_negatives=rule)
    batch = Batch(rows(3, 15))
    found = negatives.candidates(batch, draws())
    own = found.rows[2:42], found.rows[42:]
    assert (ARTICLES[own[0]] == 0).all() and (ARTICLES[own[1]] == 2).all()
    for window, (article, taken) in enumerate(((0, {1, 2, 3}), (2, {13, 14, 15}))):
        hard = [row for row in counted(found, window) if ARTICLES[row] == article]
        assert hard and not set(hard) & taken
        assert sorted(hard) == sorted(row for row in own[window].tolist() if row not in taken)
        # the other window's are negatives too, but for those of its own target's group
        rest = [row for row in counted(found, window) if ARTICLES[row] != article]
        assert set(own[1 - window].tolist()) <= set(rest) | {20}


def test_mined_negatives_are_what_the_model_took_for_the_target():
    negatives = build(hard_negatives="index:2", false_negatives="article")
    nearest = torch.full((5, 50), -1)
    nearest[3, :4] = torch.tensor([9, 10, 11, 4])
    negatives.mine(lambda k: nearest.numpy())
    found = negatives.candidates(Batch(rows(5, 16), windows=torch.tensor([3, 1])), draws(3))
    hard = set(found.rows[2:4].tolist()) - {0}
    assert hard <= {9, 10, 11, 4} and set(counted(found, 0)) >= hard - {4, 3}
    assert counted(found, 1)[:1] == [5]  # of window 1 nothing was found: the other target, and the other's hard ones


def test_hard_negatives_beside_the_payload_count_once():
    negatives = build(negatives="payload", hard_negatives="same-article:40", false_negatives="article")
    found = negatives.candidates(Batch(rows(3, 15)), draws())
    for window, article in enumerate((0, 2)):
        others = [row for row in counted(found, window) if ARTICLES[row] != article]
        assert len(others) == len(set(others)) and set(others) <= set(range(24))
        assert any(ARTICLES[row] == article for row in counted(found, window))


def test_processes_have_the_same_candidates_for_their_windows():
    everyone, windows = rows(3, 9, 15, 21), torch.arange(4)
    options = {"hard_negatives": "same-article:3", "queue": 4}
    whole = build(**options).candidates(Batch(everyone, windows), draws())
    for rank in range(2):
        own = torch.arange(rank, 4, 2)
        part = build(**options).candidates(Batch(everyone, windows, own), draws())
        for at, window in enumerate(own.tolist()):
            assert sorted(counted(part, at)) == sorted(counted(whole, window))
            assert part.rows[at] == everyone[window, -1]


def test_what_a_checkpoint_keeps_is_what_goes_on():
    negatives, other = build(queue=3, hard_negatives="index:2"), build(queue=3, hard_negatives="index:2")
    negatives.remember(Batch(rows(2, 8)))
    negatives.mine(lambda k: torch.arange(100).reshape(2, 50).numpy() % 24)
    other.restore(negatives.tensors())
    batch = Batch(rows(5, 16), windows=torch.tensor([0, 1]))
    one, two = (each.candidates(batch, draws()) for each in (negatives, other))
    assert torch.equal(one.rows, two.rows) and torch.equal(one.masked, two.masked)


@pytest.mark.parametrize("text", ["index", "index:", "index:0", "index:51", "index:-1", "near:3", 3, None, "index:1.5"])
def test_what_names_no_hard_negatives_is_refused(text):
    with pytest.raises(InputError, match="choose of same-article:K, index:K, with K from 1 to 50"):
        parse_hard(text)
