"""Rerankers against plain loops. Scores and vectors are small multiples of 1/4, so that float32 sums are exact."""

from __future__ import annotations

import math
import time
from dataclasses import FrozenInstanceError, dataclass
from typing import ClassVar

import numpy as np
import pytest

from fastlvm.data import Payload
from fastlvm.errors import InputError
from fastlvm.retrieval import Index, SearchResult
from fastlvm.retrieval.rerank import (
    RERANKERS,
    Candidates,
    DirectionalBonus,
    Mmr,
    SequenceBias,
    ShardAssist,
    Stage,
    parse,
    rerank,
)

pytestmark = pytest.mark.filterwarnings("error")  # no 0 · inf, no power that overflows, also where it does no harm

N, M, DIM = 5, 12, 6
ALL = (Mmr(0.5), DirectionalBonus(0.5), SequenceBias(0.5, 0.5), ShardAssist(0.5))
of_each = pytest.mark.parametrize("stage", ALL, ids=lambda stage: stage.name)


def found(seed=0, n=N, m=M, gone=(0, 3, 0, 12, 1)):
    """A search result, best first with ties, of whose last `gone` places a query has none; and what the stages need."""
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.tile(np.arange(100), (n, 1)), axis=1)[:, :m]
    scores = -np.sort(-rng.integers(0, 8, (n, m)) / 4, axis=1).astype(np.float32)
    keys = np.stack([rng.integers(0, 3, (n, m)), rng.integers(0, 9, (n, m))], axis=-1).astype(np.int32)
    nothing = np.arange(m) >= m - np.resize(gone, n)[:, None]
    ids[nothing], scores[nothing], keys[nothing] = -1, -np.inf, -1
    needs = {
        "vectors": (rng.integers(-4, 5, (n, m, DIM)) / 4).astype(np.float32),
        "predicted": (rng.integers(-4, 5, (n, DIM)) / 4).astype(np.float32),
        "last": (rng.integers(-4, 5, (n, DIM)) / 4).astype(np.float32),
        "key": np.stack([rng.integers(0, 3, n), rng.integers(0, 9, n)], axis=-1),
    }
    return SearchResult(ids, scores, keys), needs


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def loop_mmr(stage, places, scores, keys, needs, q):
    """Carbonell and Goldstein's formula, word for word; the score no more than that of the one before."""
    vectors, left, taken, values = needs["vectors"][q], list(places), [], []
    while left:
        worth = []
        for i in left:
            nearest = max((dot(vectors[i], vectors[j]) for j in taken), default=0.0)
            worth.append(stage.relevance * scores[i] - (1 - stage.relevance) * nearest)
        value = max(worth)
        taken.append(left.pop(worth.index(value)))
        values.append(min([value, *values]))
    return taken, dict(zip(taken, values, strict=True))


def loop_bonus(stage, keys, needs, q, i):
    if stage.name == "directional-bonus":
        apart = [float(x) - float(y) for x, y in zip(needs["vectors"][q, i], needs["last"][q], strict=True)]
        ahead = [float(x) - float(y) for x, y in zip(needs["predicted"][q], needs["last"][q], strict=True)]
        both = math.sqrt(dot(apart, apart)) * math.sqrt(dot(ahead, ahead))
        return stage.weight * dot(apart, ahead) / both if both else 0.0
    (article, chunk), (own_article, own_chunk) = keys[q, i].tolist(), needs["key"][q].tolist()
    if article != own_article:
        return 0.0
    if stage.name == "shard-assist":
        return stage.weight
    return stage.weight * stage.decay ** (chunk - own_chunk - 1) if chunk > own_chunk else 0.0


def loop(result, stages, k, needs):
    """What `rerank` should say, one candidate at a time; stable sorts."""
    ids, scores, keys = [], [], []
    for q in range(len(result.ids)):
        places = [i for i in range(result.ids.shape[1]) if result.ids[q, i] >= 0]
        value = {i: float(result.scores[q, i]) for i in places}
        for stage in stages:
            if isinstance(stage, Mmr):
                places, value = loop_mmr(stage, places, value, result.keys, needs, q)
            else:
                value = {i: value[i] + loop_bonus(stage, result.keys, needs, q, i) for i in places}
                places = sorted(places, key=lambda i: -value[i])
        places = places[:k]
        empty = k - len(places)
        ids.append([int(result.ids[q, i]) for i in places] + [-1] * empty)
        scores.append([value[i] for i in places] + [-math.inf] * empty)
        keys.append([result.keys[q, i].tolist() for i in places] + [[-1, -1]] * empty)
    return np.array(ids), np.array(scores), np.array(keys)


