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


@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("isa", _C.isas())
def test_excluding_the_context_is_excluding_its_rows_from_the_same_candidates(folder, payload, contexts, isa, threads):
    """Among rows of lists and rows that came since, to the last bit."""
    _C.set_isa(isa)
    predictor = fastlvm.Predictor.load(folder, threads)
    index = predictor.index
    index._growth._journal = None  # of this object alone
    raw, rows = contexts
    late = rows[[3, 20, 28]]  # are added once more
    index.add(payload.take(late.ravel()), np.stack([np.full(late.size, 900), np.arange(late.size)], axis=1))
    index.remove([[900, 1], [900, 7]])
    groups = payload.groups[np.concatenate([np.arange(len(payload)), late.ravel()])]
    for k in (9, len(index)):
        most = k + 8 * rows.shape[1]  # rows that own ones are looked for among
        scores, ids = np.empty((len(raw), most), np.float32), np.empty((len(raw), most), np.int64)
        state, candidates = index._searcher._state, max(8 * min(k, index._rows.count), most)
        state.native.search(predictor.predict(raw), scores, ids, 3, candidates, tail=state.filled)
        ids = np.where(ids >= 0, index._rows.of[ids], -1)
        assert ids[[3, 20, 28]].max() >= len(payload)
        found = predictor.search(raw, k, exclude="context")
        for i in range(len(raw)):
            kept = ~np.isin(groups[ids[i]], payload.groups[rows[i]]) & (ids[i] >= 0)
            wanted = min(k, kept.sum())
            np.testing.assert_array_equal(found.ids[i, :wanted], ids[i][kept][:k])
            np.testing.assert_array_equal(found.scores[i, :wanted], scores[i][kept][:k])
            assert (found.ids[i, wanted:] == -1).all()
        for i in (0, 3, 20):
            assert same(predictor.search(raw[i], k, exclude="context"), [part[i] for part in found])


@pytest.mark.parametrize("threads", (None, 1, 3))
def test_the_scan_has_the_threads_of_the_predictor(folder, contexts, monkeypatch, threads):
    predictor = fastlvm.Predictor.load(folder, threads)
    searcher, given = predictor.index._searcher, []
    native = searcher._state.native

    class Noted:
        def predict(self, model, context, predicted, scores, ids, nprobe, candidates, exclude, threads, *rest):
            given.append(threads)
            native.predict(model, context, predicted, scores, ids, nprobe, candidates, exclude, threads, *rest)

    monkeypatch.setattr(searcher, "_state", searcher._state._replace(native=Noted()))
    predictor.search(contexts[0], 5)
    assert given == [threads or 0]
