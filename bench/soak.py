"""A soak of growth: `python bench/soak.py --searches 1000000 --threads 4 --kills 200`; exit 1 where anything is lost.

Searches: some threads search an index in a folder while one adds and removes as many rows. Of every hundredth answer,
or the next one during whose search nothing changed, it is noted after how many changes it was given; another process
takes a copy of the index through the same changes, in one thread and without other searches, and has to give it to the
last bit. Memory may grow by what those changes alone take there, and 1 %.

Kills: a process adds, removes and saves, and says when each is done; it is killed at a random moment, again and again
on what the one before has left. `Index.verify` has to accept the folder, and what was said to be done has to be in it,
with at most the one change that was under way besides.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastlvm.retrieval import Index
from fastlvm.retrieval.build import KINDS
from soak_cases import BATCH, Setup, change, made, queries_of
from soak_kills import Killed, kills

K = 10
EVERY = 25  # searches between two changes, at least
CHANGES = 4000  # at most: what was removed stays, and slows the searches
WARM = 0.2  # share of the searches before memory is looked at
ALLOWED = 0.01  # by which memory may grow, as a share of itself


class Searched(NamedTuple):
    """What a soak of searches found; bytes of memory after the warm-up, grown since, and grown in the replay."""

    searches: int
    changes: int
    sampled: int
    wrong: int
    short: int
    errors: list[str]
    seconds: float
    memory: int
    grown: int
    needed: int

    @property
    def leaked(self) -> float:
        return (self.grown - self.needed) / self.memory

    @property
    def good(self) -> bool:
        return not (self.wrong or self.short or self.errors) and self.sampled > 0 and self.leaked < ALLOWED


def memory() -> int:
    """Bytes that are resident now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Soak:
    """Threads that search `total` times, and one that changes the index meanwhile."""

    def __init__(self, index: Index, setup: Setup, total: int, threads: int) -> None:
        self.index, self.setup, self.total, self.threads = index, setup, total, threads
        self.queries = queries_of(setup)
        room = total // 100 + threads + 1
        # Touched now, so that they do not show as growth: changes done before, query, ids, scores.
        self.samples = np.ones((room, 2), np.int64), np.ones((room, K), np.int64), np.ones((room, K), np.float32)
        self.places, self.numbers = itertools.count(), itertools.count()
        self.clock = 0  # odd while something changes
        self.least = min(CHANGES, total // EVERY) // 8  # changes, for which more is searched where they take long
        self.done = [0] * threads
        self.short = [0] * threads
        self.errors: list[str] = []
        self.warm, self.warm_changes = 0, 0

    def run(self) -> tuple[int, float]:
        """Changes done, and seconds."""
        began = time.perf_counter()
        threads = [threading.Thread(target=self._guarded, args=(self._search, i)) for i in range(self.threads)]
        changer = threading.Thread(target=self._guarded, args=(self._change,))
        for thread in (*threads, changer):
            thread.start()
        for thread in (*threads, changer):
            thread.join()
        return self.clock // 2, time.perf_counter() - began

    def _guarded(self, work: Any, *given: Any) -> None:
        try:
            work(*given)
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}")

    def _search(self, thread: int) -> None:
        due = False
        for number in iter(lambda: next(self.numbers), None):
            if (number >= self.total and self.clock // 2 >= self.least) or self.errors:
                return
            due |= number % 100 == 0
            at = number % len(self.queries)
            before = self.clock
            found = self.index.search(self.queries[at], K)
            if due and before == self.clock and not before % 2 and (place := next(self.places)) < len(self.samples[0]):
                self.samples[0][place] = before // 2, at
                self.samples[1][place], self.samples[2][place] = found.ids[0], found.scores[0]
                due = False
            self.short[thread] += int(found.ids[0, -1] < 0)
            self.done[thread] += 1

    def _change(self) -> None:
        for number in itertools.count():
            until = sum(self.done) + max(EVERY, self.total // CHANGES)  # some searches during which nothing changes
            while sum(self.done) < until:
                if self.errors or (sum(self.done) >= self.total and number >= self.least):
                    return
                time.sleep(2e-4)
            if not self.warm and (sum(self.done) >= WARM * self.total or number == self.least):
                self.warm, self.warm_changes = memory(), number
            self.clock += 1
            change(self.index, self.setup, number)
            self.clock += 1


def replay(folder: Path, setup: Setup, samples: Any, changes: int) -> int:
    """How many of the sampled answers an index does not give that goes through the same changes."""
    index, queries = Index.open(folder), queries_of(setup)
    order = np.argsort(samples[0][:, 0], kind="stable")
    wrong, at = 0, 0
    for number in range(changes + 1):
        while at < len(order) and samples[0][order[at], 0] == number:
            _, query = samples[0][order[at]]
            found = index.search(queries[query], K)
            same = found.ids[0].tobytes() == samples[1][order[at]].tobytes()
            wrong += not (same and found.scores[0].tobytes() == samples[2][order[at]].tobytes())
            at += 1
        if number < changes:
            change(index, setup, number)
    return wrong


def needed(folder: Path, setup: Setup, warm_changes: int, changes: int) -> int:
    """Bytes that memory grows by after the warm-up where nobody searches."""
    index, queries = Index.open(folder), queries_of(setup)
    index.search(queries[0], K)
    found: list[int] = []

    def work() -> None:
        for number in range(changes):
            if number == warm_changes:
                found.append(memory())
            change(index, setup, number)
        found.append(memory())

    thread = threading.Thread(target=work)  # as in the soak: threads have heaps of their own
    thread.start()
    thread.join()
    return found[-1] - found[0]


def searches(setup: Setup, kind: str, total: int, threads: int, folder: Path) -> Searched:
    made(setup, kind, folder / "index")
    copies = [shutil.copytree(folder / "index", folder / name) for name in ("replayed", "measured")]
    index = Index.open(folder / "index")
    soak = Soak(index, setup, total, threads)
    changes, seconds = soak.run()
    grown = memory() - soak.warm
    index.close()
    Index.verify(folder / "index")
    count = min(next(soak.places), len(soak.samples[0]))
    samples = tuple(part[:count] for part in soak.samples)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as pool:
        wrong = pool.apply(replay, (copies[0], setup, samples, changes))
    with spawn.Pool(1) as pool:  # whose memory nobody has used
        alone = pool.apply(needed, (copies[1], setup, soak.warm_changes, changes))
    return Searched(
        *(sum(soak.done), changes, count, wrong, sum(soak.short), soak.errors, seconds),
        *(soak.warm, grown, alone),
    )


def table(kind: str, setup: Setup, searched: Searched | None, killed: Killed | None) -> Iterator[str]:
    yield f"{kind}, {setup.rows} x {setup.dim}"
    if searched is not None:
        yield f"  searches             {searched.searches:>12,}  in {searched.seconds:.1f} s"
        yield f"  changes meanwhile    {searched.changes:>12,}  of {BATCH} rows, as many added as removed"
        yield f"  answers compared     {searched.sampled:>12,}  {searched.wrong} not equal to the last bit"
        yield f"  answers too short    {searched.short:>12,}"
        yield f"  memory after warm-up {searched.memory / 1e6:>12.1f}  MB"
        alone = f"by the same changes alone {searched.needed / 1e6:.2f}"
        yield f"  grown since          {searched.grown / 1e6:>12.2f}  MB; {alone}"
        yield f"  beyond those         {100 * searched.leaked:>12.2f}  %, and less than {100 * ALLOWED:g} is wanted"
        yield from (f"  error: {error}" for error in searched.errors)
    if killed is not None:
        yield f"  kills                {killed.kills:>12,}  {killed.torn} amid a write of the journal"
        yield f"  acknowledged changes {killed.acknowledged:>12,}  {killed.unsaid} more that were done and not yet said"
        yield from (f"  wrong: {what}" for what in killed.wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--searches", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--kinds", default="flat", help=f"of {', '.join(KINDS)}, with commas between")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    setup = Setup(given.rows, given.dim, given.seed)
    bad = False
    for kind in given.kinds.split(","):
        searched = killed = None
        with tempfile.TemporaryDirectory() as folder:
            if given.searches:
                (Path(folder) / "searches").mkdir()
                searched = searches(setup, kind, given.searches, given.threads, Path(folder) / "searches")
            if given.kills:
                (Path(folder) / "kills").mkdir()
                killed = kills(setup, kind, given.kills, Path(folder) / "kills")
        print("\n".join(table(kind, setup, searched, killed)), flush=True)
        bad |= (searched is not None and not searched.good) or (killed is not None and bool(killed.wrong))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
