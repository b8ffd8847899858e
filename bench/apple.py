"""The bench of an Apple GPU in one command: `python bench/apple.py`, into apple.json, with a table on the screen.

First the ops on mlx arrays with the GPU as the default device, forward and gradients, against float64; then times
against plain mlx, mlx-lm, PyTorch on MPS and fastlvm's own CPU kernels. Rows are measured in a process of their own;
one that fails, hangs or ends it has its reason in the file, and the rest go on. The file is written after every row. It
names the chip, and nobody. `--dry-run` does the same in small sizes on mlx's CPU device, on any machine. Exit codes: 0
ok, 1 a result is wrong, 2 bad input or no GPU, 130 interrupted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from apple_table import failed, markdown
from fastlvm.errors import FastlvmError
from fastlvm.files import write_json

SECTIONS = ("check", "scan", "step", "conv", "nce", "train", "mlx-lm")
_SECTION = {"ssm_scan": "scan", "ssm_step": "step", "causal_conv1d": "conv", "causal_conv1d_step": "conv"}
_PACKAGES = ("fastlvm", "mlx", "mlx-lm", "numpy", "torch")
_DESCRIBED = ("device_name", "architecture", "memory_size", "max_recommended_working_set_size")


# --- in the measuring process


class Check:
    """A case of the grid as a row."""

    section = "check"

    def __init__(self, case: Any) -> None:
        self.case, self.id, self.title = case, f"check-{case.id}", case.id

    def measured(self, given: argparse.Namespace, bytes_per_s: float) -> dict[str, Any]:
        from apple_check import check

        return check(self.case)

    def unmeasured(self) -> dict[str, Any]:
        return {"id": self.id, "kind": "check", "op": self.case.op, "dtype": self.case.dtype}


class Timed:
    """An op or a model that is timed, as a row."""

    def __init__(self, case: Any) -> None:
        self.case, self.title = case, case.title
        self.id = case.id if hasattr(case, "section") else f"bench-{case.id}-{'fwdbwd' if case.gradient else 'fwd'}"
        self.section = case.section if hasattr(case, "section") else _SECTION.get(case.op, "nce")

    def measured(self, given: argparse.Namespace, bytes_per_s: float) -> dict[str, Any]:
        from apple_rivals import measured

        if hasattr(self.case, "measured"):
            found: dict[str, Any] = self.case.measured(given.seconds, bytes_per_s)
            return found
        return measured(self.case, given.seconds, bytes_per_s)

    def unmeasured(self) -> dict[str, Any]:
        return {"id": self.id, "kind": "bench", "title": self.title, "contenders": []}


def every_row(dry: bool) -> list[Any]:
    """In the order of `SECTIONS`."""
    from apple_grid import grid, shapes
    from apple_models import rows

    timed = [Timed(case) for case in shapes(dry)] + [Timed(row.small() if dry else row) for row in rows()]
    found = [*(Check(case) for case in grid()), *timed]
    return sorted(found, key=lambda row: SECTIONS.index(row.section))


def measure(rows: Sequence[Any], given: argparse.Namespace, bytes_per_s: float | None, send: Any) -> None:
    """Sends ("about", …) unless the speed of the copy is known, then ("row", id) and ("done", …) of every row."""
    import mlx.core as mx

    from apple_check import scrubbed
    from apple_timing import bandwidth, device_info

    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears of it, too, and ends this process
    mx.set_default_device(mx.cpu if given.dry_run else mx.gpu)
    if bytes_per_s is None:
        bytes_per_s = bandwidth(given.dry_run)
        described = {name: value for name, value in device_info().items() if name in _DESCRIBED}
        send.send(("about", {"bytes_per_s": bytes_per_s, "mlx_device": described}))
    for row in rows:
        send.send(("row", row.id))
        try:
            done = row.measured(given, bytes_per_s)
        except Exception as error:
            done = lost(row, scrubbed(error))
        send.send(("done", {**done, "id": row.id}))


def lost(row: Any, reason: str) -> dict[str, Any]:
    """A row without a result; in the check that is a failure."""
    found: dict[str, Any] = row.unmeasured() | {"reason": reason}
    return found | {"ok": False if found["kind"] == "check" else None}


# --- in the process that keeps the results


class Run:
    """Rows as they come, written after every one."""

    def __init__(self, path: Path, given: argparse.Namespace) -> None:
        self.path, self.dry = path, given.dry_run
        self.rows: list[dict[str, Any]] = []
        self.head: dict[str, Any] = {
            "bench": "apple",
            "device": "cpu (dry run)" if given.dry_run else "gpu",
            "dry_run": given.dry_run,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "machine": described(),
            "versions": versions(),
            "commit": commit(),
            "settings": {"only": given.only, "rows": given.rows, "seconds": given.seconds},
        }
        self.write()

    def about(self, found: dict[str, Any]) -> None:
        device = found.pop("mlx_device")
        self.head |= found
        self.head["machine"] |= {name: device[name] for name in ("device_name", "architecture") if name in device}
        if "memory_size" in device:
            self.head["machine"]["memory"] = f"{device['memory_size'] / (1 << 30):.0f} GB of memory"
        self.write()

    def keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row | {"dry_run": True} if self.dry else row)
        self.write()
        print(_line(row), flush=True)

    def data(self) -> dict[str, Any]:
        checks = [row for row in self.rows if row["kind"] == "check"]
        counts = {"checked": len(checks), "timed": len(self.rows) - len(checks), "failed": len(failed(self.rows))}
        return {**self.head, "counts": counts, "rows": self.rows}

    def write(self) -> None:
        write_json(self.path, self.data())


def _line(row: dict[str, Any]) -> str:
    title = row.get("title", row["id"])
    if "reason" in row:
        return f"{title}: {row['reason']}"
    if row["kind"] == "check":
        wrong = ", ".join(one["array"] for one in row["failures"])
        return f"{title}: {'ok' if row['ok'] else f'FAILED in {wrong}'}"
    shown = [
        f"{one['name']} {one['median_ms']:.3f} ms{' WRONG' if one.get('wrong') else ''}"
        if "median_ms" in one
        else f"{one['name']}: {one.get('reason', 'not timed')}"
        for one in row["contenders"]
    ]
    return f"{title}: {'; '.join(shown)}"


class _Here:
    """Takes what a measuring process would send."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def send(self, message: tuple[str, Any]) -> None:
        kind, what = message
        if kind == "about":
            self.run.about(what)
        elif kind == "done":
            self.run.keep(what)