def same(got, want, tolerance=0.0):
    ids, scores, keys = want
    np.testing.assert_array_equal(got.result.ids, ids)
    np.testing.assert_array_equal(got.result.keys, keys)
    np.testing.assert_allclose(got.result.scores, scores, rtol=0, atol=tolerance)
    assert [part.dtype for part in got.result] == [np.int64, np.float32, np.int32]


def one_query(keys, scores=None, ids=None):
    """One query whose candidates are of the keys given, of equal scores if none are."""
    m = len(keys)
    ids = range(m) if ids is None else ids
    scores = np.zeros(m) if scores is None else scores
    return SearchResult(np.array([ids]), np.array([scores], np.float32), np.array([keys], np.int32))


@pytest.mark.parametrize("k", (1, 5, M, M + 3))
@pytest.mark.parametrize("stage", (Mmr(0.5), Mmr(0.75), Mmr(0), Mmr(1), *ALL[2:], SequenceBias(2, 0)), ids=str)
def test_a_stage_says_what_a_plain_loop_says(stage, k):
    for seed in range(20):
        result, needs = found(seed)
        same(rerank(result, [stage], k, **needs), loop(result, [stage], k, needs))


@pytest.mark.parametrize("k", (1, 5, M, M + 3))
def test_the_directional_bonus_says_what_a_plain_loop_says(k):
    for seed in range(20):
        result, needs = found(seed)
        for name in ("vectors", "predicted", "last"):  # cosines are rounded: without ties, an order is still exact
            needs[name] += np.random.default_rng(seed).normal(0, 0.1, needs[name].shape).astype(np.float32)
        same(rerank(result, [DirectionalBonus(0.5)], k, **needs), loop(result, [DirectionalBonus(0.5)], k, needs), 1e-6)


@pytest.mark.parametrize(
    "stages",
    (
        (ShardAssist(0.5), Mmr(0.5)),
        (Mmr(0.5), ShardAssist(0.5)),
        (SequenceBias(1, 0.5), Mmr(0.75), ShardAssist(0.25)),
        (Mmr(0.5), Mmr(0.5)),
        (),
    ),
    ids=lambda stages: " ".join(map(str, stages)) or "none",
)
def test_stages_run_in_order_on_all_candidates_and_the_cut_comes_last(stages):
    for seed in range(20):
        result, needs = found(seed)
        same(rerank(result, stages, 4, **needs), loop(result, stages, 4, needs))


def test_vectors_go_with_their_candidates_into_the_next_stage():
    result, needs = found(3)
    same(
        rerank(result, [ShardAssist(8.0), DirectionalBonus(4.0)], M, **needs),
        loop(result, [ShardAssist(8.0), DirectionalBonus(4.0)], M, needs),
        1e-5,
    )


def test_mmr_passes_over_a_near_copy_of_what_it_has_taken():
    result = one_query([(0, 0), (0, 1), (1, 0)], [1.0, 0.9, 0.5], ids=[7, 8, 9])
    vectors = np.array([[[1, 0], [0.99, 0.1], [0, 1]]], np.float32)
    got = rerank(result, [Mmr(0.5)], 3, vectors=vectors)
    assert got.result.ids.tolist() == [[7, 9, 8]]
    np.testing.assert_allclose(got.result.scores, [[0.5, 0.25, 0.45 - 0.495]], atol=1e-6)


def test_mmr_scores_are_best_first_where_vectors_are_opposite():
    result = one_query([(0, 0), (0, 1)], [1.0, 1.0])
    got = rerank(result, [Mmr(0.5)], 2, vectors=np.array([[[1, 0], [-1, 0]]], np.float32))
    assert got.result.scores.tolist() == [[0.5, 0.5]]  # the second's value is 1.0


