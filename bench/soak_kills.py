"""Kills of a process that changes an index; run as a script, it is that process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastlvm.errors import FastlvmError
from fastlvm.retrieval import Index
from soak_cases import Setup, batch, made, payload_keys, payload_vectors

LARGE = 2000  # rows of some additions: a write of one takes a while
MOST = 50_000  # rows that there ever were, after which what is killed begins anew
CHECKED = 200  # rows that are looked for by their vectors after a kill


class Killed(NamedTuple):
    """What a soak of kills found. torn: folders with bytes of a record that was cut off."""

    kills: int
    acknowledged: int
    unsaid: int
    torn: int
    wrong: list[str]


Rows = dict[tuple[int, int], np.ndarray]


def step(setup: Setup, number: int) -> tuple[str, np.ndarray, np.ndarray]:
    """What a process that is to be killed does then: add, remove or save; vectors and keys."""
    turn, part = divmod(number, 10)
    none = np.empty((0, setup.dim), np.float32)
    if part == 9:
        return "save", none, np.empty((0, 2), int)
    if part in (6, 7):  # what was added 6 steps before, the large one among it
        return "remove", none, batch(setup, number - 6, _size(number - 6))[1]
    if part == 8 and turn < setup.rows:
        return "remove", none, payload_keys(setup.rows)[turn : turn + 1]
    return "add", *batch(setup, number, _size(number))


def _size(number: int) -> int:
    return LARGE if number % 10 == 1 else 1 + number % 4


def after(rows: Rows, setup: Setup, number: int) -> Rows:
    """What there is when that was done."""
    kind, vectors, keys = step(setup, number)
    named = [(int(article), int(chunk)) for article, chunk in keys]
    if kind == "remove":
        gone = set(named)
        return {key: vector for key, vector in rows.items() if key not in gone}
    return rows | dict(zip(named, vectors, strict=True)) if kind == "add" else rows


def child(folder: Path, setup: Setup, number: int) -> None:
    """Goes on from a step until it is killed."""
    index = Index.open(newest(folder))
    os.write(1, b"ready\n")
    while True:
        kind, vectors, keys = step(setup, number)
        if kind == "add":
            index.add(vectors, keys)
        elif kind == "remove":
            index.remove(keys)
        else:
            index.save(folder / f"index-{number:09}")
        os.write(1, f"{number}\n".encode())
        number += 1


def newest(folder: Path) -> Path:
    return max(folder.glob("index-*"))


def differs(index: Index, rows: Rows) -> str:
    """What an index has that is not in `rows`, or lacks; "" where nothing."""
    there = np.setdiff1d(np.arange(index.total), index._rows.gone)
    keys = {(int(article), int(chunk)) for article, chunk in index._rows.keys[there]}
    if keys != set(rows):
        return f"{len(set(rows) - keys)} rows are missing and {len(keys - set(rows))} are too many"
    drawn = np.random.default_rng(index.total).choice(len(rows), min(len(rows), CHECKED), replace=False)
    every = list(rows)
    wanted = [every[at] for at in drawn]
    clipped = 0.3 if index.kind == "ivf_sq8" else 1e-3  # where a component is beyond those that it was trained on
    found = index.search(np.stack([rows[key] for key in wanted]), 1)
    off = (found.keys[:, 0] != wanted).any(axis=1) | (np.abs(found.scores[:, 0] - 1) > index.score_error + clipped)
    return f"{np.count_nonzero(off)} rows are not found by their vectors" if off.any() else ""


def kills(setup: Setup, kind: str, count: int, folder: Path, longest: float = 0.15) -> Killed:
    first: Rows = dict(zip(map(tuple, payload_keys(setup.rows).tolist()), payload_vectors(setup), strict=True))
    rows = first
    made(setup, kind, folder / "index-000000000")
    rng = np.random.default_rng(setup.seed)
    number = said = unsaid = torn = 0
    wrong: list[str] = []
    for kill in range(count):
        last = acknowledged(folder, setup, number, rng.uniform(0, longest))
        said += last + 1 - number
        for done in range(number, last + 1):
            rows = after(rows, setup, done)
        number = last + 1
        try:
            reports = [Index.verify(path) for path in sorted(folder.glob("index-*"))]
            index = Index.open(newest(folder))
        except FastlvmError as error:
            wrong.append(f"kill {kill}: {error}")
            break
        torn += any(report.unfinished > 0 for report in reports)
        saved = step(setup, number)[0] == "save" and newest(folder).name == f"index-{number:09}"
        if saved or differs(index, rows):  # the one that was under way
            rows = after(rows, setup, number)
            number, unsaid = number + 1, unsaid + 1
        if found := differs(index, rows):
            wrong.append(f"kill {kill}, after step {last}: {found}")
            break
        for path in [*sorted(folder.glob("index-*"))[:-1], *folder.glob(".index-*")]:
            shutil.rmtree(path)
        if index.total > MOST:
            number, rows = -(-number // 10) * 10, first
            shutil.rmtree(newest(folder))
            made(setup, kind, folder / f"index-{number:09}")
    return Killed(kill + 1 if count else 0, said, unsaid, torn, wrong)


def acknowledged(folder: Path, setup: Setup, number: int, seconds: float) -> int:
    """The last step that a process said it had done before it was killed, from `number` on; or number - 1."""
    command = [sys.executable, __file__, str(folder), str(number), *map(str, setup)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{' '.join(command)} did not begin")
        time.sleep(seconds)
        ended = process.poll()
        process.kill()
        said = process.stdout.read().split()
    if ended is not None:
        raise RuntimeError(f"{' '.join(command)} ended by itself with {ended}")
    return int(said[-1]) if said else number - 1


if __name__ == "__main__":
    child(Path(sys.argv[1]), Setup(*map(int, sys.argv[3:])), int(sys.argv[2]))
