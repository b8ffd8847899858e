"""`Index.vectors`: what an index holds of its rows, of every kind, while it grows too."""

from __future__ import annotations

import numpy as np
import pytest
from growing import DIM, KINDS, QUERIES, ROWS, Saved, keys_of, payload_of, vectors_of

from fastlvm.data import Space
from fastlvm.errors import InputError
from fastlvm.retrieval import Index, rabitq
from fastlvm.retrieval.blas import faiss

ERROR = {"ivf_rabitq": 0.01}  # of a component of a vector of length 1
CLIPPED = "ivf_sq8"  # where a component is beyond those that the kind was trained on


@pytest.fixture(scope="module")
def payload(tmp_path_factory):
    """Rows 5, 17 and 300 are equal."""
    vectors = vectors_of(0, ROWS)
    vectors[[17, 300]] = vectors[5]
    keys = np.stack(np.divmod(np.arange(ROWS), 10), axis=1)
    return payload_of(tmp_path_factory.mktemp("payload") / "p", vectors, keys)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, payload):
    return Saved(tmp_path_factory.mktemp("saved"), payload, Space.fit(payload.take(np.arange(200))))


@pytest.fixture(params=KINDS)
def index(request, saved, tmp_path):
    index = Index.open(saved[request.param])
    index.save(tmp_path / "own")
    yield index
    index.close()


def agree(index, ids, raw):
    wanted = index.space.apply(raw)
    if index.kind == CLIPPED:
        apart = np.abs(index.vectors(ids) - wanted)
        assert np.mean(apart) < 0.01 and np.mean(apart > 0.01) < 0.05
        return
    np.testing.assert_allclose(index.vectors(ids), wanted, atol=ERROR.get(index.kind, 1e-6))


def test_they_are_those_of_the_space_and_of_the_duplicate_group(index, payload):
    ids = np.array([[0, 5, 17], [300, 419, 5]])
    got = index.vectors(ids)
    assert got.shape == (2, 3, DIM) and got.dtype == np.float32
    agree(index, ids, payload.take(ids))
    assert (got[0, 1] == got[0, 2]).all() and (got[0, 1] == got[1, 0]).all()
    agree(index, np.arange(ROWS), payload.take(np.arange(ROWS)))
    assert index.vectors(np.array(3)).shape == (DIM,) and index.vectors(np.empty((0, 4), int)).shape == (0, 4, DIM)


def test_scores_of_a_search_are_their_inner_products(index):
    found = index.search(QUERIES, 8)
    products = np.einsum("nmd,nd->nm", index.vectors(found.ids), QUERIES)
    np.testing.assert_allclose(found.scores, products, atol=1e-5)


def test_none_and_what_was_removed_are_zeros(index, payload):
    index.remove(payload.keys[[8, 5]])
    got = index.vectors(np.array([-1, 8, 5, 9]))
    assert not got[:3].any() and got[3].any()
    agree(index, np.array([17, 300]), payload.take(np.array([17, 300])))  # the rest of the group of row 5


def test_added_rows_have_theirs_in_the_tail_and_in_the_lists(index, payload, monkeypatch):
    monkeypatch.setattr(rabitq, "TAIL", 64)
    fresh = vectors_of(7, 100)
    agree(index, np.arange(ROWS), payload.take(np.arange(ROWS)))  # what was looked up before does not stay
    for first in range(0, 100, 20):
        ids = index.add(fresh[first : first + 20], keys_of(1000, 100)[first : first + 20])
        agree(index, ids, fresh[first : first + 20])
        if first == 20:
            index.remove(keys_of(1000, 100)[[3, 25]])
    assert not index.vectors(np.array([ROWS + 3, ROWS + 25])).any()
    rest = np.setdiff1d(np.arange(100), [3, 25])
    agree(index, np.append(ROWS + rest, 30), np.concatenate([fresh[rest], payload.take(np.array([30]))]))


def test_asking_for_them_changes_no_file(index, tmp_path):
    index.save_copy(tmp_path / "before")
    index.vectors(np.arange(ROWS))
    index.save_copy(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes()
    reopened = Index.open(tmp_path / "after")
    np.testing.assert_array_equal(reopened.vectors(np.arange(9)), index.vectors(np.arange(9)))


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (np.array([ROWS]), f"ids spans {ROWS} to {ROWS}: wanted are rows -1 to {ROWS - 1}"),
        (np.array([-2, 4]), "ids spans -2 to 4"),
        (np.array([0.5]), "ids is float64, and integer ids of rows are wanted"),
    ],
)
def test_other_ids_are_refused(saved, ids, reason):
    with pytest.raises(InputError, match=reason):
        Index.open(saved["flat"]).vectors(ids)


def test_a_list_index_without_a_map_makes_one_once(saved, monkeypatch):
    index = Index.open(saved["ivf_flat"])
    made = []
    monkeypatch.setattr(
        faiss.IndexIVF, "set_direct_map_type", lambda self, kind, old=faiss.IndexIVF.set_direct_map_type: (
            made.append(kind), old(self, kind)
        )
    )  # fmt: skip
    for _ in range(3):
        index.vectors(np.arange(4))
    assert made == [faiss.DirectMap.Array]