def test_the_next_chunk_gets_the_most_and_earlier_ones_nothing():
    keys = [(4, chunk) for chunk in range(8)] + [(3, 4), (5, 4)]
    got = rerank(one_query(keys), [SequenceBias(1.0, 0.5)], 10, key=np.array([[4, 3]]))
    bonus = dict(zip(map(tuple, got.result.keys[0].tolist()), got.result.scores[0].tolist(), strict=True))
    assert [bonus[4, chunk] for chunk in range(8)] == [0, 0, 0, 0, 1, 0.5, 0.25, 0.125]
    assert bonus[3, 4] == bonus[5, 4] == 0
    assert got.result.keys[0, 0].tolist() == [4, 4]


def test_shard_assist_moves_the_whole_article_up_and_keeps_its_order():
    keys = [(1, 0), (2, 9), (1, 5), (2, 1), (2, 0)]
    got = rerank(one_query(keys), [ShardAssist(0.25)], 5, key=np.array([[2, 5]]))
    assert got.result.ids.tolist() == [[1, 3, 4, 0, 2]]
    assert got.result.scores.tolist() == [[0.25, 0.25, 0.25, 0, 0]]


@pytest.mark.parametrize("stage", (SequenceBias(1.0), ShardAssist(1.0)), ids=str)
def test_a_key_that_is_not_known_gives_no_bonus(stage):
    result = one_query([(0, 0), (0, 1), (-1, -1)], [2, 1, -np.inf], ids=[5, 6, -1])
    got = rerank(result, [stage], 3, key=np.array([[-1, -1]]))
    assert got.result.scores.tolist() == [[2, 1, -math.inf]]


def test_a_chunk_that_is_not_known_has_an_article_and_no_next_chunk():
    result, key = one_query([(0, 0)]), np.array([[0, -1]])
    assert rerank(result, [ShardAssist(1.0)], 1, key=key).result.scores.tolist() == [[1]]
    assert rerank(result, [SequenceBias(1.0)], 1, key=key).result.scores.tolist() == [[0]]


def test_the_directional_bonus_is_its_weight_ahead_minus_that_behind_and_nothing_for_the_last_chunk_itself():
    vectors = np.array([[[1, 0], [1, 1], [1, 3], [1, -2], [5, 0]]], np.float32)
    result, last, ahead = one_query([(0, i) for i in range(5)]), np.array([[1, 0]]), np.array([[1, 0.5]])
    got = rerank(result, [DirectionalBonus(0.5)], 5, vectors=vectors, predicted=ahead, last=last.astype(np.float32))
    assert got.result.ids.tolist() == [[1, 2, 0, 4, 3]]
    assert got.result.scores.tolist() == [[0.5, 0.5, 0, 0, -0.5]]
    still = rerank(result, [DirectionalBonus(0.5)], 5, vectors=vectors, predicted=ahead, last=ahead)
    assert still.result.scores.tolist() == [[0] * 5]  # a prediction that is the last chunk has no direction


@pytest.mark.parametrize(("off", "score"), [(0.015, 0), (0.03, 0.5)])
def test_what_an_index_that_rounds_holds_of_the_last_chunk_has_no_direction(off, score):
    last, ahead = np.array([[3, 0]], np.float32), np.array([[3, 1]], np.float32)
    vectors = (last + np.array([0, 3 * off]))[:, None].astype(np.float32)
    got = rerank(one_query([(0, 0)]), [DirectionalBonus(0.5)], 1, vectors=vectors, predicted=ahead, last=last)
    assert got.result.scores.tolist() == [[score]]


@of_each
def test_equal_candidates_stay_in_the_order_they_had(stage):
    ids = np.random.default_rng(1).permutation(M)
    result = one_query([(1, 2)] * M, ids=ids)
    needs = {"vectors": np.ones((1, M, 2), np.float32), "key": np.array([[1, 1]])}
    needs |= {"predicted": np.array([[3.0, 3.0]]), "last": np.array([[0.0, 0.0]])}
    assert rerank(result, [stage], M, **needs).result.ids.tolist() == [ids.tolist()]


@of_each
def test_no_id_comes_twice_and_nothing_comes_after_the_last(stage):
    for seed in range(20):
        result, needs = found(seed)
        ids = rerank(result, [stage], M, **needs).result.ids
        for before, after in zip(result.ids, ids, strict=True):
            assert sorted(before) == sorted(after)
            assert not (after[np.argmax(after < 0) :] >= 0).any() if (after < 0).any() else True


