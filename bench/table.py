"""The tables of a run, as Markdown: targets, times, bound, instruction sets.

python bench/table.py bench/results/FILE.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cases import SCANS, Target, id_of
from cells import count, figure, ratio, section

RIVALS = ("reference", "torch.compile", "transformers", "mambapy")
OTHERS = {
    "causal_conv1d": ("fastlvm", "reference", "F.conv1d"),
    "ssd_scan": ("fastlvm", "reference"),
    "ssm_step": ("fastlvm", "reference"),
}
AVX2_AT_LEAST = 1.5
ALLOWANCE = 64e6  # bytes


class Run:
    """The data of results.py, with its figures by case, name, threads and instruction set."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.cases: dict[str, dict[str, Any]] = data["cases"]
        self.threads: list[int] = data["threads"]
        self._rows = {(r["case"], r["name"], r["threads"], r["isa"]): r for r in data["rows"] if "reason" not in r}
        self._reasons = {(r["case"], r["name"]): r["reason"] for r in data["rows"] if "reason" in r}

    def row(self, case: str, name: str, threads: int | None = None, isa: str | None = None) -> dict[str, Any] | None:
        """On the most threads and with the best instruction set if not said otherwise."""
        return self._rows.get((case, name, threads or self.threads[-1], isa or self.data["isa"]))

    def ms(self, case: str, name: str, threads: int | None = None, isa: str | None = None) -> float | None:
        row = self.row(case, name, threads, isa)
        return row["median_ms"] if row else None

    def reason(self, case: str, name: str) -> str | None:
        return self._reasons.get((case, name))

    def times(self, case: str, name: str, other: str = "fastlvm", threads: int | None = None) -> float | None:
        """How many times as long as `other` it takes."""
        return ratio(self.ms(case, name, threads), self.ms(case, other, threads))

    def bound(self, case: str, threads: int | None = None) -> float | None:
        """Milliseconds of the slower of the two loops."""
        found = [self.ms(case, f"bound: {loop}", threads) for loop in ("compute", "stream")]
        return None if None in found else max(found)  # type: ignore[type-var]

    def over_bound(self, case: str, threads: int | None = None) -> float | None:
        return ratio(self.ms(case, "kernel", threads), self.bound(case, threads))


# --- targets


def verdict(run: Run, case: str, target: Target) -> tuple[str, str]:
    """What was measured, and "met", "missed" or "not measured"."""
    if run.threads[-1] != 2 and target.kind != "memory":
        return f"on {run.threads[-1]} threads", "not measured"
    shown, good = _JUDGES.get(target.kind, _speed)(run, case, target)
    return shown, "not measured" if good is None else "met" if good else "missed"


def _speed(run: Run, case: str, target: Target) -> tuple[str, bool | None]:
    found = run.times(case, target.kind)
    if found is None:
        return run.reason(case, target.kind) or "", None
    return f"{found:.1f} ×", found >= target.limit


def _ms(run: Run, case: str, target: Target) -> tuple[str, bool | None]:
    names = ("fastlvm", "fastlvm, numpy", "kernel")
    found = {name: run.ms(case, name) for name in names}
    if found["fastlvm"] is None:
        return "", None
    labels = zip(("torch tensors", "numpy arrays", "kernel alone"), found.values(), strict=True)
    shown = ", ".join(f"{label} {value:.3f} ms" for label, value in labels if value is not None)
    return shown, found["fastlvm"] <= target.limit


def _bound(run: Run, case: str, target: Target) -> tuple[str, bool | None]:
    found = run.over_bound(case)
    return ("", None) if found is None else (f"{found:.2f} ×", found <= target.limit)


def _threads(run: Run, case: str, target: Target) -> tuple[str, bool | None]:
    op, kernel = (ratio(run.ms(case, name, 1), run.ms(case, name, 2)) for name in ("fastlvm", "kernel"))
    if op is None or kernel is None:
        return "", None
    return f"{op:.2f} × (kernel alone {kernel:.2f} ×)", op >= target.limit


def _avx2(run: Run, case: str, target: Target) -> tuple[str, bool | None]:
    found = ratio(run.ms(case, "kernel", isa="avx2"), run.ms(case, "kernel", isa="avx512"))
    loops = ratio(run.ms(case, "bound: compute", isa="avx2"), run.ms(case, "bound: compute", isa="avx512"))
    if found is None or loops is None:
        return "no AVX-512 here", None
    return f"{found:.2f} × (the bound's loop {loops:.2f} ×)", AVX2_AT_LEAST <= found <= target.limit


