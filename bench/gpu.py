"""The GPU bench in one command: `python bench/gpu.py`, under 8 minutes, into bench/results/gpu-DEVICE.json and .md.

Rows are measured one after the other in a process of their own; one that fails, hangs or takes the device down has its
reason in the table, and the rest go on. Everything is written after every row, so a run cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import gpu_models
from fastlvm.files import atomic_file, write_json
from gpu_case import OURS, Arrays, Case
from gpu_cases import CASES
from gpu_rivals import Contender, contenders, versions
from gpu_table import gpu_file_name, markdown
from gpu_timing import Device, Timed, ceilings, clock, describe, prepare, release, rounds

RESULTS = Path(__file__).with_name("results")
SECTIONS = ("ssm", "step", "nce", "ssd", "train", "predictor", "conv", "fp32")
SPECIAL_A_CLOCK = 16  # exponentials and their like, a multiprocessor
REHEARSAL = "rehearsal"
_BROKEN = 3  # exit status of a measuring process whose device is in error


def section(row: Any) -> str:
    return "fp32" if isinstance(row, Case) and row.dtype == "fp32" else str(row.section)


def every_row() -> list[Any]:
    """Cases of ops and the rows of whole models, in the order of `SECTIONS`."""
    return sorted([*CASES, *gpu_models.ROWS], key=lambda row: SECTIONS.index(section(row)))


# --- in the measuring process


def measured(case: Case, device: Device, given: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    """A row of an op: what its contenders took, their errors, the bound and the clock."""
    backend = given.backend
    size = sum(x.numel() * x.element_size() for x in case.inputs(0, device.name).values())
    sets = [case.inputs(seed, device.name) for seed in range(device.sets(size))]
    judged = case.inputs(len(sets), device.name)  # nobody writes to these
    oracle = case.oracle(judged)
    found: list[dict[str, Any]] = []
    timed: list[Timed] = []
    for one in contenders(case, backend, not given.no_compile):
        if isinstance(one, tuple):
            found.append({"name": one[0], "reason": one[1]})
            continue
        entry: dict[str, Any] = {"name": one.name}
        found.append(entry)
        try:
            began = time.perf_counter()
            entry["error"] = _finite(_error(case, one, judged, oracle))
            ready = prepare(device, one, sets, given.seconds)
            entry["first_s"] = time.perf_counter() - began  # compiling and tuning are in it
            timed.append(ready)
        except Exception as error:
            entry["reason"] = _brief(error)
            device.synchronize()
        release()
    del oracle, judged
    rounds(device, timed)
    for ready in timed:
        next(entry for entry in found if entry["name"] == ready.name).update(ready.figures())
    row = {"id": case.id, "section": section(case), "title": case.title, "dtype": case.dtype, "contenders": found}
    row["targets"] = [vars(target) | {"text": target.text} for target in case.targets]
    row |= {"sets": len(sets), "set_mb": size / 1e6}
    ours = [ready for ready in timed if ready.name == OURS]
    mhz = clock(ours[0].run, ours[0].milliseconds[0] * ours[0].calls) if ours and device.gpu else None
    return row | {"clock_mhz": mhz, "bound": bound(case, limits, mhz)}


def _error(case: Case, one: Contender, given: Arrays, oracle: Arrays) -> float:
    masked = case.masked(given)
    out, grads = one.call(one.prepare(masked))
    if one.extra is not None:
        out = one.extra(masked, out)
    return case.error(oracle, out, () if one.outputs_alone else grads)


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def _brief(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip()[:200]}"


def bound(case: Case, limits: dict[str, float], mhz: float | None) -> dict[str, float]:
    """Microseconds of the least work at what the device was seen to do; without a clock no exponentials."""
    work = case.work()
    found = {"memory_us": 1e6 * work.bytes / limits["bytes_per_s"]}
    if work.flops:
        found["products_us"] = 1e6 * work.flops / limits[f"flops_{case.dtype}"]
    if mhz and limits.get("sms"):
        found["exponentials_us"] = work.special / (SPECIAL_A_CLOCK * limits["sms"] * mhz)
    return found | {"us": max(found.values()), "megabytes": work.bytes / 1e6, "exps": work.special}


def measure(rows: Sequence[Any], given: argparse.Namespace, about: dict[str, Any] | None, send: Connection) -> None:
    """Sends ("about", …) once, then ("row", id) and ("done", …) of every row."""
    device = Device("cpu" if given.rehearse else "cuda")
    if about is None:
        about = {"device": describe(device), "ceilings": ceilings(device), "versions": versions()}
        send.send(("about", about))
    limits = {**about["ceilings"], "sms": about["device"]["sms"]}
    for row in rows:
        send.send(("row", row.id))
        try:
            if isinstance(row, Case):
                done = measured(row.small() if given.rehearse else row, device, given, limits)
            else:
                done = row.measured(device, given, limits)
        except Exception as error:
            traceback.print_exc()
            done = failed(row, _brief(error))
        send.send(("done", {**done, "id": row.id}))
        try:
            release()
            device.synchronize()
        except Exception as error:
            print(f"the device is in error, starting anew: {_brief(error)}", file=sys.stderr, flush=True)
            os._exit(_BROKEN)


def failed(row: Any, reason: str) -> dict[str, Any]:
    return {"id": row.id, "section": section(row), "title": row.title, "reason": reason, "contenders": []}


# --- in the process that keeps the results


class Run:
    """Rows as they come, written to the two files after every one."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self.folder, self.about = folder, None
        self.rows: list[dict[str, Any]] = []
        self.began = datetime.now(timezone.utc)
        self.settings = {"seconds": given.seconds, "only": given.only, "backend": given.backend}
        self.settings[REHEARSAL] = given.rehearse

    def data(self) -> dict[str, Any]:
        when = {"date": self.began.strftime("%Y-%m-%d"), "began": self.began.strftime("%H:%M:%S UTC")}
        return {"bench": "gpu", **when, "settings": self.settings, **(self.about or {}), "rows": self.rows}

    def keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        if self.about is not None:
            save(self.folder, self.data())


