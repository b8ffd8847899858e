"""`Predictor.rerank`: what a search finds, through stages, equals doing it by hand."""

from __future__ import annotations

import numpy as np
import pytest

import fastlvm
from fastlvm.errors import InputError
from fastlvm.retrieval import Index
from fastlvm.retrieval.rerank import RERANKERS, USES_KEYS, Mmr, SequenceBias, ShardAssist, rerank

STAGES = [RERANKERS[name]() for name in RERANKERS]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory, model, payload, windows, space):
    """A predictor whose index holds a byte a component."""
    folder = tmp_path_factory.mktemp("rounded")
    Index.build(payload, "ivf_rabitq", space=space, nlist=8, nprobe=8).save(folder / "i")
    fastlvm.export(model, folder / "a", index=folder / "i", payload=payload, windows=windows)
    return fastlvm.Predictor.load(folder / "a")


@pytest.fixture(params=("exact", "rounded"))
def any_predictor(request, predictor):
    return predictor if request.param == "exact" else request.getfixturevalue("rounded")


def by_hand(predictor, payload, raw, rows, stages, k, candidates, exclude):
    found = predictor.search(raw, candidates, exclude)
    vectors = predictor.index.vectors(found.ids)
    last = predictor.index.space.apply(raw[:, -1])
    key = payload.keys[rows[:, -1]]
    predicted = predictor.predict(raw)
    return rerank(tuple(found), stages, k, vectors=vectors, predicted=predicted, last=last, key=key)


@pytest.mark.parametrize("stages", [[], *([stage] for stage in STAGES), STAGES], ids=lambda s: "+".join(map(str, s)))
@pytest.mark.parametrize("exclude", ("context", None))
def test_equals_the_stages_run_by_hand(any_predictor, payload, contexts, stages, exclude):
    raw, rows = contexts
    got = any_predictor.rerank(raw, stages, 7, candidates=30, exclude=exclude)
    wanted = by_hand(any_predictor, payload, raw, rows, stages, 7, 30, exclude)
    np.testing.assert_array_equal(got.result.ids, wanted.result.ids)
    np.testing.assert_array_equal(got.result.keys, wanted.result.keys)
    np.testing.assert_allclose(got.result.scores, wanted.result.scores, atol=1e-5)
    assert got.label == wanted.label
    assert [stage.name for stage in got.stages] == ["inputs", *(stage.name for stage in stages)]


def test_one_context_gives_one_row(any_predictor, payload, contexts):
    raw, rows = contexts
    many = any_predictor.rerank(raw, STAGES, 5, exclude="context")
    for key in (None, payload.keys[rows[3, -1]]):
        one = any_predictor.rerank(raw[3], STAGES, 5, exclude="context", key=key)
        assert one.result.ids.shape == (5,) and one.result.keys.shape == (5, 2)
        np.testing.assert_array_equal(one.result.ids, many.result.ids[3])
        assert repr(one).startswith("Reranked(5; inputs ") and USES_KEYS in repr(one)


def test_a_key_that_is_given_is_used_and_one_that_the_index_has_not_is_no_key(predictor, payload, contexts):
    raw, _ = contexts
    article = int(payload.keys[-1, 0])
    moved = predictor.rerank(raw[0], [ShardAssist(5.0)], 10, candidates=len(payload), key=np.array([article, 3]))
    assert (moved.result.keys[:, 0] == article).all()
    strange = np.ones((5, predictor.dim), np.float32)
    found = predictor.search(strange, 10)
    got = predictor.rerank(strange, [ShardAssist(5.0)], 10)
    np.testing.assert_array_equal(got.result.ids, found.ids)
    assert got.uses_keys


def test_the_next_chunk_is_first_where_keys_say_so(any_predictor, payload, contexts):
    raw, rows = contexts
    got = any_predictor.rerank(raw, [SequenceBias(9.0, 0.0)], 1, candidates=len(payload), exclude="context")
    following = rows[:, -1] + 1
    single = ~np.isin(following, [14, 15, 40, 100, 101]) & ~np.isin(following - 1, [14, 15, 40, 100, 101])
    assert single.sum() > 40
    np.testing.assert_array_equal(got.result.keys[single, 0], payload.keys[following[single]])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"k": 51}, "k is 51 and candidates 50: ask for as many candidates"),
        ({"k": 0}, "k is 0, and an integer ≥ 1 is wanted"),
        ({"candidates": 0}, "candidates is 0, and an integer ≥ 1 is wanted"),
        ({"candidates": 2.0}, "candidates is 2.0, and an integer ≥ 1 is wanted"),
        ({"stages": ["mmr"]}, r"stages\[0\] is 'mmr', and a reranker is wanted"),
        ({"stages": Mmr()}, "stages is a Mmr, and a list of rerankers is wanted"),
        ({"exclude": "own"}, "exclude is 'own'"),
        (
            {"key": np.zeros((3, 2), int), "stages": [ShardAssist()]},
            r"key has shape \[1, 3, 2\], and \[1, 2\] is wanted",
        ),
        ({"key": np.zeros(2), "stages": [ShardAssist()]}, "key is float64, and an array of integers is wanted"),
        ({"key": "a", "stages": [ShardAssist()]}, "key is .*, and an array of integers is wanted"),
        ({"context": np.zeros((4, 32), np.float32)}, "context has shape"),
    ],
)
def test_wrong_input_is_refused(predictor, contexts, given, reason):
    given = {"context": contexts[0][0], "stages": [Mmr()]} | given
    with pytest.raises(InputError, match=reason):
        predictor.rerank(given.pop("context"), given.pop("stages"), **given)


def test_more_candidates_than_rows_are_those_there_are(any_predictor, payload, contexts):
    got = any_predictor.rerank(contexts[0][0], [Mmr()], 500, candidates=500)
    there = got.result.ids >= 0
    assert there.sum() == len(np.unique(payload.groups)) and there[: there.sum()].all()
