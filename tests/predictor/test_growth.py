"""The index of a predictor grows, and stays grown when the artifact is loaded again."""

from __future__ import annotations

import numpy as np
import pytest

import fastlvm
from fastlvm.errors import IntegrityError
from fastlvm.retrieval import Index

from .sample import DIM


def same(found, wanted):
    """To the last bit."""
    return all(one.tobytes() == other.tobytes() for one, other in zip(found, wanted, strict=True))


def new_rows(count):
    vectors = np.random.default_rng(8).standard_normal((count, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, np.stack([np.full(count, 900), np.arange(count)], axis=1)


def test_rows_added_to_a_predictor_are_there_after_loading(copy, payload, contexts):
    predictor = fastlvm.Predictor.load(copy)
    vectors, keys = new_rows(20)
    ids = predictor.index.add(vectors, keys)
    predictor.index.remove(payload.keys[contexts[1][0]])
    found = predictor.search(contexts[0], 30)
    assert not np.isin(found.ids, contexts[1][0]).any() and np.isin(found.ids, ids).any()
    again = fastlvm.Predictor.load(copy)
    assert same(again.search(contexts[0], 30), found) and len(again.index) == len(payload) + 15
    assert Index.verify(copy / "index").records == 2


def test_a_context_of_added_rows_is_excluded(copy):
    predictor = fastlvm.Predictor.load(copy)
    vectors, keys = new_rows(predictor.context)
    ids = predictor.index.add(vectors, keys)
    assert not np.isin(predictor.search(vectors, 400, exclude="context").ids, ids).any()
    assert np.isin(ids, predictor.search(vectors, 400).ids).all()
    assert not np.isin(predictor.search(vectors, 400, exclude=ids[:2]).ids, ids[:2]).any()


def test_an_index_that_grew_is_exported_as_it_is(tmp_path, model, payload, space, contexts):
    """And goes on in its own folder."""
    index = Index.build(payload, space=space)
    index.save(tmp_path / "index")
    vectors, keys = new_rows(9)
    index.add(vectors, keys)
    index.remove(keys[:2])
    fastlvm.export(model, tmp_path / "a", index=index, payload=payload)
    index.remove(keys[2:3])
    loaded = fastlvm.Predictor.load(tmp_path / "a").index
    assert (len(loaded), len(index)) == (len(payload) + 7, len(payload) + 6)
    assert (loaded.id, loaded.total) == (index.id, index.total)
    assert Index.verify(tmp_path / "index").records == 3 and not (tmp_path / "a" / "index" / "journal.bin").exists()


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + b"?", lambda data: b"?" + data[1:]])
def test_a_damaged_journal_is_refused(copy, damage):
    predictor = fastlvm.Predictor.load(copy)
    predictor.index.add(*new_rows(1))
    file = copy / "index" / "journal.bin"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(IntegrityError, match="journal"):
        fastlvm.Predictor.load(copy)