@pytest.mark.parametrize("stages", ((), *((stage,) for stage in ALL)), ids=lambda stages: " ".join(map(str, stages)))
def test_a_repeated_id_keeps_its_first_place_and_an_empty_place_between_goes_last(stages):
    ids, scores = [4, 9, -1, 4, 2, 9, 4], [3, 3, 9, 2, 2, 1, 1]
    keys = [(0, i) for i in range(7)]
    needs = found(n=1, m=7)[1]
    needs["vectors"][0, 2] = np.nan
    got = rerank(one_query(keys, scores, ids), stages, 5, **needs)
    once = one_query([keys[i] for i in (0, 1, 4)], [3, 3, 2], [4, 9, 2])
    want = rerank(once, stages, 5, **needs | {"vectors": needs["vectors"][:, [0, 1, 4]]})
    for part, wanted in zip(got.result, want.result, strict=True):
        np.testing.assert_array_equal(part, wanted)
    assert got.result.ids[0, 3:].tolist() == [-1, -1]


@of_each
def test_what_stands_in_an_empty_place_does_not_matter(stage):
    result, needs = found(1)
    want = rerank(result, [stage], M, **needs).result
    nothing = result.ids < 0
    for junk in (np.nan, np.inf, 1e30):
        vectors = np.where(nothing[..., None], np.float32(junk), needs["vectors"])
        dirty = SearchResult(result.ids, np.where(nothing, np.float32(junk), result.scores), result.keys)
        for part, wanted in zip(rerank(dirty, [stage], M, **needs | {"vectors": vectors}).result, want, strict=True):
            np.testing.assert_array_equal(part, wanted)


@of_each
def test_an_answer_does_not_depend_on_the_other_queries_and_the_input_is_left_alone(stage):
    rng = np.random.default_rng(5)
    result, needs = found(5)
    for name in ("vectors", "predicted", "last"):
        needs[name] = rng.standard_normal(needs[name].shape).astype(np.float32)
    kept = [part.copy() for part in (*result, *needs.values())]
    together = rerank(result, [stage], 6, **needs).result
    for q in range(N):
        alone = SearchResult(*(part[q : q + 1] for part in result))
        got = rerank(alone, [stage], 6, **{name: part[q : q + 1] for name, part in needs.items()}).result
        for part, whole in zip(got, together, strict=True):
            np.testing.assert_array_equal(part[0], whole[q])
    for part, copy in zip((*result, *needs.values()), kept, strict=True):
        np.testing.assert_array_equal(part, copy)


@of_each
def test_a_stage_makes_no_more_places_than_are_wanted(stage):
    result, needs = found()
    seen = Candidates(result.scores, keys=result.keys, **needs)
    for wanted in (1, 5, M, M + 3):
        order, scores = stage.run(seen, wanted)
        assert order.shape == scores.shape == (N, min(wanted, M))
        assert scores.dtype == np.float32 and np.issubdtype(order.dtype, np.integer)


@of_each
@pytest.mark.parametrize(("n", "m"), ((0, 3), (2, 0), (0, 0)))
def test_no_query_and_no_candidate_are_fine(stage, n, m):
    result, needs = found(n=n, m=m, gone=(0,))
    got = rerank(result, [stage], 2, **needs).result
    assert got.ids.tolist() == [[-1, -1]] * n
    assert got.scores.tolist() == [[-math.inf] * 2] * n
    assert got.keys.shape == (n, 2, 2)


def test_other_precisions_are_taken_as_float32():
    result, needs = found(2)
    want = rerank(result, ALL, 6, **needs).result
    for dtype in (np.float16, np.float64):
        given = {name: part if name == "key" else part.astype(dtype) for name, part in needs.items()}
        other = SearchResult(result.ids.astype(np.int32), result.scores.astype(dtype), result.keys.astype(np.int64))
        for part, wanted in zip(rerank(other, ALL, 6, **given).result, want, strict=True):
            np.testing.assert_array_equal(part, wanted)
            assert part.dtype == wanted.dtype


