"""What a journal keeps of records that were cut off, damaged, exchanged or not written."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest

from fastlvm.errors import InputError, IntegrityError
from fastlvm.retrieval import journal
from fastlvm.retrieval.journal import Journal

OWNER = bytes(range(32))
BEGIN = 76  # bytes before the first record


def body(number, size):
    return np.random.default_rng(number).bytes(size)


def filled(file, sizes=(40, 700, 8, 300)):
    """A closed journal of one record for each size, and where each ends."""
    written, ends = Journal(file, OWNER), []
    written.lock()
    for number, size in enumerate(sizes):
        data = body(number, size)
        written.append(b"ADD ", 10 * number, number + 1, [data[:5], memoryview(data)[5:]])
        ends.append(file.stat().st_size)
    written.close()
    return ends


def read(file, owner=OWNER):
    return list(Journal(file, owner).read())


def test_records_come_back_as_they_were(tmp_path):
    file = tmp_path / "journal.bin"
    assert read(file) == []
    filled(file)
    for number, record in enumerate(read(file)):
        assert record == (b"ADD ", 10 * number, number + 1, body(number, (40, 700, 8, 300)[number]), number + 1)


def test_reading_goes_on_where_it_was(tmp_path):
    file = tmp_path / "journal.bin"
    reader, writer = Journal(file, OWNER), Journal(file, OWNER)
    writer.lock()
    for number in range(3):
        assert list(reader.read()) == []
        writer.append(b"GONE", number, 1, [b"x" * 8])
        assert [record.number for record in reader.read()] == [number + 1] and reader.mark == writer.mark
    assert [record.first for record in read(file)] == [0, 1, 2]


def test_cut_at_every_byte_it_holds_what_was_whole_and_goes_on(tmp_path):
    file, cut = tmp_path / "journal.bin", tmp_path / "cut.bin"
    ends = filled(file, (40, 90, 8))
    whole = file.read_bytes()
    for length in range(len(whole) + 1):
        cut.write_bytes(whole[:length])
        found = Journal(cut, OWNER)
        kept = sum(end <= length for end in ends)
        assert len(list(found.read())) == kept
        assert found.unfinished == length - max(
            [end for end in ends if end <= length], default=length - found.unfinished
        )
        found.lock()
        found.append(b"GONE", 7, 1, [b"after"])
        found.close()
        again = read(cut)
        assert len(again) == kept + 1 and again[-1].body == b"after" and again[:-1] == read(file)[:kept]


@pytest.mark.parametrize("longer", [0, 1, 5000])
def test_zeros_to_the_end_are_what_was_not_written(tmp_path, longer):
    """From the end of a record on, or from where a sector begins."""
    file, cut = tmp_path / "journal.bin", tmp_path / "cut.bin"
    ends = filled(file, (40, 1500, 8, 700))
    whole = file.read_bytes()
    for length in range(len(whole)):
        cut.write_bytes(whole[:length] + bytes(len(whole) - length + longer))
        kept = sum(end <= length for end in ends)
        try:
            found = len(read(cut))
        except IntegrityError as error:
            assert length % 512 and length not in (0, BEGIN, *ends), length
            assert f"record {kept + 1} " in str(error) or length < BEGIN
        else:
            assert found == kept or not whole[length : ends[kept]].strip(b"\0")


def test_every_damaged_byte_is_refused(tmp_path):
    file = tmp_path / "journal.bin"
    ends = filled(file, (40, 90, 8))
    whole = file.read_bytes()
    for place in range(len(whole)):
        for change in (0x01, 0x80, 0x55):
            damaged = bytearray(whole)
            damaged[place] ^= change
            file.write_bytes(damaged)
            number = 1 + sum(end <= place for end in ends)
            with pytest.raises(IntegrityError, match=r"damaged|version|another index") as caught:
                read(file)
            assert str(file) in str(caught.value) and (place < BEGIN or f"record {number} " in str(caught.value))


def test_records_left_out_exchanged_or_repeated_are_refused(tmp_path):
    file = tmp_path / "journal.bin"
    ends = [BEGIN, *filled(file, (40, 40, 40, 40))]
    whole = file.read_bytes()
    pieces = [whole[first:last] for first, last in itertools.pairwise(ends)]
    for order in ((0, 2, 3), (0, 2, 1, 3), (0, 1, 1, 2, 3), (1, 2, 3), (0, 1, 2, 3, 3)):
        file.write_bytes(whole[:BEGIN] + b"".join(pieces[number] for number in order))
        with pytest.raises(IntegrityError, match="is damaged, its SHA-256 does not fit"):
            read(file)
    file.write_bytes(whole[:BEGIN] + b"".join(pieces[:2]))
    assert len(read(file)) == 2


def test_the_journal_of_something_else_is_refused(tmp_path):
    file = tmp_path / "journal.bin"
    filled(file)
    with pytest.raises(IntegrityError, match="is the journal of another index"):
        read(file, bytes(32))
    file.write_bytes(b"something else altogether" * 9)
    with pytest.raises(IntegrityError, match="damaged head"):
        read(file)


def test_what_was_read_and_is_gone_is_noticed(tmp_path):
    file = tmp_path / "journal.bin"
    filled(file)
    found = Journal(file, OWNER)
    list(found.read())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(IntegrityError, match=r"has 100 bytes, and .* were read before"):
        list(found.read())
    file.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        list(found.read())


def test_one_writer_at_a_time(tmp_path):
    file = tmp_path / "journal.bin"
    one, other = Journal(file, OWNER), Journal(file, OWNER)
    one.lock()
    with pytest.raises(InputError, match="is being changed by another process or another object"):
        other.lock()
    one.close()
    other.lock()
    del other
    gc.collect()
    one.lock()
    one.close()


CHILD = """
import os, sys, time
from pathlib import Path
from fastlvm.retrieval.journal import Journal
from fastlvm.errors import InputError
journal = Journal(Path(sys.argv[1]), bytes(range(32)))
journal.lock()
journal.append(b"ADD ", 0, 1, [b"parent"])
child = os.fork()
if not child:
    assert not journal.locked
    try:
        journal.lock()
    except InputError:
        os.write(1, b"refused\\n")
    sys.stdin.readline()
    journal.lock()
    list(journal.read())
    journal.append(b"ADD ", 1, 1, [b"child"])
    os.write(1, b"child wrote\\n")
    os._exit(0)
