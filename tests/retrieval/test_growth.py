"""Adding to an index and removing from it, of every kind: what is found, what is refused and what a folder keeps."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from growing import DIM, KINDS, LISTS, QUERIES, ROWS, Saved, keys_of, payload_of, same, vectors_of

from fastlvm.data import Space
from fastlvm.errors import InputError, IntegrityError
from fastlvm.files import sha256_json
from fastlvm.retrieval import Index, growth

EXACT = ("flat", "ivf_flat")  # with all lists probed


@pytest.fixture(scope="module")
def payload(tmp_path_factory):
    """Rows 5, 17 and 300 are equal, so are 40 and 41."""
    vectors = vectors_of(0, ROWS)
    vectors[[17, 300]] = vectors[5]
    vectors[41] = vectors[40]
    keys = np.stack(np.divmod(np.arange(ROWS), 10), axis=1)
    return payload_of(tmp_path_factory.mktemp("payload") / "p", vectors, keys)


@pytest.fixture(scope="module")
def space(payload):
    return Space.fit(payload.take(np.arange(200)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, payload, space):
    return Saved(tmp_path_factory.mktemp("saved"), payload, space)


@pytest.fixture
def fresh(saved, tmp_path):
    """A function that opens an index of its own, in memory alone or in a folder."""
    opened = []

    def make(kind, folder=None):
        index = Index.open(saved[kind])
        if folder is None:
            index._growth._journal = None
        else:
            index.save(tmp_path / folder)
        opened.append(index)
        return index

    yield make
    for index in opened:
        index.close()


def finds(index, vectors, ids, keys):
    found = index.search(index.space.apply(vectors), 1)
    np.testing.assert_array_equal(found.ids[:, 0], ids)
    np.testing.assert_array_equal(found.keys[:, 0], keys)
    clipped = 0.2 if index.kind == "ivf_sq8" else 1e-5  # where a component is beyond those that it was trained on
    assert np.abs(found.scores - 1).max() <= index.score_error + clipped


@pytest.mark.parametrize("kind", KINDS)
def test_added_rows_are_found_and_removed_ones_are_not(fresh, payload, kind):
    index = fresh(kind)
    assert len(index) == index.total == ROWS
    new, keys = vectors_of(1, 150), keys_of(1000, 150)
    for first in (0, 50, 51, 60):  # one at once, and several
        last = {0: 50, 50: 51, 51: 60, 60: 150}[first]
        ids = index.add(new[first:last], keys[first:last])
        assert ids.dtype == np.int64 and ids.tolist() == list(range(ROWS + first, ROWS + last))
    assert len(index) == index.total == ROWS + 150
    finds(index, new, np.arange(ROWS, ROWS + 150), keys)
    finds(index, payload.take([60, 61]), [60, 61], payload.keys[[60, 61]])

    gone = np.array([0, 60, 119, 200, ROWS - 1, ROWS, ROWS + 50, ROWS + 149])
    assert index.remove(np.concatenate([payload.keys, keys])[gone]) == 8
    assert len(index) == ROWS + 142 and index.total == ROWS + 150
    for queries in (QUERIES, index.space.apply(new), index.space.apply(payload.take(np.arange(ROWS)))):
        for found in (index.search(queries, 20), index.search(queries, ROWS, np.arange(ROWS - 3, ROWS + 5))):
            assert not np.isin(found.ids, gone).any() and (found.ids >= 0)[:, :10].all()
    whole = index.search(QUERIES, 2 * ROWS).ids
    groups = len(np.unique(payload.groups)) + 150 - 8
    assert ((whole >= 0).sum(axis=1) <= groups).all()
    assert kind == "hnsw" or ((whole >= 0).sum(axis=1) == groups).all()  # a graph need not lead everywhere

    with pytest.raises(InputError, match=r"key \(1000, 50\) is of no row"):
        index.remove(keys[[1, 50]])
    again = index.add(new[[50, 0]], keys[[50, 0]])
    assert again.tolist() == [ROWS + 150, ROWS + 151] and len(index) == ROWS + 144
    finds(index, new[[50, 0, 1]], [ROWS + 150, ROWS + 151, ROWS + 1], keys[[50, 0, 1]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_of_added_rows_are_excluded_too(fresh, kind):
    index, new = fresh(kind), vectors_of(1, 30)
    ids = index.add(new, keys_of(1000, 30))
    queries = index.space.apply(new)
    assert not (index.search(queries, 5, ids[:, None]).ids == ids[:, None]).any()
    assert not np.isin(index.search(queries, 50, ids).ids, ids).any()
    index.remove(keys_of(1000, 10))
    assert not np.isin(index.search(queries, 50, ids[:15]).ids, ids[:15]).any()
    with pytest.raises(
        InputError, match=f"exclude spans {ROWS + 30} to {ROWS + 30}: wanted are rows -1 to {ROWS + 29}"
    ):
        index.search(queries, 5, [ROWS + 30])


@pytest.mark.parametrize("kind", KINDS)
def test_a_duplicate_group_is_there_while_one_of_it_is(fresh, payload, kind):
    index = fresh(kind)
    vector = payload.take([5])
    for row, left in ((17, 5), (5, 300), (300, None)):
        index.remove(payload.keys[[row]])
        found = index.search(index.space.apply(vector), 3)
        if left is None:
            assert not np.isin(found.ids, [5, 17, 300]).any() and found.scores[0, 0] < 0.9
        else:
            assert found.ids[0, 0] == left and (found.keys[0, 0] == payload.keys[left]).all()
            for excluded in (5, 17, 300):
                assert not np.isin(index.search(index.space.apply(vector), 5, [excluded]).ids, [5, 17, 300]).any()
    finds(index, payload.take([41]), [40], payload.keys[[40]])
    index.remove(payload.keys[[40]])
    finds(index, payload.take([40]), [41], payload.keys[[41]])
    (new,) = index.add(payload.take([40]), payload.keys[[40]])  # a group of its own, as alike as may be
    assert set(index.search(index.space.apply(payload.take([40])), 2).ids[0]) == {41, new}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_found_where_everything_was_removed(fresh, payload, kind, tmp_path):
    index = fresh(kind, "a")
    index.add(vectors_of(1, 5), keys_of(1000, 5))
    index.remove(payload.keys)
    assert (np.sort(index.search(QUERIES, 9).ids, axis=1)[:, -5:] == np.arange(ROWS, ROWS + 5)).all()
    index.remove(keys_of(1000, 5))
    assert len(index) == 0
    index.save(tmp_path / "b")
    for one in (index, Index.open(tmp_path / "a"), Index.open(tmp_path / "b")):
        for found in (one.search(QUERIES, 9), one.search(QUERIES, 9, [3, ROWS + 1])):
            assert (found.ids == -1).all() and np.isneginf(found.scores).all() and (found.keys == -1).all()
    index.add(vectors_of(2, 3), payload.keys[:3])
    finds(index, vectors_of(2, 3), np.arange(ROWS + 5, ROWS + 8), payload.keys[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_keeps_every_change(fresh, payload, kind, tmp_path):
    """Opened again, saved again and opened again it finds the same, to the last bit."""
    index = fresh(kind, "a")
    for i in range(8):
        index.add(vectors_of(i, 1 + 20 * (i % 3)), keys_of(1000 + i, 1 + 20 * (i % 3)))
        index.remove(payload.keys[[i, 40 * i + 9]])
        index.remove(keys_of(1000 + i, 1))
    wanted = [index.search(QUERIES, 20), index.search(QUERIES, 20, [ROWS + 3, 77])]
    replayed = Index.open(tmp_path / "a")
    index.save(tmp_path / "b")
    reopened = Index.open(tmp_path / "b", payload)
    for one in (replayed, index, reopened):
        assert (len(one), one.total, one.id) == (len(index), index.total, index.id)
        assert same(one.search(QUERIES, 20), wanted[0]) and same(one.search(QUERIES, 20, [ROWS + 3, 77]), wanted[1])
    report = Index.verify(tmp_path / "a")
    assert (report.rows, report.added, report.removed) == (len(index), index.total - ROWS, index.total - len(index))
    assert (report.records, report.unfinished) == (24, 0)
    assert vars(Index.verify(tmp_path / "b")) == vars(report) | {"records": 0}
    more = vectors_of(50, 7)
    for one in (index, reopened):  # they go on alike, one after the other
        one.add(more, keys_of(2000, 7))
        one.remove(keys_of(2000, 2))
        one.close()
        assert same(one.search(QUERIES, 20), Index.open(tmp_path / "b").search(QUERIES, 20))
        one.remove(keys_of(2000, 7)[2:])
        one.close()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_is_what_filtering_leaves(fresh, payload, space, kind):
    """Of the same lists or candidates: a removal changes neither."""
    few = {"nlist": 8, "nprobe": 2} if kind in LISTS else {}
    index = Index.build(payload, kind, space=space, recall=0.9, **few)
    everything = index.search(QUERIES, ROWS)
    gone = np.random.default_rng(3).choice(ROWS, 150, replace=False)
    gone = gone[~np.isin(gone, [5, 17, 300, 40, 41])]
    index.remove(payload.keys[gone])
    found = index.search(QUERIES, 30)
    for i in range(len(QUERIES)):
        kept = ~np.isin(everything.ids[i], gone)
        if kind in ("hnsw", "ivf_rabitq"):
            assert np.isin(found.ids[i], everything.ids[i][kept][:60]).mean() > 0.9
        else:
            np.testing.assert_array_equal(found.ids[i], everything.ids[i][kept][:30])
            np.testing.assert_allclose(found.scores[i], everything.scores[i][kept][:30], atol=1e-6)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_one_built_of_the_rows_that_are_there(fresh, payload, space, tmp_path, kind, seed):
    index, rng = fresh(kind), np.random.default_rng(seed)
    rows = {
        tuple(key): vector for key, vector in zip(payload.keys.tolist(), payload.take(np.arange(ROWS)), strict=True)
    }
    for step in range(12):
        keys = np.stack([rng.integers(40, 60, 9), rng.integers(0, 9, 9)], axis=1)
        keys = np.array(sorted({tuple(key) for key in keys.tolist()} - set(rows)), int).reshape(-1, 2)
        vectors = vectors_of([seed + 1, step + 1], len(keys))
        index.add(vectors, keys)
        rows |= {tuple(key): vector for key, vector in zip(keys.tolist(), vectors, strict=True)}
        drawn = rng.choice(len(rows), rng.integers(0, 30), replace=False)
        gone = [list(rows)[at] for at in drawn]
        assert index.remove(np.array(gone, int).reshape(-1, 2)) == len(gone)
        rows = {key: vector for key, vector in rows.items() if key not in gone}
    assert len(index) == len(rows)
    scratch = payload_of(tmp_path / "p", np.stack(list(rows.values())), np.array(list(rows)))
    wanted = Index.build(scratch, kind, space=space, **LISTS.get(kind, {})).search(QUERIES, 40)
    found = index.search(QUERIES, 40)
    np.testing.assert_array_equal(found.keys, wanted.keys)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=2e-6)


def test_a_graph_of_which_most_was_removed_finds_the_rest(fresh, payload):
    index = fresh("hnsw")
    index.remove(payload.keys[20:400])
    living = index.space.apply(payload.take(np.r_[:17, 18:20, 400:ROWS]))
    found = index.search(living, 10)
    assert (found.ids >= 0).all()
    exact = np.sort(living @ living.T, axis=1)[:, ::-1][:, :10]
    assert np.isclose(found.scores, exact, atol=1e-5).mean() > 0.97
    assert index._searcher._without.parameters.efSearch > 3 * index.ef_search


@pytest.mark.parametrize(
    ("vectors", "keys", "message"),
    [
        (vectors_of(1, 2), keys_of(41, 2), r"key \(41, 0\) is that of row 410: remove it first"),
        (vectors_of(1, 2), [[1000, 1], [1000, 1]], r"keys has \(1000, 1\) twice"),
        (vectors_of(1, 2), [[1000, 1]], "1 keys for 2 vectors"),
        (vectors_of(1, 2), [[1000, 1], [-1, 0]], "keys row 1 is"),
        (vectors_of(1, 2), [[1000.0, 1], [1, 0]], "keys have dtype float64"),
        (vectors_of(1, 2), [1000, 1], "keys have shape"),
        (vectors_of(1, 2)[:, 1:], keys_of(1000, 2), r"vectors have shape \[2, 23\], and \[m, 24\]"),
        (vectors_of(1, 2)[0], keys_of(1000, 1), "vectors have shape"),
        (np.ones((2, DIM), int), keys_of(1000, 2), "vectors have dtype int64"),
        (vectors_of(1, 2) * np.array([[1], [0]]), keys_of(1000, 2), "vectors row 1 is all zeros"),
        (vectors_of(1, 2) * np.array([[1], [np.nan]]), keys_of(1000, 2), "vectors row 1 holds a value"),
        (np.empty((0, DIM)), keys_of(1000, 2), "nothing to store|keys"),
    ],
)
def test_what_cannot_be_added_is_refused_whole(fresh, vectors, keys, message):
    index = fresh("flat", "a")
    before = index.search(QUERIES, 9)
    with pytest.raises(InputError, match=message):
        index.add(vectors, keys)
    assert len(index) == index.total == ROWS and same(index.search(QUERIES, 9), before)
    assert index.add(vectors_of(1, 1), [[1000, 1]]).tolist() == [ROWS]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([[0, 0], [42, 0]], r"key \(42, 0\) is of no row that is there"),
        ([[0, 0], [0, 1], [0, 0]], r"keys has \(0, 0\) twice"),
        ([[0, 0.5]], "keys have dtype float64"),
        ([0, 0], "keys have shape"),
        ([[0, -1]], "keys row 0 is"),
        (3, "keys have shape"),
    ],
)
def test_what_cannot_be_removed_is_refused_whole(fresh, keys, message):
    index = fresh("flat", "a")
    with pytest.raises(InputError, match=message):
        index.remove(keys)
    assert len(index) == ROWS and index.search(QUERIES, ROWS).ids.max() == ROWS - 1


def test_none_at_all_is_no_change(fresh, tmp_path):
    index = fresh("flat", "a")
    assert index.add(np.empty((0, DIM), np.float32), np.empty((0, 2), int)).shape == (0,)
    assert index.remove(np.empty((0, 2), int)) == 0
    assert not (tmp_path / "a" / "journal.bin").exists()


def test_vectors_not_of_length_one_are_divided_by_it_and_said_once(fresh, monkeypatch):
    monkeypatch.setattr(growth, "_WARNED", growth.threading.Event())
    index = fresh("flat")
    with pytest.warns(UserWarning, match="3 of 4 vectors have not length 1 and are divided by theirs") as caught:
        index.add(vectors_of(1, 4) * np.array([[1], [2], [0.5], [1e10]]), keys_of(1000, 4))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.add(vectors_of(2, 1) * 2, keys_of(1001, 1))
        index.add(vectors_of(3, 1).astype(np.float16), keys_of(1002, 1))
    finds(index, vectors_of(1, 4), np.arange(ROWS, ROWS + 4), keys_of(1000, 4))


def test_an_index_of_before_there_was_growth_is_read(saved, tmp_path):
    folder = tmp_path / "a"
    Index.open(saved["flat"]).save_copy(folder)
    content = json.loads((folder / "index.json").read_text())
    content = {name: value for name, value in content.items() if name not in ("added", "removed", "checksum")}
    content["version"] = 2
    (folder / "index.json").write_text(json.dumps(content | {"checksum": sha256_json(content)}))
    index = Index.open(folder)
    index.add(vectors_of(1, 1), [[1000, 0]])
    assert len(Index.open(folder)) == ROWS + 1 and Index.verify(folder).added == 1


@pytest.mark.parametrize(
    "change", [{"added": -1}, {"added": 1}, {"removed": 1}, {"removed": 3}, {"added": None}, {"removed": True}]
)
def test_counts_that_do_not_fit_are_refused(fresh, tmp_path, payload, change):
    index = fresh("flat", "a")
    index.remove(payload.keys[[3, 4]])
    index.save(tmp_path / "b")
    content = json.loads((tmp_path / "b" / "index.json").read_text()) | change
    content.pop("checksum")
    (tmp_path / "b" / "index.json").write_text(json.dumps(content | {"checksum": sha256_json(content)}))
    for read in (Index.open, Index.verify):
        with pytest.raises(IntegrityError):
            read(tmp_path / "b")
