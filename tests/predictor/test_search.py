from __future__ import annotations

import numpy as np
import pytest

import fastlvm
from fastlvm.data import Payload
from fastlvm.errors import InputError
from fastlvm.retrieval import Index

from .sample import CHUNKS, make_model, make_vectors


def brute(predictor, payload, raw, k, excluded=None):
    """Score every group's smallest row, drop the excluded groups, sort."""
    pool = predictor.index.space.apply(payload.take(np.arange(len(payload)))).astype(np.float64)
    ids, scores = [], []
    for i, prediction in enumerate(predictor.predict(raw)):
        score = pool @ prediction
        score[payload.groups != np.arange(len(payload))] = -np.inf
        if excluded is not None:
            score[payload.groups[excluded[i]]] = -np.inf
        best = np.argsort(-score, kind="stable")[:k]
        ids.append(best)
        scores.append(score[best])
    return np.array(ids), np.array(scores)


@pytest.mark.parametrize("k", (1, 10, 50))
def test_equals_brute_force(predictor, payload, contexts, k):
    raw, rows = contexts
    for exclude in (None, rows):
        found = predictor.search(raw, k, exclude=exclude)
        ids, scores = brute(predictor, payload, raw, k, exclude)
        np.testing.assert_array_equal(found.ids, ids)
        np.testing.assert_allclose(found.scores, scores, atol=1e-5)
        np.testing.assert_array_equal(found.keys, payload.keys[ids])
        assert found.ids.dtype == np.int64 and found.scores.dtype == np.float32 and found.keys.dtype == np.int32


def test_the_default_is_fifty(predictor, contexts):
    assert predictor.search(contexts[0]).ids.shape == (len(contexts[0]), 50)


def test_one_context_gives_one_row(predictor, contexts):
    raw, rows = contexts
    many = predictor.search(raw, 7, exclude=rows)
    for exclude in (rows[2], rows[2:3]):
        one = predictor.search(raw[2], 7, exclude=exclude)
        assert one.ids.shape == one.scores.shape == (7,) and one.keys.shape == (7, 2)
        np.testing.assert_array_equal(one.ids, many.ids[2])
        np.testing.assert_array_equal(one.keys, many.keys[2])


def test_no_contexts_no_results(predictor, contexts):
    for exclude in (None, "context"):
        found = predictor.search(contexts[0][:0], 4, exclude=exclude)
        assert found.ids.shape == (0, 4) and found.keys.shape == (0, 4, 2)


def test_excluding_the_context_is_excluding_its_rows(predictor, contexts):
    raw, rows = contexts
    by_vector, by_row = predictor.search(raw, 20, exclude="context"), predictor.search(raw, 20, exclude=rows)
    np.testing.assert_array_equal(by_vector.ids, by_row.ids)
    plain = predictor.search(raw, 20)
    assert any(np.intersect1d(plain.ids[i], rows[i]).size for i in range(len(raw)))


def test_excluding_the_context_covers_its_duplicates(predictor, payload):
    rows = np.array([[97, 98, 99, 100, 101], [12, 13, 14, 15, 16]])  # 40 = 100 = 101 and 14 = 15
    raw = payload.take(rows)
    plain = predictor.search(raw, 360)
    assert 40 in plain.ids[0] and 14 in plain.ids[1]
    found = predictor.search(raw, 340, exclude="context")
    assert not np.isin(found.ids[0], [40, 97, 98, 99, 100, 101]).any()
    assert not np.isin(found.ids[1], [12, 13, 14, 15, 16]).any()
    np.testing.assert_array_equal(found.ids, brute(predictor, payload, raw, 340, rows)[0])


