"""Busy processes, one on every core: the load under which a call of several threads is hardest to finish."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SETTLE = 0.3  # seconds, until all of them are up
# Ends by itself when the process that started it is gone.
_BUSY = """
import os, sys
parent, core = map(int, sys.argv[1:])
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {core})
print("busy", flush=True)
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


@contextmanager
def hogs() -> Iterator[int]:
    """A busy process on every core this process may use, until the block is left; yields how many."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for core in cores:
            command = [sys.executable, "-c", _BUSY, str(os.getpid()), str(core)]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for one in started:
            assert one.stdout is not None and one.stdout.readline().strip() == b"busy", "a busy process did not start"
        time.sleep(_SETTLE)
        yield len(started)
        assert all(one.poll() is None for one in started), "a busy process ended before the measurement"
    finally:
        for one in started:
            one.kill()
        for one in started:
            one.communicate()