@of_each
def test_the_largest_numbers_that_are_taken_leave_every_candidate_in_its_place(stage):
    result, needs = found(0)
    largest = np.finfo(np.float32).max
    ids, scores = result.ids, np.where(result.ids < 0, -np.inf, np.where(result.ids % 2, largest, -largest))
    needs["vectors"] *= np.float32(3e14)
    extreme = Mmr(0.5) if isinstance(stage, Mmr) else type(stage)(1e15)
    got = rerank(SearchResult(ids, scores.astype(np.float32), result.keys), [extreme], M, **needs).result
    np.testing.assert_array_equal(np.sort(got.ids), np.sort(ids))
    np.testing.assert_array_equal(np.isfinite(got.scores), got.ids >= 0)


def test_results_of_an_index_are_reranked_with_its_vectors(tmp_path, article_walks):
    vectors, keys = article_walks(articles=3, chunks=8, dim=8)
    payload = Payload.build(tmp_path / "p", vectors, keys, encoder="test")
    index = Index.build(payload, "flat")
    rows = np.array([3, 12])
    result = index.search(payload.take(rows), 30, exclude=rows[:, None])  # 24 rows: some places are empty
    needs = {
        "vectors": index.space.apply(payload.take(np.maximum(result.ids, 0))),
        "predicted": payload.take(rows),
        "last": payload.take(rows - 1),
        "key": payload.keys[rows],
    }
    for stage in ALL:
        same(rerank(result, [stage], 30, **needs), loop(result, [stage], 30, needs), 1e-5)
    best = rerank(result, [SequenceBias(10.0)], 1, key=payload.keys[rows]).result
    assert best.ids.tolist() == [[4], [13]]  # which is why it is labelled


def test_only_stages_that_see_keys_are_labelled_and_one_is_enough():
    result, needs = found()
    plain = rerank(result, [Mmr(), DirectionalBonus()], 3, **needs)
    assert not plain.uses_keys and plain.label == "vectors alone"
    for stage in (SequenceBias(), ShardAssist(), SequenceBias(0)):
        got = rerank(result, [Mmr(), stage, Mmr()], 3, **needs)
        assert got.uses_keys and got.label == "uses keys: not comparable with rankers that see vectors alone"
        assert got.label in repr(got) and got.label in str(got)
        assert [cost.uses_keys for cost in got.stages] == [False, True, False]
    assert "uses keys" not in repr(plain) and "mmr" in repr(plain) and "5 × 3" in repr(plain)
    assert not rerank(result, [], 3).uses_keys


@dataclass(frozen=True)
class Probe(Stage):
    """Keeps what it is shown, takes its time and reverses the order."""

    name: ClassVar[str] = "probe"
    seen: ClassVar[list] = []
    ms: float = 0.0

    def run(self, candidates, wanted):
        self.seen.append(candidates)
        Clock.now += self.ms / 1e3
        scores = np.where(candidates.scores > -np.inf, -candidates.scores, -np.inf)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :wanted]
        return order, np.take_along_axis(scores, order, axis=1)


@dataclass(frozen=True)
class KeyProbe(Probe):
    name: ClassVar[str] = "key-probe"
    needs: ClassVar[tuple[str, ...]] = ("key",)


class Clock:
    now = 0.0