os.write(1, b"locked\\n")
time.sleep(60)
"""


def test_another_process_and_the_child_of_a_fork(tmp_path):
    """The child has not its parent's lock: neither to write with, nor to keep others out once the parent is gone."""
    file = tmp_path / "journal.bin"
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert {process.stdout.readline().strip() for _ in range(2)} == {"refused", "locked"}
    here = Journal(file, OWNER)
    with pytest.raises(InputError, match="another process"):
        here.lock()
    process.kill()
    process.wait()
    here.lock()
    here.close()
    process.stdin.write("go on\n")
    process.stdin.flush()
    assert process.stdout.readline().strip() == "child wrote"
    assert [record.body for record in read(file)] == [b"parent", b"child"]
    process.stdin.close()
    process.stdout.close()


@pytest.mark.parametrize("where", ["write", "fsync", "truncate"])
def test_a_full_disk_leaves_what_there_was(tmp_path, monkeypatch, where):
    file = tmp_path / "journal.bin"
    ends = filled(file)
    found = Journal(file, OWNER)
    list(found.read())
    found.lock()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if where == "write":
            write, calls = journal._write, []
            patch.setattr(journal, "_write", lambda *given: (calls.append(0), write(*given), len(calls) > 2 and full()))
        elif where == "fsync":
            patch.setattr(journal.os, "fsync", full)
        else:
            patch.setattr(journal, "_write", full)
            patch.setattr(Journal, "cut", full)
        with pytest.raises(InputError, match=f"{file}.* cannot be written .No space left.*nothing was changed"):
            found.append(b"ADD ", 1, 1, [b"x" * 100])
    assert file.stat().st_size == ends[-1] and len(read(file)) == 4
    found.append(b"ADD ", 1, 1, [b"y" * 100])
    assert read(file)[-1].body == b"y" * 100 and len(read(file)) == 5


def test_a_file_that_may_not_grow(tmp_path):
    """The system's own refusal, amid a record."""
    file = tmp_path / "journal.bin"
    ends = filled(file)
    found = Journal(file, OWNER)
    list(found.read())
    found.lock()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ends[-1] + 50, before[1]))
    try:
        with pytest.raises(InputError, match="cannot be written"):
            found.append(b"ADD ", 1, 1, [b"x" * 100])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.stat().st_size == ends[-1]
    found.append(b"ADD ", 1, 1, [b"x" * 100])
    assert len(read(file)) == 5


def test_a_folder_that_was_moved_is_not_written_to(tmp_path):
    (tmp_path / "a").mkdir()
    found = Journal(tmp_path / "a" / "journal.bin", OWNER)
    found.lock()
    found.append(b"ADD ", 0, 1, [b"x"])
    (tmp_path / "a").rename(tmp_path / "b")
    for _ in range(2):
        with pytest.raises(InputError, match="was moved or removed since it was opened"):
            found.append(b"ADD ", 1, 1, [b"x"])
        shutil.copytree(tmp_path / "b", tmp_path / "a", dirs_exist_ok=True)
    found.close()
    with pytest.raises(InputError, match="cannot be written"):
        Journal(tmp_path / "c" / "journal.bin", OWNER).lock()


def test_taking_back(tmp_path):
    file = tmp_path / "journal.bin"
    found = Journal(file, OWNER)
    found.lock()
    nothing = found.mark
    found.append(b"ADD ", 0, 1, [b"one"])
    one = found.mark
    found.append(b"ADD ", 1, 1, [b"two"])
    found.cut(one)
    assert [record.body for record in read(file)] == [b"one"]
    found.append(b"ADD ", 1, 1, [b"other"])
    assert [record.body for record in read(file)] == [b"one", b"other"]
    found.cut(nothing)
    assert read(file) == []
    found.append(b"ADD ", 0, 1, [b"new"])
    assert [record.body for record in read(file)] == [b"new"]
