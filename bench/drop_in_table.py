"""What a run of bench_drop_in.py leaves, and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drop_in_cases import CONTENDERS, DTYPES, PASSES, PATCHED, SLOW, STEP, TIMED, Pass
from drop_in_llama import PACKAGES as OF_LLAMA
from paired import Contender, Plan
from results import Record, figures
from rivals import PACKAGES
from table import section


class DropIn(Record):
    """Filled by bench_drop_in.py."""

    def __init__(self, plan: Plan, threads: Sequence[int]) -> None:
        super().__init__(plan, threads)
        self.rows: list[dict[str, Any]] = []
        self.peaks: dict[str, dict[str, Any]] = {}

    def add(self, timed: Pass, dtype: str, contenders: Sequence[Contender]) -> None:
        for one in contenders:
            if one.seconds:
                self.rows.append({"pass": timed.name, "dtype": dtype, "name": one.name, **figures(one)})

    def refuse(self, timed: Pass, dtype: str, name: str, reason: str, threads: int) -> None:
        self.rows.append({"pass": timed.name, "dtype": dtype, "name": name, "threads": threads, "reason": reason})

    def memory(self, dtype: str, peaks: Mapping[str, Any]) -> None:
        self.peaks[dtype] = dict(peaks)

    @property
    def any(self) -> bool:
        return bool(self.rows)

    def complete(self) -> bool:
        """Whether everything has been timed, on every number of threads."""
        timed = {(row["pass"], row["dtype"], row["threads"]) for row in self.rows if "reason" not in row}
        return self.peaks.keys() == DTYPES.keys() and timed == {
            (one.name, dtype, n) for one in PASSES for dtype in DTYPES for n in self.threads
        }

    def data(self) -> dict[str, Any]:
        return {**self.surroundings((*PACKAGES, *OF_LLAMA)), "timed": TIMED, "rows": self.rows, "memory": self.peaks}


def markdown(data: Mapping[str, Any]) -> str:
    """A table of times, as medians with how many times as quick fastlvm is, and one of memory."""
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if name != "compiler")
    about = (
        f"MambaForCausalLM, 24 layers of 768, random weights; {data['machine']}; {data['date']}; {versions}. Median "
        "milliseconds of paired rounds, 10 % to 90 % in parentheses; in brackets how many times fastlvm's."
    )
    heads = ("", "", "threads", *TIMED)
    parts = [about, section("Time", heads, _times(data))]
    if data["memory"]:
        parts.append(section(f"Memory of {STEP.title}, over the weights, MB", ("", *TIMED), _memory(data)))
    notes = "\n".join(f"- {name}: {text}" for name, text in data["timed"].items())
    return "\n\n".join([*parts, notes]) + "\n"


def _times(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = {(row["pass"], row["dtype"], row["threads"], row["name"]): row for row in data["rows"]}
    found = []
    for one in PASSES:
        for dtype in DTYPES:
            for n in data["threads"]:
                ours = rows.get((one.name, dtype, n, PATCHED))
                if ours is None:
                    continue
                cells = []
                for name in TIMED:
                    row = rows.get((one.name, dtype, n, name))
                    cells.append(_cell(row, ours))
                found.append((one.title, dtype, str(n), *cells))
    return found


def _cell(row: Mapping[str, Any] | None, ours: Mapping[str, Any]) -> str:
    if row is None:
        return ""
    if "reason" in row:
        return row["reason"]
    digits = 0 if row["median_ms"] >= 1000 else 1
    times = f"{row['median_ms']:,.{digits}f} ({row['p10_ms']:,.{digits}f} to {row['p90_ms']:,.{digits}f})"
    return times if row["name"] == PATCHED else f"{times} [{row['median_ms'] / ours['median_ms']:.1f} x]"


def _memory(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    found = []
    for dtype, peaks in data["memory"].items():
        cells = []
        for name in TIMED:
            peak = peaks.get(name, {}) if name in CONTENDERS[STEP] else {}
            cells.append(f"{peak['extra'] / 1e6:,.0f}" if "extra" in peak else peak.get("reason", ""))
        ours, slow = peaks.get(PATCHED, {}), peaks.get(SLOW, {})
        if "extra" in ours and "extra" in slow:
            cells[list(TIMED).index(PATCHED)] += f" ({ours['extra'] / slow['extra']:.2f} of transformers')"
        found.append((dtype, *cells))
    return found
