"""What a run leaves: rows of figures with the machine they were taken on. Here, those of the kernel benches."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np

from bound import Work, compiler
from cases import OTHERS, SCANS, Conv, Scan, Ssd, Step, id_of
from contenders import BEST, ISAS, TIMED
from fastlvm.evaluation.latency import machine
from paired import Contender, Plan
from rivals import PACKAGES, versions

# Words of a processor's name, in lower case, that tell it from none.
_IDLE = re.compile(r"\((?:r|tm)\)|\b(?:\d+-core|cpu|processor)\b|@.*")


class Record:
    """When, where and with what a run was made."""

    def __init__(self, plan: Plan, threads: Sequence[int]) -> None:
        self.plan, self.threads = plan, list(threads)
        self.began = datetime.now(timezone.utc)
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    def surroundings(self, packages: Sequence[str]) -> dict[str, Any]:
        return {
            "date": self.began.strftime("%Y-%m-%d"),
            "machine": machine(),
            "load": self.load,
            "isas": ISAS,
            "isa": BEST,
            "threads": self.threads,
            "rounds": self.plan.rounds,
            "versions": {"python": platform.python_version(), **versions(packages), "compiler": _compiler()},
        }


class Results(Record):
    """Filled by the benches; `data()` is what goes to the JSON file and what table.py and plot.py read."""

    def __init__(self, plan: Plan, threads: Sequence[int]) -> None:
        super().__init__(plan, threads)
        self.cases: dict[str, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []

    def add(self, case: Scan | Conv | Ssd | Step, contenders: Sequence[Contender]) -> None:
        described = {"op": case.op, "title": case.title, "shape": case.shape, "gradient": case.gradient}
        if isinstance(case, Scan):
            work = Work.of(case)
            described |= {"exps": work.exps, "megabytes": work.megabytes}
        self.cases.setdefault(id_of(case), {}).update(described)
        for one in contenders:
            if one.seconds:  # none with --benchmark-disable
                self.rows.append({"case": id_of(case), "name": one.name, "isa": one.isa, **figures(one)})

    def refuse(self, case: Scan, reasons: Mapping[str, str]) -> None:
        self.rows += [{"case": id_of(case), "name": name, "reason": reason} for name, reason in reasons.items()]

    def memory(self, case: Scan, found: Mapping[str, Any]) -> None:
        self.cases[id_of(case)]["memory"] = dict(found)

    @property
    def any(self) -> bool:
        return bool(self.rows)

    def complete(self) -> bool:
        """Whether every case has been timed."""
        return {row["case"] for row in self.rows} >= {id_of(case) for case in (*SCANS, *OTHERS)}

    def data(self) -> dict[str, Any]:
        return {**self.surroundings(PACKAGES), "timed": TIMED, "cases": self.cases, "rows": self.rows}


def file_name(bench: str, data: Mapping[str, Any]) -> str:
    """Another one for another instruction set, processor or number of threads, so that no run replaces theirs."""
    processor = _IDLE.sub(" ", data["machine"].partition(",")[0].lower())
    slug = "-".join(re.findall(r"[a-z0-9]+", processor)) or "unknown"
    return f"{bench}-{data['isa']}-{slug}-{data['threads'][-1]}-threads"


def figures(one: Contender) -> dict[str, Any]:
    p10, p50, p90 = np.percentile(one.seconds, [10, 50, 90]) * 1e3
    return {
        "threads": one.threads,
        "rounds": len(one.seconds),
        "median_ms": float(p50),
        "p10_ms": float(p10),
        "p90_ms": float(p90),
    }


def _compiler() -> str:
    """The first line of what the compiler says of itself."""
    command = compiler()
    if command is None:
        return "missing"
    done = subprocess.run([*command.split(), "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0]
