"""The busy processes: as many as cores while the block lasts, and none after it, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import hog

BENCH = Path(hog.__file__).parent


@pytest.fixture
def started(monkeypatch):
    """The processes that hog.py starts."""
    found, popen = [], subprocess.Popen
    monkeypatch.setattr(hog.subprocess, "Popen", lambda *a, **k: found.append(popen(*a, **k)) or found[-1])
    return found


def test_hogs_run_one_on_every_core_and_none_is_left(started):
    with hog.hogs() as n:
        assert all(one.poll() is None for one in started)
        if hasattr(os, "sched_getaffinity"):
            assert [{core} for core in sorted(os.sched_getaffinity(0))] == [
                os.sched_getaffinity(one.pid) for one in started
            ]
        assert n == len(started) > 0
    assert all(one.returncode is not None for one in started)


def test_hogs_do_not_outlive_a_measurement_that_fails_and_do_not_end_before_it(started):
    with pytest.raises(ZeroDivisionError), hog.hogs():
        raise ZeroDivisionError
    with pytest.raises(AssertionError, match="ended before"), hog.hogs():
        started[-1].kill()
        started[-1].wait()
    assert all(one.returncode is not None for one in started)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux only")
def test_hogs_end_when_the_process_that_started_them_is_killed():
    code = """if True:
        import subprocess, time, hog
        popen, pids = subprocess.Popen, []
        subprocess.Popen = lambda *a, **k: [started := popen(*a, **k), pids.append(started.pid)][0]
        with hog.hogs():
            print(*pids, flush=True)
            time.sleep(60)"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=BENCH)
    pids = parent.stdout.readline().split()
    parent.kill()
    parent.communicate()

    def alive(pid):
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    end = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    left = [pid for pid in pids if alive(pid)]
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert pids and not left