def test_every_stage_stands_in_the_split_with_its_own_milliseconds(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    result, needs = found()
    got = rerank(result, [Probe(5), KeyProbe(0.5), Probe(2)], 3, **needs)
    assert [(cost.name, cost.uses_keys) for cost in got.stages] == [
        ("probe", False),
        ("key-probe", True),
        ("probe", False),
    ]
    np.testing.assert_allclose([cost.ms for cost in got.stages], [5, 0.5, 2], rtol=1e-6)
    assert "probe 5 ms, key-probe 0.5 ms, probe 2 ms" in repr(got)


def test_a_stage_that_is_not_labelled_is_shown_no_key():
    result, needs = found()
    Probe.seen.clear()
    rerank(result, [Probe(), KeyProbe()], 3, **needs | {"key": needs["key"].astype(np.int8)})
    plain, with_keys = Probe.seen
    assert plain.key is None and plain.keys is None and plain.vectors is None
    np.testing.assert_array_equal(with_keys.key, needs["key"])
    assert with_keys.key.dtype == np.int64
    assert with_keys.keys[0].tolist() == result.keys[0][np.argsort(result.scores[0], kind="stable")].tolist()


def test_the_table_of_rerankers_says_which_use_keys():
    assert {name: kind.uses_keys for name, kind in RERANKERS.items()} == {
        "mmr": False,
        "directional-bonus": False,
        "sequence-bias": True,
        "shard-assist": True,
    }


@pytest.mark.parametrize(
    ("text", "stage"),
    (
        ("mmr", Mmr()),
        ("mmr:0.7", Mmr(0.7)),
        ("mmr:1", Mmr(1.0)),
        ("directional-bonus:0.2", DirectionalBonus(0.2)),
        ("sequence-bias:0.2", SequenceBias(0.2)),
        ("sequence-bias:0.2:0.25", SequenceBias(weight=0.2, decay=0.25)),
        ("shard-assist:1e-3", ShardAssist(0.001)),
    ),
)
def test_a_text_names_a_stage_and_a_stage_says_its_text(text, stage):
    assert parse(text) == stage
    assert parse(str(stage)) == stage


def test_numpy_numbers_are_numbers_and_a_stage_does_not_change():
    assert ShardAssist(np.float64(0.5)) == ShardAssist(0.5) and str(Mmr(np.int64(1))) == "mmr:1.0"
    with pytest.raises(FrozenInstanceError):
        Mmr().relevance = 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("mrm:0.7", "reranker is 'mrm:0.7', and one of mmr, directional-bonus, sequence-bias, shard-assist is wanted"),
        ("", "reranker is '', and one of mmr"),
        (0.7, "reranker is 0.7, and one of mmr"),
        ("mmr:0.7:1", "reranker 'mmr:0.7:1' has 2 numbers, and mmr:RELEVANCE is wanted"),
        ("mmr:", "reranker 'mmr:' has a part that is no number, and mmr:RELEVANCE is wanted"),
        ("sequence-bias:0.2:x", "has a part that is no number, and sequence-bias:WEIGHT:DECAY is wanted"),
        ("mmr:nan", "relevance of mmr is nan, and a number from 0 to 1 is wanted"),
    ),
)
def test_a_text_that_names_no_stage_is_refused(text, message):
    with pytest.raises(InputError) as error:
        parse(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "numbers", "message"),
    (
        (Mmr, (1.5,), "relevance of mmr is 1.5, and a number from 0 to 1 is wanted"),
        (Mmr, (-0.1,), "relevance of mmr is -0.1"),
        (Mmr, (math.nan,), "relevance of mmr is nan"),
        (Mmr, ("0.7",), "relevance of mmr is '0.7'"),
        (Mmr, (True,), "relevance of mmr is True"),
        (DirectionalBonus, (math.inf,), "weight of directional-bonus is inf, and a number from 0 to 1e+15 is wanted"),
        (DirectionalBonus, (-1,), "weight of directional-bonus is -1"),
        (SequenceBias, (math.nan,), "weight of sequence-bias is nan"),
        (SequenceBias, (0.1, 1.0), "decay of sequence-bias is 1.0, and a number from 0 to less than 1 is wanted"),
        (SequenceBias, (0.1, math.nan), "decay of sequence-bias is nan"),
        (ShardAssist, (None,), "weight of shard-assist is None"),
        (ShardAssist, (10**400,), "weight of shard-assist is 1000"),
    ),
)
def test_a_number_that_does_not_fit_is_refused(kind, numbers, message):
    with pytest.raises(InputError) as error:
        kind(*numbers)
    assert message in str(error.value) and "\n" not in str(error.value)


@of_each
def test_what_a_stage_needs_and_is_not_given_is_named(stage):
    result, needs = found()
    rerank(result, [stage], 3, **{name: needs[name] for name in stage.needs})  # and nothing else
    for name in stage.needs:
        given = {other: part for other, part in needs.items() if other != name}
        with pytest.raises(InputError, match=f"^{stage.name} needs {name}, and none is given: pass .* as {name}=$"):
            rerank(result, [stage], 3, **given)


