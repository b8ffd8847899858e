"""Damaged artifacts: Predictor.load works, or says in one line what is wrong. `make fuzz-load` runs it under ASan.

python -m predictor.fuzz_load [CASES [SEED]]   in tests/; ends with the counts, and status 1 if there are findings
python -m predictor.fuzz_load --one SEED DIR   writes the artifact of one case to DIR and loads it in this process
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .fuzz_artifacts import Base, Files

HANGS, WAITS = 10, 600  # seconds of processor time, and of waiting for something
LONGEST = 1000  # characters of a message that is still one to read
FINDING = "finding"
_NUMBERS = re.compile(r"'.*'|[0-9.e+-]*[0-9][0-9.e+-]*")


class Result(NamedTuple):
    seed: int
    outcome: str  # "loads", the name of an error, or FINDING
    why: str
    damage: list[str]
    sealed: bool


def artifact_of(seed: int, bases: list[Base]) -> tuple[Files, list[str], bool]:
    """The files of a case, how they were damaged, and whether every hash and checksum fits them."""
    from .fuzz_artifacts import reseal
    from .fuzz_damage import Target, spoil

    rng = random.Random(seed)
    base = rng.choice(bases)
    files = dict(base.files)
    names = spoil(Target(files, base.space, bases, rng))
    sealed = rng.random() < 0.5
    if sealed:
        reseal(files)
    return files, names, sealed


def write(files: Files, folder: Path) -> None:
    (folder / "index").mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def judge(folder: Path) -> tuple[str, str]:
    """The outcome of loading and using an artifact, and why."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        outcome, why = _judge(folder)
    if seen and outcome != FINDING:
        return FINDING, f"warns on its way to {outcome}: {seen[0].message}"
    return outcome, why


def _judge(folder: Path) -> tuple[str, str]:
    import numpy as np

    from fastlvm.errors import InputError, IntegrityError
    from fastlvm.predictor import Predictor

    try:
        predictor = Predictor.load(folder)
    except InputError as error:
        text = str(error)
        if type(error) not in (InputError, IntegrityError):
            return FINDING, f"{type(error).__name__}: {text}"
        for what, bad in (
            ("message of several lines or none", len(text.splitlines()) != 1),
            ("message of characters that do not print", not text.isprintable()),
            ("message that does not name the artifact", str(folder) not in text),
            ("message that nobody reads to its end", len(text) > LONGEST),
        ):
            if bad:
                return FINDING, f"{what}: {text[:300]!r}"
        return type(error).__name__, text.replace(str(folder), "")
    except BaseException as error:
        return FINDING, _told(error)
    try:
        context = np.random.default_rng(0).standard_normal((2, predictor.context, predictor.dim)).astype(np.float32)
        predicted = predictor.predict(context)
        found = predictor.search(context, 3, exclude="context")
        if not np.isfinite(predicted).all():
            return FINDING, "it loads, and predicts numbers that are not finite"
        if [part.dtype.name for part in found] != ["int64", "float32", "int32"]:
            return FINDING, f"it loads, and finds {[part.dtype.name for part in found]}"
        if found.ids.min() < -1 or found.ids.max() >= len(predictor.index):
            return FINDING, f"it loads, and finds rows {found.ids.tolist()}"
    except BaseException as error:
        return FINDING, f"it loads, and then: {_told(error)}"
    return "loads", ""


