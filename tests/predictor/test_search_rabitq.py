"""The model and the scan of inverted lists in one call find what one after the other finds."""

from __future__ import annotations

import numpy as np
import pytest

import fastlvm
from fastlvm import _C
from fastlvm.retrieval import Index


@pytest.fixture(autouse=True)
def restore():
    isa, threads = _C.isa(), _C.get_num_threads()
    yield
    _C.set_isa(isa)
    _C.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, payload, space):
    path = tmp_path_factory.mktemp("artifact") / "a"
    index = Index.build(payload, "ivf_rabitq", space=space, nlist=8, nprobe=3)
    fastlvm.export(model, path, index=index, payload=payload)
    return path


def same(found, wanted):
    """To the last bit."""
    return all(one.tobytes() == other.tobytes() for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("threads", (None, 1, 3))
def test_one_call_finds_what_two_find(folder, contexts, isa, threads):
    _C.set_isa(isa)
    predictor = fastlvm.Predictor.load(folder, threads)
    raw, rows = contexts
    raw, rows = np.concatenate([raw, raw]), np.concatenate([rows, rows])  # more than are answered at once
    assert len(raw) > 64
    for given, own in ((raw, rows), (raw[:1], rows[:1]), (raw[:0], rows[:0])):
        predicted = predictor.predict(given)
        assert same(predictor.search(given, 9), predictor.index.search(predicted, 9))
        assert same(predictor.search(given, 9, own), predictor.index.search(predicted, 9, own))
    single = predictor.search(raw[2], 9, exclude=rows[2])
    assert same(single, [part[0] for part in predictor.index.search(predictor.predict(raw[2]), 9, rows[2])])


@pytest.mark.parametrize("isa", _C.isas())
def test_excluding_the_context_is_excluding_the_rows_it_is_found_to_be(folder, payload, contexts, isa):
    _C.set_isa(isa)
    predictor = fastlvm.Predictor.load(folder)
    raw, rows = contexts
    own = predictor._own_rows(predictor._checked(raw)[0])
    found = predictor.search(raw, 9, exclude="context")
    assert same(found, predictor.index.search(predictor.predict(raw), 9, own))
    for i in range(len(raw)):
        assert not np.isin(payload.groups[rows[i]], found.ids[i]).any()


@pytest.mark.parametrize("threads", (None, 1, 3))
def test_the_scan_has_the_threads_of_the_predictor(folder, contexts, monkeypatch, threads):
    predictor = fastlvm.Predictor.load(folder, threads)
    searcher, given = predictor.index._searcher, []

    class Noted:
        def predict(self, *arguments):
            given.append(arguments[-1])
            native.predict(*arguments)

    native = searcher._native
    monkeypatch.setattr(searcher, "_native", Noted())
    predictor.search(contexts[0], 5)
    assert given == [threads or 0]
