"""Files of inverted lists of RaBitQ codes with a tail and without removed rows, read or left on disk."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from growing import DIM, LISTS, QUERIES, ROWS, keys_of, payload_of, vectors_of
from rabitq_grown import ISAS, SIZES, SMALL, Grown
from rabitq_plain import Plain, normal, same

from fastlvm import _C
from fastlvm.errors import IntegrityError
from fastlvm.retrieval import Index, rabitq
from fastlvm.retrieval.rabitq import IvfRabitq
from fastlvm.retrieval.searcher import Shape


@pytest.fixture
def small_tail(monkeypatch):
    monkeypatch.setattr(rabitq, "TAIL", SMALL)


def changed(lists=True, tail=True, left_behind=True):
    """A searcher from which rows of lists were removed, of the tail, and of a tail that was put into lists since."""
    grown = Grown()
    if left_behind:
        grown.add(6)
        grown.remove([1, sum(SIZES) + 2])
        grown.add(4)
    grown.add(7)
    if lists:
        grown.remove([0, 5, sum(SIZES) - 1])
    if tail:
        grown.remove(grown.there[[-1, -4]])
    return grown


def saved(grown, folder):
    folder.mkdir()
    grown.searcher.save(folder)
    return folder


def reopened(grown, folder, mapped=False, gone=None):
    """From its files, as an index would open it."""
    gone = len(grown.gone) if gone is None else gone
    searcher = IvfRabitq.open(folder, Shape(grown.rows.shape[1], len(grown.rows), len(SIZES), 3, gone), mapped)
    if grown.gone:
        searcher.remove(np.array(sorted(grown.gone)))
    found = Grown.__new__(Grown)
    found.searcher, found.rows, found.gone = searcher, grown.rows, set(grown.gone)
    return found


def hashes(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def alike(one, other):
    """They answer the same to the last bit, in any search."""
    queries = normal(5, 37, seed=1)
    for isa in ISAS:
        _C.set_isa(isa)
        assert same(one.found(queries), other.found(queries))
        assert same(one.found(queries[:1], 3), other.found(queries[:1], 3))
        for setting in (1, 3, 5):
            one.searcher.setting = other.searcher.setting = setting
            for exclude in (None, np.tile([3, len(one.rows) - 2], (5, 1))):
                assert same(one.searcher.search(queries, 6, exclude), other.searcher.search(queries, 6, exclude))
    assert one.searcher.error == other.searcher.error


CHANGES = [(lists, tail, left) for lists in (False, True) for tail in (False, True) for left in (False, True)]


@pytest.mark.parametrize("mapped", (False, True), ids=("read", "mapped"))
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_what_is_opened_answers_as_what_was_saved(small_tail, tmp_path, changes, mapped):
    grown = changed(*changes)
    opened = reopened(grown, saved(grown, tmp_path / "a"), mapped)
    assert opened.sizes == grown.sizes and grown.sizes[1] == 7
    alike(opened, grown)
    opened.holds()
    for count in (1, 3, 30):  # and goes on alike, across the fold too
        for one in (opened, grown):
            one.add(count)
            one.remove(one.there[[2, -1]])
        alike(opened, grown)
        assert opened.sizes == grown.sizes
    opened.holds()
    assert hashes(saved(opened, tmp_path / "b")) == hashes(saved(grown, tmp_path / "c"))


def test_files_say_how_many_rows_the_tail_has_and_keep_them_as_they_came(small_tail, tmp_path):
    grown = changed()
    folder = saved(grown, tmp_path / "a")
    assert {file.name for file in folder.iterdir()} == set(IvfRabitq.FILES)
    sizes, tail = np.load(folder / "sizes.npy"), np.load(folder / "tail.npy")
    assert len(sizes) == len(SIZES) + 1 and sizes[-1] == 7 and sizes.sum() == len(grown.rows) - 2
    assert sizes[:-1].tolist() == grown.searcher._parts["sizes"].tolist()
    moved = Plain(grown.searcher).moved(grown.rows[-7:])  # what was removed among them
    assert tail.dtype == np.float32 and tail.tobytes() == moved.tobytes()


@pytest.mark.parametrize("mapped", (False, True), ids=("read", "mapped"))
def test_more_rows_missing_than_were_removed_are_refused(small_tail, tmp_path, mapped):
    grown = changed()
    folder = saved(grown, tmp_path / "a")
    for gone in (2, 3, 70):
        reopened(grown, folder, mapped, gone)
    for gone in (0, 1):
        with pytest.raises(IntegrityError, match=f"lists that do not have {len(grown.rows) - gone} rows together"):
            reopened(grown, folder, mapped, gone)


def test_a_file_on_disk_is_not_changed(small_tail, tmp_path):
    """By no removal, nor by what is done with the lists after it; and who opens it afterwards finds all of it."""
    grown = changed()
    folder = saved(grown, tmp_path / "a")
    before = hashes(folder)
    one, other = reopened(grown, folder, mapped=True), reopened(grown, folder, mapped=True)
    one.remove(one.there[[3, 30, -2]])
    one.holds()
    alike(other, grown)  # each has its own
    one.add(9)
    one.remove(one.there[:40])
    one.holds()
    assert hashes(folder) == before
    alike(reopened(grown, folder, mapped=True), grown)
    alike(other, grown)


def test_what_is_mapped_is_saved_as_what_was_read(small_tail, tmp_path):
    grown = changed()
    folder = saved(grown, tmp_path / "a")
    for mapped in (False, True):
        again = saved(reopened(grown, folder, mapped), tmp_path / f"b{mapped}")
        assert hashes(again) == hashes(folder)


def test_large_files_are_left_on_disk(small_tail, tmp_path):
    grown = changed()
    folder = saved(grown, tmp_path / "a")
    for mapped in (False, True):
        parts = reopened(grown, folder, mapped).searcher._parts
        on_disk = {name for name, array in parts.items() if isinstance(array, np.memmap)}
        assert on_disk == ({"blocks", "codes"} if mapped else set())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of an index with added rows, some of which were removed."""
    base = tmp_path_factory.mktemp("index")
    payload = payload_of(base / "p", vectors_of(0, ROWS), keys_of(0, ROWS))
    index = Index.build(payload, "ivf_rabitq", **LISTS["ivf_rabitq"])
    index.add(vectors_of(1, 60), keys_of(1, 60))
    index.remove(np.concatenate([keys_of(0, 30), keys_of(1, 9)]))
    index.save(base / "a")
    index.close()
    return base / "a"


def test_an_index_left_on_disk_finds_and_changes_as_one_that_is_read(folder, tmp_path):
    before = hashes(folder)
    read, mapped = Index.open(folder), Index.open(folder, mapped=True)
    for index, name in ((read, "read"), (mapped, "mapped")):
        index.save(tmp_path / name)
    assert hashes(folder) == before
    for step in range(3):
        for index in (read, mapped):
            index.add(vectors_of(5 + step, 20), keys_of(5 + step, 20))
            index.remove(np.concatenate([keys_of(0, 60)[30 + 9 * step :][:9], keys_of(5 + step, 3)]))
        for isa in ISAS:
            _C.set_isa(isa)
            for exclude in (None, [3, 100, ROWS + 12, ROWS + 70]):
                assert same(mapped.search(QUERIES, 30, exclude), read.search(QUERIES, 30, exclude))
    opened = [Index.open(tmp_path / name, mapped=name == "mapped") for name in ("read", "mapped")]
    for index in opened:
        assert (len(index), index.dim) == (ROWS + 60 + 60 - 39 - 36, DIM)
        assert same(index.search(QUERIES, 500), read.search(QUERIES, 500))