def _with(array, place, value):
    changed = np.array(array, np.float64 if isinstance(value, float) else None)
    changed[place] = value
    return changed


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    (
        ("vectors", lambda v: v[:, :-1], "vectors has shape [5, 11, 6], and [5, 12, dim] is wanted"),
        ("vectors", lambda v: v[0], "vectors has shape [12, 6], and [5, 12, dim] is wanted"),
        ("vectors", lambda v: v.astype(int), "vectors is int64, and a float array is wanted"),
        ("vectors", lambda v: _with(v, (0, 3, 1), math.nan), "vectors[0, 3] is not finite, or longer than 1e+15"),
        ("vectors", lambda v: _with(v, (2, 1, 0), math.inf), "vectors[2, 1] is not finite"),
        ("vectors", lambda v: _with(v, (2, 1, 0), 1e300), "vectors[2, 1] is not finite"),
        ("vectors", lambda v: _with(v, (2, 1, 0), 2e15), "vectors[2, 1] is not finite, or longer than 1e+15"),
        ("vectors", lambda v: [[1.0], [1.0, 2.0]], "vectors is a list that is no array"),
        ("predicted", lambda v: v[:, :-1], "predicted has shape [5, 5], and [5, 6] is wanted"),
        ("predicted", lambda v: v[:-1], "predicted has shape [4, 6], and [5, 6] is wanted"),
        ("predicted", lambda v: _with(v, (4, 0), math.nan), "predicted[4] is not finite"),
        ("last", lambda v: v[0], "last has shape [6], and [5, 6] is wanted"),
        ("last", lambda v: _with(v, (1, 0), -math.inf), "last[1] is not finite"),
        ("key", lambda v: v[0], "key has shape [2], and [5, 2] is wanted"),
        ("key", lambda v: v[:, :1], "key has shape [5, 1], and [5, 2] is wanted"),
        ("key", lambda v: v.astype(float), "key is float64, and an array of integers is wanted"),
        ("key", lambda v: _with(v, (3, 1), -2), "key[3] is ("),
        ("key", lambda v: _with(v, (3, 0), 2**31), "key[3] is (2147483648, "),
    ),
)
def test_what_a_stage_needs_and_is_given_wrong_is_named(name, wrong, message):
    result, needs = found()
    with pytest.raises(InputError) as error:
        rerank(result, ALL, 3, **needs | {name: wrong(needs[name])})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    (
        (lambda r: r.ids, "result is a ndarray, and what Index.search returns is wanted"),
        (lambda r: tuple(r[:2]), "result is a tuple, and what Index.search returns is wanted"),
        (lambda r: tuple(part[0] for part in r), "ids has shape [12], and [n, m] is wanted"),
        (lambda r: r._replace(scores=r.scores[:, :-1]), "scores has shape [5, 11], and [5, 12] is wanted"),
        (lambda r: r._replace(keys=r.keys[..., 0]), "keys has shape [5, 12], and [5, 12, 2] is wanted"),
        (lambda r: r._replace(ids=r.ids.astype(float)), "ids is float64, and an array of integers is wanted"),
        (lambda r: r._replace(ids=_with(r.ids, (0, 2), -3)), "ids[0, 2] is -3, and a payload row is wanted"),
        (lambda r: r._replace(scores=_with(r.scores, (0, 2), math.nan)), "scores[0, 2] is nan, and a finite float32"),
        (lambda r: r._replace(scores=_with(r.scores, (0, 2), -math.inf)), "scores[0, 2] is -inf"),
        (lambda r: r._replace(scores=_with(r.scores, (0, 2), 1e300)), "scores[0, 2] is inf"),
    ),
)
def test_a_wrong_result_is_refused(wrong, message):
    result, needs = found()
    with pytest.raises(InputError) as error:
        rerank(wrong(result), [Mmr()], 3, **needs)
    assert message in str(error.value)


@pytest.mark.parametrize("k", (0, -1, 2.0, True, "3", None))
def test_a_wrong_k_is_refused(k):
    with pytest.raises(InputError, match=r"^k is .*, and an integer ≥ 1 is wanted$"):
        rerank(found()[0], [], k)


@pytest.mark.parametrize(
    ("stages", "message"),
    (
        (Mmr(), "stages is a Mmr, and a list of rerankers is wanted: parse('mmr:0.7') makes one of mmr, "),
        ("mmr", "stages is a str, and a list of rerankers is wanted"),
        (["mmr"], "stages[0] is 'mmr', and a reranker is wanted: parse('mmr:0.7') makes one of mmr, "),
        ([Mmr(), ShardAssist], "stages[1] is <class"),
    ),
)
def test_what_is_no_stage_is_refused(stages, message):
    result, needs = found()
    with pytest.raises(InputError) as error:
        rerank(result, stages, 3, **needs)
    assert message in str(error.value)