def _told(error: BaseException) -> str:
    """An exception as one line, with where it came from and what it went through of fastlvm."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    way = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "/fastlvm/" in frame.filename]
    return f"{type(error).__name__} by way of {' '.join(way)}: {' '.join(str(error).split())[:300]}"


def work(seeds: range, folder: Path, results: int, progress: mmap.mmap) -> None:
    """Every case in turn, in `folder`; `progress` says which one. The process ends where a case takes too long."""
    from .fuzz_artifacts import make

    bases = make(folder)
    for seed in seeds:
        case = folder / f"case{seed}"
        progress[:8] = struct.pack("<q", seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            files, names, sealed = artifact_of(seed, bases)
        write(files, case)
        signal.setitimer(signal.ITIMER_PROF, HANGS)
        signal.setitimer(signal.ITIMER_REAL, WAITS)
        outcome, why = judge(case)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(results, json.dumps(Result(seed, outcome, why[-3000:], names, sealed)).encode() + b"\n")
        shutil.rmtree(case)


def supervise(cases: int, first: int) -> list[Result]:
    """Cases in child processes; one that crashes or hangs is a finding, and the next child goes on behind it."""
    found: list[Result] = []
    progress = mmap.mmap(-1, 8)
    at, end = first, first + cases
    while at < end:
        progress[:8] = struct.pack("<q", -1)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            child = os.fork()
            if child == 0:
                _child(range(at, end), folder, progress)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            found += [Result(*json.loads(line)) for line in (folder / "results").read_text().splitlines()]
            report = _report((folder / "errors").read_text(errors="replace"))
        if status == 0:
            break
        (stopped_at,) = struct.unpack("<q", progress[:8])
        if stopped_at < 0:
            raise SystemExit(f"no artifact could be made:\n{report}")
        hangs = status in (-signal.SIGPROF, -signal.SIGALRM)
        why = "it hangs" if hangs else f"the process ended with status {status}"
        found.append(Result(stopped_at, FINDING, f"{why}\n{report}", [], False))
        at = stopped_at + 1
    return found


def _child(seeds: range, folder: Path, progress: mmap.mmap) -> None:
    status = 1
    try:
        os.dup2(os.open(folder / "errors", os.O_WRONLY | os.O_CREAT), 2)
        work(seeds, folder, os.open(folder / "results", os.O_WRONLY | os.O_CREAT), progress)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _report(errors: str) -> str:
    """The part of a sanitizer's report that tells the case."""
    start = max(errors.find("ERROR: AddressSanitizer"), errors.find("runtime error"))
    return errors[start : start + 3000] if start >= 0 else errors[-3000:]


def tell(results: list[Result], seconds: float, seed: int, reasons: bool) -> int:
    """Print the counts and every finding; the number of findings."""
    outcomes = Counter(result.outcome for result in results)
    ways = {name for result in results for name in result.damage}
    for way in sorted(ways):
        of_way = Counter(result.outcome for result in results if way in result.damage)
        print(f"{way:18}", ", ".join(f"{outcome} {times}" for outcome, times in sorted(of_way.items())))
    if reasons:
        classes = Counter(
            re.sub(r"'.*'|\".*\"|[0-9.e+-]*[0-9]+[0-9.e+-]*", "#", result.why)[:150] for result in results
        )
        for text, times in classes.most_common():
            print(f"{times:6} {text!r}")
    findings: dict[str, list[Result]] = {}
    for result in results:
        if result.outcome == FINDING:
            findings.setdefault(_NUMBERS.sub("#", result.why.partition(": ")[0]), []).append(result)
    for alike in findings.values():
        first = alike[0]
        seeds = ", ".join(str(result.seed) for result in alike[:8])
        print(
            f"finding, {len(alike)} times, seeds {seeds}: {'+'.join(first.damage)} {'resealed' if first.sealed else ''}"
        )
        print("  " + first.why.strip().replace("\n", "\n  "))
    counts = ", ".join(f"{outcomes[name]} {name}" for name in sorted(outcomes) if name != FINDING)
    sealed = sum(result.sealed for result in results)
    print(
        f"{len(results)} artifacts from seed {seed} in {seconds:.0f} s, {sealed} of them resealed: {counts}; "
        f"findings: {outcomes[FINDING]}"
    )
    return outcomes[FINDING]


def one(seed: int, folder: Path) -> int:
    from .fuzz_artifacts import make

    with tempfile.TemporaryDirectory() as scratch:
        files, names, sealed = artifact_of(seed, make(Path(scratch)))
    write(files, folder)
    print(f"seed {seed}: {'+'.join(names)}{', resealed' if sealed else ''}", flush=True)
    outcome, why = judge(folder)
    print(outcome, why)
    return outcome == FINDING


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=int, nargs="?", default=1000)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--one", nargs=2, metavar=("SEED", "DIR"), help="one case again")
    parser.add_argument("--reasons", action="store_true", help="how often every kind of message was given")
    options = parser.parse_args()
    if options.one:
        return one(int(options.one[0]), Path(options.one[1]))
    began = time.monotonic()
    results = supervise(options.cases, options.seed)
    return tell(results, time.monotonic() - began, options.seed, options.reasons) > 0


if __name__ == "__main__":
    sys.exit(main())