def save(folder: Path, data: dict[str, Any]) -> Path:
    """Both files; the path of the JSON one."""
    path = folder / f"{gpu_file_name(data)}.json"
    write_json(path, data)
    with atomic_file(path.with_suffix(".md")) as target:
        target.write_text(markdown(data), encoding="utf-8")
    return path


def follow(run: Run, rows: Sequence[Any], given: argparse.Namespace) -> None:
    """Have the rows measured, by a new process where one ends before its time, until `--limit` seconds are over."""
    context = multiprocessing.get_context("fork")
    ends = time.monotonic() + given.limit
    left = list(rows)
    while left and time.monotonic() < ends:
        receive, send = context.Pipe(duplex=False)
        worker = context.Process(target=measure, args=(left, given, run.about, send), daemon=True)
        worker.start()
        send.close()
        now, why = None, ""
        while left:
            wait = min(given.patience, ends - time.monotonic())
            if wait <= 0 or not receive.poll(wait):
                why = "over the time of a row" if wait == given.patience else "over the time of the run"
                break
            try:
                kind, what = receive.recv()
            except EOFError:
                worker.join(10)
                why = f"the measuring process ended with status {worker.exitcode}"
                break
            if kind == "about":
                run.about = what
                run.write()
                continue
            now = next((row for row in left if row.id == (what if kind == "row" else what["id"])), None)
            if kind == "done":
                run.keep(what)
                left.remove(now)
                now = None
                print(_line(what), flush=True)
        worker.kill()
        worker.join()
        if left and run.about is None:
            raise SystemExit(f"the device could not be measured: {why}")
        if now is not None:
            run.keep(failed(now, why))
            left.remove(now)
            print(f"{now.title}: {why}", flush=True)
    for row in left:
        run.keep(failed(row, f"not reached within {given.limit:.0f} s"))


def _line(row: dict[str, Any]) -> str:
    if row.get("reason"):
        return f"{row['title']}: {row['reason']}"
    times = [
        f"{one['name']} {one['median_us']:.1f} µs" if "median_us" in one else f"{one['name']}: {one['reason'][:80]}"
        for one in row["contenders"]
    ]
    return f"{row['title']}: {'; '.join(times)}"


def has_gpu() -> bool:
    """Asked in a process of its own: the driver must not have been started in the one that forks."""
    asked = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(not torch.cuda.is_available()))
    asked.start()
    asked.join()
    return asked.exitcode == 0


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"sections, with commas between them: {', '.join(SECTIONS)}")
    parser.add_argument("--rows", default="", help="regular expression that a row's id has to match")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each contender whose call takes over 5 ms")
    parser.add_argument("--limit", type=float, default=460.0, help="seconds for the whole run")
    parser.add_argument("--patience", type=float, default=150.0, help="seconds for a row before it is given up")
    parser.add_argument("--out", type=Path, help="folder for the two files; of part of the rows, none otherwise")
    parser.add_argument("--backend", help="of fastlvm; triton if not said, auto in a rehearsal")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--list", action="store_true", help="print the ids of the rows")
    parser.add_argument("--rehearse", action="store_true", help="every row at a small size on the CPU, into --out")
    found = parser.parse_args(given)
    found.backend = found.backend or ("auto" if found.rehearse else "triton")
    return found


def main() -> int:
    given = arguments()
    wanted = given.only.split(",") if given.only else list(SECTIONS)
    unknown = sorted({*wanted} - {*SECTIONS})
    if unknown:
        print(f"no section {', '.join(unknown)}: name some of {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    rows = [row for name in wanted for row in every_row() if section(row) == name and re.search(given.rows, row.id)]
    if given.list:
        print(*(row.id for row in rows), sep="\n")
        return 0
    if given.rehearse and given.out is None:
        print("a rehearsal is no result: name a folder for it with --out", file=sys.stderr)
        return 2
    if not given.rehearse and not has_gpu():
        print("no CUDA device is here, and these figures are only taken on one (--rehearse --out FOLDER runs without)",
              file=sys.stderr)  # fmt: skip
        return 2
    whole = not (given.only or given.rows)
    folder = given.out or (RESULTS if whole else None)
    run = Run(folder, given) if folder else Unkept(Path(), given)
    follow(run, rows, given)
    print(markdown(run.data()))
    return 0


class Unkept(Run):
    def write(self) -> None:
        """Part of the rows are no result of their own."""


if __name__ == "__main__":
    sys.exit(main())