def follow(run: Run, rows: Sequence[Any], given: argparse.Namespace) -> None:
    """Have the rows measured, by a new process where one ends before its time, until `--limit` seconds are over."""
    context = multiprocessing.get_context("spawn")  # Metal does not outlive a fork
    ends = time.monotonic() + given.limit
    left, late = list(rows), f"not reached within {given.limit:.0f} s"
    while left and time.monotonic() < ends:
        receive, send = context.Pipe(duplex=False)
        worker = context.Process(target=measure, args=(left, given, run.head.get("bytes_per_s"), send), daemon=True)
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
                run.about(what)
            elif kind == "row":
                now = next(row for row in left if row.id == what)
            else:
                run.keep(what)
                left = [row for row in left if row.id != what["id"]]
        worker.kill()
        worker.join()
        if now is None and left and time.monotonic() < ends:  # no row was begun, and none would be by the next
            late = why
            break
        if now in left:
            run.keep(lost(now, why))
            left.remove(now)
    for row in left:
        run.keep(lost(row, late))


# --- what the file says of the machine; no host, user or path


def described() -> dict[str, str]:
    from fastlvm.evaluation.latency import machine

    release = platform.mac_ver()[0]
    found = {"chip": machine(), "system": f"macOS {release}" if release else platform.system()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory"] = f"{size / (1 << 30):.0f} GB of memory"
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def commit() -> str | None:
    """Of the checkout the bench is in, with a plus where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def why_not(dry: bool) -> str | None:
    """Why no row can be measured on this machine."""
    if find_spec("mlx") is None:
        return "mlx is not installed, and the bench is of fastlvm on its arrays: pip install mlx"
    import mlx.core as mx

    if not dry and not mx.metal.is_available():
        return "mlx finds no Metal GPU here, and these figures are only taken on one (--dry-run does without)"
    return None


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the file; apple.json if not said, apple-dry-run.json of a dry run")
    parser.add_argument("--only", default="", help=f"sections, with commas between them: {', '.join(SECTIONS)}")
    parser.add_argument("--rows", default="", help="regular expression that a row's id has to match")
    parser.add_argument("--dry-run", action="store_true", help="small sizes, on mlx's CPU device")
    parser.add_argument("--seconds", type=float, help="for each contender of a row; 1, of a dry run 0.02")
    parser.add_argument("--limit", type=float, default=1500.0, help="seconds for the whole run")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds for a row before it is given up")
    parser.add_argument("--here", action="store_true", help="measure in this process: a crash ends the run")
    parser.add_argument("--list", action="store_true", help="print the ids of the rows")
    found = parser.parse_args(given)
    if found.seconds is None:
        found.seconds = 0.02 if found.dry_run else 1.0
    return found


def selected(rows: Iterable[Any], given: argparse.Namespace) -> list[Any]:
    wanted = given.only.split(",") if given.only else SECTIONS
    return [row for row in rows if row.section in wanted and re.search(given.rows, row.id)]


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    unknown = sorted({*given.only.split(",")} - {"", *SECTIONS})
    if unknown:
        print(f"no section {', '.join(unknown)}: name some of {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    reason = why_not(given.dry_run or given.list)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    try:
        rows = selected(every_row(given.dry_run), given)
    except re.error as error:
        print(f"--rows {given.rows!r} is no regular expression: {error}", file=sys.stderr)
        return 2
    if given.list:
        print(*(row.id for row in rows), sep="\n")
        return 0
    if not rows:
        print(f"no row of {given.only or 'all sections'} matches {given.rows!r}: --list prints them", file=sys.stderr)
        return 2
    path = given.out or Path("apple-dry-run.json" if given.dry_run else "apple.json")
    try:
        run = Run(path, given)
        if given.here:
            measure(rows, given, None, _Here(run))
        else:
            follow(run, rows, given)
    except FastlvmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"interrupted: {path} has the rows so far", file=sys.stderr)
        return 130
    print(f"\n{markdown(run.data())}\n{path}")
    return 1 if failed(run.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