def _memory(run: Run, case: str, target: Target) -> tuple[str, bool | None]:
    found = run.cases[case].get("memory", {})
    if "extra" not in found:
        return found.get("reason", ""), None
    extra, arrays = found["extra"], found["arrays"]
    shown = f"{extra / 1e6:.0f} MB, inputs + outputs {arrays / 1e6:.0f} MB"
    return shown, extra <= target.limit * arrays + ALLOWANCE


_JUDGES = {"ms": _ms, "bound": _bound, "threads": _threads, "avx2": _avx2, "memory": _memory}


# --- tables


def markdown(data: dict[str, Any]) -> str:
    run = Run(data)
    load = "" if data["load"] is None else f" Load average before the run: {data['load']:.2f}."
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    parts = [
        f"{data['machine']}; {data['isa']}; {data['date']}. {versions}.{load}",
        f"Medians of {data['rounds']} rounds or more; a figure in brackets says how many where one call takes over a "
        "second and there were fewer.",
        section("Targets", ("shape", "target", "measured", ""), _targets(run)),
    ]
    for threads in run.threads:
        columns = ("fastlvm", "fastlvm, numpy", "kernel", *RIVALS)
        title = f"Milliseconds a call, {count(threads)} (how many times as long as fastlvm)"
        parts.append(section(title, ("shape", *columns), _times(run, "ssm_scan", columns, threads)))
    parts.append(_reasons(run))
    heads = ("shape", "threads", "10⁶ exp", "MB", "compute, ms", "stream, ms", "kernel, ms", "kernel ÷ bound")
    parts.append(section("The machine's own bound", heads, _bounds(run)))
    isas = [(isa, n) for isa in data["isas"] for n in run.threads if isa != "scalar" or n == run.threads[-1]]
    heads = ("shape", *(f"{isa}, {count(n)}" for isa, n in isas))
    parts.append(section("The kernel by instruction set, milliseconds", heads, _isas(run, isas)))
    for op, columns in OTHERS.items():
        for threads in run.threads:
            title = f"{op}, milliseconds a call, {count(threads)}"
            parts.append(section(title, ("shape", *columns), _times(run, op, columns, threads)))
    parts.append("### What is timed\n\n" + "\n".join(f"- {name}: {what}" for name, what in data["timed"].items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def _targets(run: Run) -> Iterable[Sequence[str]]:
    for case, targets in SCANS.items():
        if id_of(case) in run.cases:
            for target in targets:
                yield case.title, target.text, *verdict(run, id_of(case), target)


def _times(run: Run, op: str, columns: Sequence[str], threads: int) -> Iterable[Sequence[str]]:
    for case, about in run.cases.items():
        if about["op"] == op:
            yield about["title"], *(_time(run, case, name, threads) for name in columns)


def _time(run: Run, case: str, name: str, threads: int) -> str:
    row = run.row(case, name, threads)
    if row is None:
        return "–"
    fewer = f" [{row['rounds']}]" if row["rounds"] < run.data["rounds"] else ""
    times = run.times(case, name, threads=threads)
    against = f" ({times:.1f} ×)" if times is not None and name not in ("fastlvm", "fastlvm, numpy", "kernel") else ""
    return figure(row["median_ms"]) + fewer + against


def _reasons(run: Run) -> str:
    rows = [(run.cases[case]["title"], name, reason) for (case, name), reason in run._reasons.items()]
    return section("Not timed", ("shape", "rival", "why"), rows)


def _bounds(run: Run) -> Iterable[Sequence[str]]:
    for case, about in run.cases.items():
        for threads in run.threads:
            over = run.over_bound(case, threads)
            if about["op"] == "ssm_scan" and over is not None:
                names = ("bound: compute", "bound: stream", "kernel")
                figures = (_time(run, case, name, threads).partition(" (")[0] for name in names)
                work = (f"{about['exps'] / 1e6:.1f}", f"{about['megabytes']:.1f}")
                yield about["title"], str(threads), *work, *figures, f"{over:.2f}"


def _isas(run: Run, isas: Sequence[tuple[str, int]]) -> Iterable[Sequence[str]]:
    for case, about in run.cases.items():
        if about["op"] == "ssm_scan":
            found = (run.ms(case, "kernel", threads, isa) for isa, threads in isas)
            yield about["title"], *("–" if ms is None else figure(ms) for ms in found)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
