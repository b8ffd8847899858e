"""Atomic writes: after any crash the target is absent or whole, and the next writer clears what is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from fastlvm import files
from fastlvm.data import Payload, Windows
from fastlvm.errors import InputError, IntegrityError
from fastlvm.files import atomic_file, atomic_folder, read_json, sha256_file, sha256_json, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "file"
    with atomic_file(target) as path:
        path.write_text("half")
        assert not target.exists()
        path.write_text("whole")
    assert target.read_text() == "whole"
    assert names(target.parent) == ["file"]


def test_an_error_keeps_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as path:
        path.write_text("new")
        raise RuntimeError
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as path:
        (path / "a").write_text("a")
        raise RuntimeError
    assert names(tmp_path) == []


def test_a_folder_with_content_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as path:  # an empty one may be taken
        (path / "a").write_text("a")
    with pytest.raises(InputError, match="already holds something"), atomic_folder(tmp_path / "out"):
        pytest.fail("the body ran")
    assert names(tmp_path / "out") == ["a"]


def test_a_folder_made_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(InputError, match="meanwhile"), atomic_folder(tmp_path / "out") as path:
        (path / "a").write_text("mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "b").write_text("theirs")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["b"]


def test_wrong_kinds_of_target_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is a folder"), atomic_file(tmp_path / "folder"):
        pass
    with pytest.raises(InputError, match="is a file"), atomic_folder(tmp_path / "file"):
        pass
    with pytest.raises(InputError, match="cannot be made"), atomic_file(tmp_path / "file" / "x" / "y"):
        pass


@pytest.mark.parametrize("name", ["file", "odd [1]*?.npz"])
def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path, name):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    target = tmp_path / name
    dead, living = (tmp_path / f".{name}.tmp-0000-{pid}" for pid in (gone.pid, os.getpid()))
    dead.mkdir()
    (dead / "half").write_text("")
    living.write_text("")
    other = tmp_path / f".another.tmp-0000-{gone.pid}"
    other.write_text("")
    write_json(target, {})
    assert not dead.exists()
    assert living.exists()
    assert other.exists()


def test_threads_writing_one_file_leave_one_of_theirs(tmp_path):
    target = tmp_path / "file"

    def write(value):
        for _ in range(5):
            write_json(target, [value] * 1000)

    threads = [threading.Thread(target=write, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_json(target)
    assert found == [found[0]] * 1000
    assert names(tmp_path) == ["file"]


def test_json_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_json(tmp_path / "none.json")
    for content in (b'{"a": ', b"\xff\xfe"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.json is not valid JSON"):
            read_json(tmp_path / "bad.json")
    for number in (b"NaN", b"Infinity", b"1e999"):  # which write_json does not write
        (tmp_path / "bad.json").write_bytes(b'{"a": [' + number + b"]}")
        with pytest.raises(InputError, match=rf"bad\.json is not valid JSON \({number.decode()} is no finite number"):
            read_json(tmp_path / "bad.json")
    with pytest.raises(ValueError):
        write_json(tmp_path / "nan.json", float("nan"))
    assert names(tmp_path) == ["bad.json"]


def test_files_that_are_not_what_their_hashes_say_are_named(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"abc")
    digest = sha256_file(tmp_path / "a")
    files.check_files(tmp_path, {"a": digest}, "write it again")
    for digests, says in (({"a": "0"}, "a is damaged"), ({"a": digest, "b": digest}, "b is missing")):
        with pytest.raises(IntegrityError, match=rf"{says}.*: write it again"):
            files.check_files(tmp_path, digests, "write it again")

    def refuses(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "sha256_file", refuses)
    with pytest.raises(IntegrityError, match=r"a cannot be read \(Permission denied\): write it again"):
        files.check_files(tmp_path, {"a": digest}, "write it again")


def test_hashes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_json({"b": 1, "a": [2]}) == sha256_json({"a": [2], "b": 1})


WRITER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import numpy as np
import pyarrow.parquet, safetensors.numpy
import fastlvm.data.payload
from fastlvm.data import Payload, Space, Windows

root, how = Path(sys.argv[1]), sys.argv[2]
calls = moment = 0
def dies(function):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped
for module, name in ((os, "fsync"), (np, "save"), (Path, "replace"), (Path, "write_text"), (Path, "mkdir")):
    setattr(module, name, dies(getattr(module, name)))
fastlvm.data.payload.sha256_file = dies(fastlvm.data.payload.sha256_file)

rng = np.random.default_rng(0)
vectors = rng.standard_normal((600, 64)).astype("f4")
keys = np.stack([np.arange(600) // 20, np.arange(600) % 20], axis=1)
def write(folder):
    payload = Payload.build(folder / "payload", vectors, keys, texts=["words"] * 600, encoder="e")
    Windows.build(payload, seed=calls).save(folder / "windows.npz")
    Space.fit(payload.vectors).save(folder / "space.safetensors")

def forked(body):
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    return child

if how == "steps":  # one child a step, each killed one step later, until one gets through
    while True:
        moment += 1
        folder = root / str(moment)
        os.mkdir(folder)
        status = os.waitstatus_to_exitcode(os.waitpid(forked(lambda: write(folder)), 0)[1])
        print(moment, status, flush=True)
        if status != -signal.SIGKILL:
            break
else:  # writes without end, killed from outside
    draw = random.Random(0)
    def for_ever(folder):
        while True:
            write(folder)
            (folder / "payload").rename(folder / "done")
            shutil.rmtree(folder / "done")
    for number in range(1, 13):
        folder = root / str(number)
        os.mkdir(folder)
        child = forked(lambda: for_ever(folder))
        time.sleep(draw.uniform(0.01, 0.2))
        os.kill(child, signal.SIGKILL)
        print(number, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is not known here")


def killed(root, how):
    """Run the writer; (folder, exit code) of each of its children."""
    code = textwrap.dedent(WRITER)
    result = subprocess.run([sys.executable, "-c", code, root, how], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    return [(root / folder, int(status)) for folder, status in lines]


def _absent_or_whole(folder):
    """What a killed writer left; whatever is under its final name can be read to the last byte."""
    if (folder / "payload").exists():
        Payload.open(folder / "payload").verify()
    if (folder / "windows.npz").exists():
        Windows.open(folder / "windows.npz")
    visible = {name for name in names(folder) if not name.startswith(".")}
    assert visible <= {"payload", "windows.npz", "space.safetensors", "done"}


def _next_writer_clears(folder):
    vectors, keys = np.eye(12, dtype=np.float32), np.stack([np.zeros(12, int), np.arange(12)], axis=1)
    if not (folder / "payload").exists():
        Payload.build(folder / "payload", vectors, keys, encoder="next")
    payload = Payload.open(folder / "payload")
    Windows.build(payload).save(folder / "windows.npz")
    with atomic_file(folder / "space.safetensors") as path:
        path.write_text("")
    assert [name for name in names(folder) if name.startswith(".")] == []


@needs_fork
def test_kill_at_every_step_of_a_write(tmp_path):
    runs = killed(tmp_path, "steps")
    left_something = 0
    for folder, _ in runs[:-1]:
        _absent_or_whole(folder)
        left_something += any(name.startswith(".") for name in names(folder))
        _next_writer_clears(folder)
    assert {status for _, status in runs[:-1]} == {-signal.SIGKILL}
    assert runs[-1][1] == 0, "the last run was to get through"
    assert names(runs[-1][0]) == ["payload", "space.safetensors", "windows.npz"]
    assert len(runs) > 10
    assert left_something >= 5


@needs_fork
def test_kill_at_random_moments(tmp_path):
    for folder, status in killed(tmp_path, "random"):
        assert status == -signal.SIGKILL
        _absent_or_whole(folder)
        if (folder / "done").exists():
            shutil.rmtree(folder / "done")
        _next_writer_clears(folder)
