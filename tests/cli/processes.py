"""Commands in processes of their own, that can be interrupted and killed.

They are forked from a server that has imported torch, faiss and fastlvm once and started no thread.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

PRELOAD = ["cli.processes", "fastlvm.cli", "fastlvm.training", "fastlvm.predictor.export", "faiss", "torch._dynamo"]


def context():
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(PRELOAD)
    return forkserver


def _run(args, out, err, limit):
    """In the child: what the entry point does, its streams sent to files."""
    for name, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if limit is not None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    import torch

    from fastlvm.cli import main

    torch.set_num_threads(1)
    sys.argv = ["fastlvm", *args]
    main()


class Started:
    """A command under way. `limit`: bytes above which no file may grow, as on a full disk."""

    def __init__(self, folder, *args, limit=None):
        self.out, self.err = Path(folder) / "stdout", Path(folder) / "stderr"
        self.process = context().Process(
            target=_run, args=([str(arg) for arg in args], str(self.out), str(self.err), limit)
        )
        self.process.start()

    def wait_for(self, holds, seconds=60):
        """Return when `holds()`; False when the process ended first."""
        end = time.monotonic() + seconds
        while not holds():
            if not self.process.is_alive():
                return False
            assert time.monotonic() < end, self.err.read_text()
            time.sleep(0.001)
        return True

    def signal(self, number):
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def end(self, seconds=120):
        """(exit code, standard output, standard error); a signal's number is negative."""
        self.process.join(seconds)
        assert not self.process.is_alive(), self.err.read_text()
        return self.process.exitcode, self.out.read_text(), self.err.read_text()