@pytest.mark.parametrize("kind", ("ivf_flat", "ivf_sq8", "hnsw"))
def test_excluding_the_context_by_every_kind_of_index(tmp_path, model, payload, space, contexts, kind):
    raw, rows = contexts
    fastlvm.export(model, tmp_path / "a", index=Index.build(payload, kind, space=space), payload=payload)
    predictor = fastlvm.Predictor.load(tmp_path / "a")
    found = predictor.search(raw, 20, exclude="context").ids
    own = payload.groups[rows]
    assert not any(np.intersect1d(found[i], own[i]).size for i in range(len(rows)))
    alike = [np.intersect1d(found[i], predictor.search(raw[i], 20, exclude=rows[i]).ids).size for i in range(len(rows))]
    assert min(alike) >= 19  # nothing else is left out, but what rounded scores cannot tell from a context vector


def test_excluding_the_context_survives_float16_and_scaling(predictor, contexts):
    raw, rows = contexts
    wanted = predictor.search(raw, 20, exclude=rows).ids
    for given in (raw * np.float32(7), raw.astype(np.float16)):
        found = predictor.search(given, 20, exclude="context").ids
        assert not any(np.intersect1d(found[i], rows[i]).size for i in range(len(rows)))
        assert (found == wanted).mean() > 0.95


def test_a_context_that_is_not_in_the_payload_excludes_nothing(predictor):
    raw = np.random.default_rng(5).standard_normal((6, predictor.context, predictor.dim)).astype(np.float32)
    np.testing.assert_array_equal(predictor.search(raw, 20, exclude="context").ids, predictor.search(raw, 20).ids)


def test_rows_all_but_equal_to_a_context_vector_go_with_it(tmp_path):
    """Of two rows a float32 score cannot tell apart either may come first; the context's own must never stay."""
    vectors = make_vectors(3)
    rng = np.random.default_rng(1)
    for row in range(0, 60, 3):
        vectors[200 + row] = vectors[row] + 1e-7 * rng.standard_normal(vectors.shape[1])
        near = vectors[row] + 1e-3 * rng.standard_normal(vectors.shape[1])
        vectors[201 + row] = near / np.linalg.norm(near)  # a match all the same, and yet another row: it is to stay
    keys = np.stack(np.divmod(np.arange(len(vectors)), CHUNKS), axis=1).astype(np.int32)
    payload = Payload.build(tmp_path / "p", vectors, keys, encoder="test")
    fastlvm.export(make_model(), tmp_path / "a", payload=payload)
    predictor = fastlvm.Predictor.load(tmp_path / "a")
    rows = np.arange(0, 60, 3).reshape(4, 5)
    found = predictor.search(payload.take(rows), len(payload), exclude="context").ids
    for i in range(4):
        assert not np.isin(rows[i], found[i]).any()
        assert np.isin(rows[i] + 201, found[i]).all()


def test_padding_where_too_few_rows_remain(predictor, payload, contexts):
    raw, _ = contexts
    groups = len(np.unique(payload.groups))
    found = predictor.search(raw[:2], len(payload) + 9)
    assert ((found.ids >= 0).sum(axis=1) == groups).all()
    assert (found.ids[:, groups:] == -1).all() and (found.keys[:, groups:] == -1).all()
    assert np.isneginf(found.scores[:, groups:]).all()


def test_padded_exclusions(predictor, contexts):
    raw, rows = contexts
    padded = np.concatenate([np.full((len(rows), 3), -1), rows], axis=1)
    np.testing.assert_array_equal(
        predictor.search(raw, 9, exclude=padded).ids, predictor.search(raw, 9, exclude=rows).ids
    )
    shared = predictor.search(raw, 9, exclude=rows[0])
    assert not np.isin(shared.ids, rows[0]).any()


@pytest.mark.parametrize(
    "options, says",
    (
        ({"k": 0}, "k is 0"),
        ({"k": 2.5}, "k is 2.5"),
        ({"exclude": "target"}, "exclude is 'target'.*\"context\""),
        ({"exclude": np.zeros((3, 2))}, "exclude is float64"),
        ({"exclude": np.zeros((3, 2), int)}, "exclude has shape"),
        ({"exclude": np.array([10**6])}, "exclude spans"),
    ),
)
def test_wrong_options_are_refused(predictor, contexts, options, says):
    with pytest.raises(InputError, match=says):
        predictor.search(contexts[0][:2], **options)
