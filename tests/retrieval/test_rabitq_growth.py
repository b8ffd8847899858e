"""Inverted lists of RaBitQ codes that grow and shrink: what is found, against numpy in float64 over the same rows."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from rabitq_grown import ISAS, SIZES, SMALL, Grown
from rabitq_plain import Plain, normal, same, search

from fastlvm import _C
from fastlvm.retrieval import rabitq


@pytest.fixture
def small_tail(monkeypatch):
    monkeypatch.setattr(rabitq, "TAIL", SMALL)


STEPS = {
    "one at a time": [1] * 20,
    "until the tail is full": [5, 3],
    "all of the tail at once": [8],
    "one more than the tail has room for": [9],
    "one more, of a full tail": [8, 1, 8, 1],
    "many more": [30, 2, 70, 8, 1],
    "across the fold": [5, 5, 5, 5],
}


@pytest.mark.parametrize("dim", (5, 37, 100))
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_rows_are_found_from_when_they_are_added(small_tail, dim, steps):
    grown = Grown(dim)
    lists, tail = sum(SIZES), 0
    for count in steps:
        grown.add(count)
        grown.holds()
        lists, tail = (lists + tail + count, 0) if tail + count > SMALL else (lists, tail + count)
        assert grown.sizes == (lists, tail)


@pytest.mark.parametrize("dim", (5, 37))
def test_removed_rows_never_come_back(small_tail, dim):
    grown = Grown(dim)
    first = sum(SIZES)
    grown.remove([0, 2, 39, first - 1])
    grown.holds()
    grown.add(6)
    grown.remove([first, first + 5, 40])  # two of the tail, one of a list
    grown.holds()
    assert grown.sizes == (first, 6)
    grown.add(3)  # they are left behind now
    grown.holds()
    assert grown.sizes == (first + 9 - 7, 0)
    grown.remove([1, first + 1, first + 8])  # of lists that were made of lists and a tail
    grown.add(2)
    grown.remove([first + 9])
    grown.holds()
    grown.add(20)
    grown.holds()
    assert grown.sizes == (len(grown.there), 0)
    np.testing.assert_array_equal(np.sort(grown.searcher._parts["ids"]), grown.there)


def test_a_whole_list_or_tail_may_be_removed(small_tail):
    grown = Grown()
    parts = grown.searcher._parts
    last = np.cumsum(parts["sizes"])
    for number in (2, 0, 4):
        grown.remove(parts["ids"][last[number] - parts["sizes"][number] : last[number]])
        grown.holds()
    grown.add(8)
    grown.remove(range(sum(SIZES), sum(SIZES) + 8))
    grown.holds()
    grown.add(1)
    grown.holds()
    assert grown.sizes == (len(grown.there), 0)


@pytest.mark.parametrize("tail", (0, 1, 8))
@pytest.mark.parametrize("more", (1, 8, 9, 40))
def test_all_rows_may_be_removed_and_others_added(small_tail, tail, more):
    grown = Grown()
    if tail:
        grown.add(tail)
    grown.remove(range(len(grown.rows)))
    grown.holds()
    assert not len(grown.there)
    grown.add(more)
    grown.holds()
    grown.remove(grown.there[: more // 2])
    grown.holds()
    grown.add(8)
    grown.add(8)
    grown.holds()


@pytest.mark.parametrize("seed", range(6))
def test_any_changes_leave_what_numpy_says(small_tail, seed):
    rng, grown = np.random.default_rng(seed), Grown(int(np.random.default_rng(seed).integers(1, 70)))
    for step in range(25):
        if rng.random() < 0.6:
            grown.add(int(rng.choice([1, 2, 3, 7, 8, 9, 20])), seed=1000 * seed)
        else:
            late = rng.random() < 0.5
            of = grown.there[-12:] if late else grown.there
            grown.remove(rng.choice(of, min(len(of), int(rng.integers(1, 9))), replace=False))
        grown.holds(ISAS[step % len(ISAS) :][:1])
    assert grown.gone and len(grown.there) > 10


def test_rows_in_lists_and_in_the_tail_have_the_same_scores(small_tail):
    """To the last bit, before and after they are put into lists."""
    grown, queries = Grown(100), normal(4, 100, seed=1)
    grown.add(7)
    grown.remove([5, sum(SIZES) + 2])

    def by_id(isa):
        _C.set_isa(isa)
        scores, ids = grown.found(queries)
        return [dict(zip(row.tolist(), of.tolist(), strict=True)) for row, of in zip(ids, scores, strict=True)]

    before = {isa: by_id(isa) for isa in ISAS}
    grown.add(2)
    assert grown.sizes[1] == 0
    for isa in ISAS:
        for old, new in zip(before[isa], by_id(isa), strict=True):
            assert len(old) == len(new) - 2 == sum(SIZES) + 7 - 2 + 1  # and -1 for none
            assert all(new[row] == score for row, score in old.items())


@pytest.mark.parametrize("dim", (16, 37, 100))
def test_rows_that_are_put_into_lists_are_coded_as_those_that_were_built(small_tail, dim):
    grown = Grown(dim)
    level = float(grown.searcher._parts["level"][0])
    for count in (5, 30, 4, 8, 8):
        grown.add(count)
        grown.remove(grown.there[[1, -1]])
    plain = Plain(grown.searcher)
    assert grown.sizes[1] == 8 and plain.level == level
    np.testing.assert_array_equal(plain.ids, grown.there[:-7])
    plain.codes(grown.rows[plain.ids])


def test_the_tail_has_room_for_4096_rows():
    grown = Grown(16, (30, 3))
    new = normal(4097, 16, seed=2)
    grown.searcher.add(new[:4096])
    assert grown.sizes == (33, 4096)
    grown.searcher.add(new[4096:])
    assert grown.sizes == (33 + 4097, 0)
    grown.rows = np.concatenate([grown.rows, new])
    grown.holds()


@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_excluded_of_lists_and_tail_is_what_filtering_would_leave(isa, threads):
    _C.set_isa(isa)
    grown, rng = Grown(), np.random.default_rng(0)
    grown.add(40)
    grown.remove([3, 60, 90, 100])
    queries, k, tail = normal(5, 37, seed=3), 9, np.arange(sum(SIZES), len(grown.rows))
    for candidates in (60, 2000):
        scores, ids = search(grown.searcher, queries, 45, 5, candidates, threads=threads)
        assert np.isin(ids, tail).sum() > 40 and not np.isin(ids, tail).all()
        chosen = np.stack([rng.permutation(row)[:20] for row in ids])
        chosen = np.ascontiguousarray(np.concatenate([chosen, chosen[:, :3], np.full((5, 2), -1)], axis=1))
        for excluded in (chosen, np.tile(tail, (5, 1)), np.tile(tail[:7], (5, 1))):
            got_scores, got = search(grown.searcher, queries, k, 5, candidates, excluded, threads)
            for i in range(5):
                kept = ~np.isin(ids[i], excluded[i])
                wanted = min(k, kept.sum())
                np.testing.assert_array_equal(got[i, :wanted], ids[i][kept][:k])
                np.testing.assert_array_equal(got_scores[i, :wanted], scores[i][kept][:k])
                assert not np.isin(got[i], excluded[i]).any()


@pytest.mark.parametrize("isa", ISAS)
def test_a_batch_finds_what_its_queries_find_alone(isa):
    _C.set_isa(isa)
    grown, queries = Grown(), normal(65, 37, seed=4)
    for count in (30, 33):
        grown.add(count)
    grown.remove([0, 80, 81, 120])
    for k, nprobe, candidates in ((5, 2, 12), (10, 5, 20), (3, 1, 7)):
        wanted = search(grown.searcher, queries, k, nprobe, candidates, threads=1)
        for threads in (1, 2, 3):
            for n in (2, 63, 64, 65):
                found = search(grown.searcher, queries[:n], k, nprobe, candidates, threads=threads)
                assert same(found, [part[:n] for part in wanted])
            for i in range(65):
                found = search(grown.searcher, queries[i : i + 1], k, nprobe, candidates, threads=threads)
                assert same(found, [part[i : i + 1] for part in wanted])


@pytest.mark.parametrize("isa", ISAS)
def test_the_tail_is_searched_whole_whatever_lists_are(isa):
    """Of rows like those that are looked for, and of which the list searched has none."""
    _C.set_isa(isa)
    dim = 64
    grown = Grown(dim, (50,) * 8)
    new = normal(1, dim, seed=5) + 0.5 * normal(300, dim, seed=6)
    new /= np.linalg.norm(new, axis=1, keepdims=True)
    for first in range(0, 300, 60):
        grown.searcher.add(new[first : first + 60])
    gone = np.arange(400, 420)
    grown.searcher.remove(gone)
    queries = normal(1, dim, seed=5) + 0.5 * normal(20, dim, seed=7)
    scores = queries.astype(np.float64) @ new.astype(np.float64).T
    scores[:, :20] = -np.inf
    grown.searcher.setting = 1
    _, found = grown.searcher.search(queries, 10)
    for i in range(len(queries)):
        worst = np.sort(scores[i])[-10]
        assert (found[i] >= 420).all()
        assert (scores[i, found[i] - 400] >= worst - grown.searcher.error * np.linalg.norm(queries[i])).all()
    _, found = grown.searcher.search(new[20:], 1)
    np.testing.assert_array_equal(found[:, 0], np.arange(420, 700))


def test_a_model_and_the_search_in_one_call_search_the_tail_too():
    grown = Grown(24)
    grown.add(30)
    grown.remove([1, 90])
    model = _C.Model(2, 24, [("last", {}), ("linear", {"weight": (normal(24, 24, seed=8), None, None)})])
    for n in (1, 70):
        context, predicted = normal(n, 2, 24, seed=9), np.empty((n, 24), np.float32)
        model.run(context, predicted)
        for exclude in (None, np.tile(np.arange(60, 90), (n, 1))):
            wanted = grown.searcher.search(predicted, 12, exclude)
            assert n == 1 or (wanted[1] >= sum(SIZES)).any()
            for threads in (0, 1, 3):
                left = np.empty_like(predicted)
                assert same(grown.searcher.predict(model, context, left, 12, exclude, threads), wanted)
                assert left.tobytes() == predicted.tobytes()


def test_what_is_read_grows_with_the_tail():
    grown, queries = Grown(), normal(9, 37, seed=10)
    before = grown.searcher.reads(queries)
    grown.add(25)
    assert grown.searcher.reads(queries) == before + 25 * 37


def test_scores_are_as_far_off_as_those_of_the_longest_row_may_be():
    """Of lists or of the tail, and though the last one was removed."""
    grown = Grown()
    before = grown.searcher.error
    grown.searcher.add(grown.rows[:3] * np.array([[0.1], [100], [1]], np.float32))
    grown.searcher.remove(np.array([sum(SIZES) + 2]))
    assert grown.searcher.error > 50 * before
    grown.searcher.remove(np.array([sum(SIZES) + 1]))
    assert grown.searcher.error == before


def test_a_search_that_began_before_a_change_finds_what_was_there_then(small_tail):
    grown, queries = Grown(), normal(4, 37, seed=11)
    grown.add(5)
    grown.remove([2, 80])
    state = SimpleNamespace(_state=grown.searcher._state)

    def before():
        return search(state, queries, 90, 5, 90)

    wanted = before()
    grown.add(3)  # into the same tail
    assert same(before(), wanted)
    for count in (1, 9):
        grown.add(count)
        grown.remove([int(grown.there[3]), int(grown.there[-1])])
        assert same(before(), wanted)
    grown.holds()


@pytest.mark.parametrize("threads", (1, 3))
def test_searches_while_rows_come_and_go_find_what_was_there_at_some_time(small_tail, threads):
    """Whatever is there all the while is found, and nothing that is gone before, nor comes after."""
    grown, query = Grown(), normal(1, 37, seed=12)
    # Rows that there are, and of the first of them how many are gone; and then what these are about to become.
    added, removed = [len(grown.rows)], [0]
    ended, wrong, turns = threading.Event(), [], [0, 0, 0]

    def work(seat):
        while not ended.is_set() or not turns[seat]:
            least, gone = added[0], removed[0]
            _, ids = search(grown.searcher, query, 600, len(SIZES), 600, threads=threads)
            found, most_gone, most = ids[ids >= 0], removed[-1], added[-1]
            good = len(set(found)) == len(found) and (found >= gone).all() and (found < most).all()
            good = good and np.isin(np.arange(most_gone, least), found).all()
            if not good:
                wrong.append((seat, least, most, gone, most_gone, np.sort(found)))
            turns[seat] += 1

    workers = [threading.Thread(target=work, args=(seat,)) for seat in range(3)]
    for worker in workers:
        worker.start()
    for step in range(60):
        count = (1, 3, 8, 9)[step % 4]
        added.append(len(grown.rows) + count)
        grown.add(count)
        added[:] = [len(grown.rows)]
        if step % 3 == 0:
            removed.append(removed[0] + 4)
            grown.remove(range(removed[0], removed[0] + 4))
            removed[:] = [removed[0] + 4]
    ended.set()
    for worker in workers:
        worker.join(timeout=60)
    assert not wrong and not any(worker.is_alive() for worker in workers) and min(turns) > 0
    grown.holds()
