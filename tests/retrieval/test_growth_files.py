"""What an index's folder holds of changes that were broken off, damaged, made by two, or could not be written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from growing import DIM, KINDS, QUERIES, ROWS, Saved, keys_of, payload_of, same, vectors_of

from fastlvm.errors import InputError, IntegrityError
from fastlvm.retrieval import Index, build, record
from fastlvm.retrieval.folder import journal as journal_of

LATEST = 4


@pytest.fixture(scope="module")
def payload(tmp_path_factory):
    keys = np.stack(np.divmod(np.arange(ROWS), 10), axis=1)
    return payload_of(tmp_path_factory.mktemp("payload") / "p", vectors_of(0, ROWS), keys)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, payload):
    return Saved(tmp_path_factory.mktemp("saved"), payload)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved["flat"], tmp_path / "i")


def changes(index, payload):
    """Four changes; for each, and for none, what there is then."""
    states = [(len(index), index.total, index.search(QUERIES, 9))]
    for change in (
        lambda: index.add(vectors_of(1, 3), keys_of(1000, 3)),
        lambda: index.remove(payload.keys[[7, 8]]),
        lambda: index.add(vectors_of(2, 1), keys_of(1001, 1)),
        lambda: index.remove(keys_of(1000, 2)),
    ):
        change()
        states.append((len(index), index.total, index.search(QUERIES, 9)))
    return states


def is_at(index, state):
    return (len(index), index.total) == state[:2] and same(index.search(QUERIES, 9), state[2])


def test_a_journal_cut_at_every_byte_opens_as_it_was_acknowledged(folder, payload):
    index = Index.open(folder)
    file, ends = folder / "journal.bin", [0]
    wrote, append = index._growth._journal, index._growth._journal.append
    wrote.append = lambda *given: (append(*given), ends.append(file.stat().st_size))
    states = changes(index, payload)
    index.close()
    whole = file.read_bytes()
    for length in range(len(whole) + 1):
        file.write_bytes(whole[:length])
        done = max(number for number, end in enumerate(ends) if end <= length)
        report = Index.verify(folder)
        assert (report.rows, report.records) == (states[done][0], done)
        assert report.unfinished == length - (max(ends[done], 76) if length >= 76 else 0)
        if length % 16 == 0 or length - 1 in ends:
            assert is_at(Index.open(folder), states[done])


def test_an_index_goes_on_after_a_change_that_was_cut_off(folder, payload):
    index = Index.open(folder)
    states = changes(index, payload)
    index.close()
    file = folder / "journal.bin"
    file.write_bytes(file.read_bytes()[:-1])
    index = Index.open(folder)
    assert is_at(index, states[LATEST - 1])
    index.remove(keys_of(1000, 2))
    assert is_at(index, states[LATEST]) and is_at(Index.open(folder), states[LATEST])
    assert Index.verify(folder).unfinished == 0


def test_every_damaged_byte_is_refused(folder, payload):
    index = Index.open(folder)
    changes(index, payload)
    index.close()
    file = folder / "journal.bin"
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        for read in (Index.verify, Index.open):
            with pytest.raises(IntegrityError, match=r"journal\.bin"):
                read(folder)


NONSENSE = {
    "of other rows": (b"ADD ", ROWS + 1, keys_of(1000, 1), vectors_of(1, 1), "follows on 421 rows, and there are 420"),
    "of an unknown kind": (b"MOVE", ROWS, keys_of(1000, 1), vectors_of(1, 1), "has 104 bytes for 1 rows of b'MOVE'"),
    "too short": (b"ADD ", ROWS, keys_of(1000, 1), vectors_of(1, 1)[:, 1:], "has 100 bytes for 1 rows"),
    "a key that is there": (b"ADD ", ROWS, keys_of(3, 1), vectors_of(1, 1), "adds keys that are there already"),
    "a key twice": (b"ADD ", ROWS, keys_of(1000, 2) * [1, 0], vectors_of(1, 2), "adds keys that are there already"),
    "a key below 0": (b"ADD ", ROWS, -keys_of(1000, 1), vectors_of(1, 1), "adds keys that are there already"),
    "no number": (b"ADD ", ROWS, keys_of(1000, 1), vectors_of(1, 1) * np.float32("nan"), "that are not finite"),
    "rows that never were": (b"GONE", ROWS, np.array([ROWS]), None, "removes rows that are not there"),
    "a row below 0": (b"GONE", ROWS, np.array([-1]), None, "removes rows that are not there"),
    "a row twice": (b"GONE", ROWS, np.array([3, 3]), None, "removes rows that are not there"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_whole_record_that_makes_no_sense_is_refused(folder, name):
    kind, first, rows, vectors, says = NONSENSE[name]
    written = journal_of(folder, record.read(folder).checksum)
    written.lock()
    parts = [rows.astype("<i8" if vectors is None else "<i4").tobytes(), b"" if vectors is None else vectors.tobytes()]
    written.append(kind, first, len(rows), parts)
    written.close()
    for read in (Index.verify, Index.open):
        with pytest.raises(IntegrityError, match=rf"journal\.bin record 1 .*{says}"):
            read(folder)


def test_the_journal_of_another_index_is_refused(folder, saved, tmp_path, payload):
    index = Index.open(folder)
    changes(index, payload)
    other = shutil.copytree(saved["ivf_flat"], tmp_path / "other")
    shutil.copy(folder / "journal.bin", other)
    for read in (Index.verify, Index.open):
        with pytest.raises(IntegrityError, match="is the journal of another index"):
            read(other)


@pytest.mark.parametrize("file", ["index.faiss", "keys.npy", "groups.npy", "removed.npy", "index.json"])
def test_verify_names_the_file_that_is_damaged(folder, payload, tmp_path, file):
    index = Index.open(folder)
    changes(index, payload)
    index.save(tmp_path / "b")
    assert Index.verify(tmp_path / "b").rows == len(index)
    data = bytearray((tmp_path / "b" / file).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "b" / file).write_bytes(data)
    with pytest.raises(IntegrityError, match=file.replace(".", r"\.")):
        Index.verify(tmp_path / "b")
    with pytest.raises(InputError, match="holds no index"):
        Index.verify(tmp_path)


def test_two_that_change_a_folder_take_turns(folder, payload):
    """Who comes second knows what the first has done."""
    one, other = Index.open(folder), Index.open(folder)
    one.add(vectors_of(1, 2), keys_of(1000, 2))
    with pytest.raises(InputError, match="is being changed by another process or another object"):
        other.add(vectors_of(2, 1), keys_of(1001, 1))
    assert len(other) == ROWS and len(Index.open(folder)) == ROWS + 2
    one.close()
    assert other.add(vectors_of(2, 1), keys_of(1001, 1)).tolist() == [ROWS + 2]
    with pytest.raises(InputError, match=r"key \(1000, 0\) is that of row 420"):
        other.add(vectors_of(2, 1), keys_of(1000, 1))
    other.remove(payload.keys[:1])
    other.close()
    with pytest.raises(InputError, match=r"key \(0, 0\) is of no row"):
        one.remove(payload.keys[:1])
    assert same(one.search(QUERIES, 9), other.search(QUERIES, 9)) and (len(one), one.total) == (ROWS + 2, ROWS + 3)


def test_an_index_belongs_to_where_it_was_saved_last(folder, payload, tmp_path):
    built = Index.build(payload, "flat")
    built.add(vectors_of(1, 1), keys_of(1000, 1))  # in memory alone
    built.save(tmp_path / "a")
    built.add(vectors_of(2, 1), keys_of(1001, 1))
    built.save_copy(tmp_path / "copy")
    built.add(vectors_of(3, 1), keys_of(1002, 1))
    built.save(tmp_path / "b")
    built.add(vectors_of(4, 1), keys_of(1003, 1))
    rows = {name: Index.verify(tmp_path / name) for name in ("a", "copy", "b")}
    assert [(one.rows - ROWS, one.records) for one in rows.values()] == [(3, 2), (2, 0), (4, 1)]
    other = Index.open(tmp_path / "a")
    other.remove(keys_of(1000, 1))  # nobody else holds it


def test_a_folder_that_became_another_is_left_alone(folder, payload, tmp_path):
    index = Index.open(folder)
    shutil.rmtree(folder)
    Index.build(payload, "flat", seed=1).save(folder)
    with pytest.raises(InputError, match="is not what it was when this index was opened"):
        index.add(vectors_of(1, 1), keys_of(1000, 1))
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="holds no index"):
        index.add(vectors_of(1, 1), keys_of(1000, 1))
    index.save(folder)
    index.add(vectors_of(1, 1), keys_of(1000, 1))
    folder.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="was moved or removed"):
        index.remove(keys_of(1000, 1))
    assert len(index) == len(Index.open(tmp_path / "moved")) == ROWS + 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_the_index_as_it_was(saved, tmp_path, payload, kind, monkeypatch):
    folder = shutil.copytree(saved[kind], tmp_path / "i")
    index = Index.open(folder)
    index.add(vectors_of(1, 2), keys_of(1000, 2))
    before = index.search(QUERIES, 9)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("fastlvm.retrieval.journal.os.fsync", full)
        for change in (lambda: index.add(vectors_of(2, 2), keys_of(1001, 2)), lambda: index.remove(keys_of(1000, 2))):
            with pytest.raises(InputError, match=r"journal\.bin cannot be written .No space left"):
                change()
    assert same(index.search(QUERIES, 9), before) and len(index) == ROWS + 2
    assert Index.verify(folder).rows == ROWS + 2
    assert index.add(vectors_of(2, 2), keys_of(1001, 2)).tolist() == [ROWS + 2, ROWS + 3]
    assert len(Index.open(folder)) == ROWS + 4


@pytest.mark.parametrize("at", ["extend", "add", "publish"])
def test_a_change_that_breaks_off_in_memory_is_not_in_the_folder(folder, monkeypatch, at):
    index = Index.open(folder)
    index.add(vectors_of(1, 1), keys_of(1000, 1))

    def broken(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(build.KINDS["flat"] if at == "add" else type(index._rows), at, broken)
        with pytest.raises(MemoryError):
            index.add(vectors_of(2, 1), keys_of(1001, 1))
    for change in (lambda: index.remove(keys_of(1000, 1)), lambda: index.save(folder.parent / "b")):
        with pytest.raises(InputError, match="broken off midway: open it again"):
            change()
    assert index.search(QUERIES, 9).ids.max() <= ROWS + (at == "publish")  # it still searches
    index.close()
    again = Index.open(folder)
    assert len(again) == ROWS + 1 and again.add(vectors_of(2, 1), keys_of(1001, 1)).tolist() == [ROWS + 1]


FORK = f"""
import os, sys
import numpy as np
from fastlvm.errors import InputError
from fastlvm.retrieval import Index
index = Index.open(sys.argv[1])
vectors = np.eye({DIM}, dtype=np.float32)
index.add(vectors[:1], [[1000, 0]])
child = os.fork()
if not child:
    try:
        index.add(vectors[1:2], [[1000, 1]])
    except InputError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
index.add(vectors[1:2], [[1000, 1]])
print(index.total, flush=True)
"""


def test_the_child_of_a_fork_does_not_write_as_its_parent(folder):
    done = subprocess.run([sys.executable, "-c", FORK, str(folder)], capture_output=True, text=True, timeout=60)
    said = done.stdout.splitlines()
    assert "is of the process that this one was forked from: open it again" in said[0], done
    assert said[1] == str(ROWS + 2) and Index.verify(folder).rows == ROWS + 2
