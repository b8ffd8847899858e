"""Limits on how long one prediction takes and on what its search finds, kept as data, and the verdict on figures.

A gate is a table of figures: `<stage>_<percentile>_ms` at most, with stage model, search or end_to_end and percentile
p50, p95 or p99, and `recall_at_50` at least; `threads`, where given, is the number it holds on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastlvm.errors import GateError, InputError, shown
from fastlvm.evaluation import gates
from fastlvm.evaluation.gates import Threshold
from fastlvm.evaluation.latency import Latency

K = 50
"""Chunks a gated search is for."""

RECALL = "recall_at_50"
STAGES = {"model": "model", "search": "search", "end_to_end": "total"}
"""Stages as gates call them, and as `measure_predictor` does."""

_PERCENTILES = ("p50", "p95", "p99")
FIGURES = (*(f"{stage}_{percentile}_ms" for stage in STAGES for percentile in _PERCENTILES), RECALL)


@dataclass(frozen=True)
class LatencyGate:
    """What has to hold for one context a call, on `threads` threads or, with None, on as many as are used."""

    name: str
    limits: tuple[Threshold, ...]
    threads: int | None = None


@dataclass(frozen=True)
class Verdict:
    """One limit of a gate and what was measured; None does not pass. note: where the figure is from, if said."""

    gate: str
    limit: Threshold
    value: float | None
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.value is not None and self.limit.passed(self.value)

    @property
    def word(self) -> str:
        return "not measured" if self.value is None else "met" if self.passed else "missed"

    @property
    def wanted(self) -> str:
        return f"{self.limit.metric} {self.limit.wanted()}"

    @property
    def measured(self) -> str:
        """The figure, with as many digits as tell it from a limit that it misses."""
        if self.value is None:
            return "–"
        digits = 3
        while self.limit.passed(round(self.value, digits)) != self.passed:
            digits += 1
        return f"{self.value:.{digits}f}" + (f" ({self.note})" if self.note else "")

    def __str__(self) -> str:
        return f"{self.limit.metric} is {self.measured}, and {self.limit.wanted()} is wanted"

    def to_dict(self) -> dict[str, Any]:
        row = {"gate": self.gate, "metric": self.limit.metric, "wanted": self.limit.wanted(), "value": self.value}
        return row | {"passed": self.passed, "note": self.note}


def parse(tables: Mapping[str, Any]) -> dict[str, LatencyGate]:
    """Gates by name from a table each. Raises InputError naming the gate and the entry that is wrong."""
    return {name: _gate(name, table) for name, table in tables.items()}


def _gate(name: str, table: Any) -> LatencyGate:
    if not isinstance(table, Mapping):
        raise InputError(f"gate {name} is {shown(table)}, and a table of limits is wanted")
    threads, limits = None, []
    for entry, value in table.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if entry == "threads":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"gate {name} has threads {shown(value)}, and a whole number from 1 on is wanted")
            threads = value
        elif entry not in FIGURES:
            raise InputError(f"gate {name} limits {shown(entry)}: choose of {', '.join(FIGURES)} and threads")
        elif entry == RECALL:
            if not number or not 0 < value <= 1:
                raise InputError(f"gate {name} has {RECALL} {shown(value)}, and a share above 0 and up to 1 is wanted")
            limits.append(Threshold(entry, float(value)))
        else:
            if not number or not 0 < value < float("inf"):
                raise InputError(f"gate {name} has {entry} {shown(value)}, and milliseconds above 0 are wanted")
            limits.append(Threshold(entry, float(value), at_most=True))
    if not limits:
        raise InputError(f"gate {name} limits nothing: give it one of {', '.join(FIGURES)}")
    return LatencyGate(name, tuple(limits), threads)


def _seeds(name: str) -> dict[str, float]:
    """What a gate of a report has to say of time."""
    return {"end_to_end_p95_ms": next(limit.bound for limit in gates.GATES[name] if limit.metric == "p95_ms")}


GATES: dict[str, LatencyGate] = parse(
    {
        **{name: _seeds(name) for name in ("epoch4", "final", "target", "stretch")},
        "ours": {
            "threads": 2,
            "end_to_end_p50_ms": 0.85,
            "end_to_end_p95_ms": 1.0,
            "search_p95_ms": 0.30,
            RECALL: 0.95,
        },
        "ours-1-thread": {"threads": 1, "end_to_end_p95_ms": 1.8, RECALL: 0.95},
    }
)
"""The gates by name; those of `bench/gates.toml`."""


def named(names: Iterable[str]) -> list[LatencyGate]:
    """The gates of these names, each once. Raises InputError for one that is not known."""
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        if name not in GATES:
            raise InputError(f"gate {name!r} is not known: choose of {', '.join(GATES)}")
    return [GATES[name] for name in wanted]


def threads_of(chosen: Iterable[LatencyGate], given: int | None) -> int | None:
    """The number of threads to time on: that of the gates, or the given one. Raises InputError where they differ."""
    threads = given
    for gate in chosen:
        if gate.threads is None:
            continue
        if threads is not None and threads != gate.threads:
            raise InputError(f"gate {gate.name} is for threads {gate.threads}, and not {threads}: run it by itself")
        threads = gate.threads
    return threads


def figures(latency: Latency, recall: float | None = None) -> dict[str, float]:
    """What gates limit, by name, of what was measured."""
    found = {
        f"{stage}_{percentile}_ms": getattr(latency.stages[name], percentile)
        for stage, name in STAGES.items()
        if name in latency.stages
        for percentile in _PERCENTILES
    }
    return found if recall is None else found | {RECALL: recall}


def judge(chosen: Iterable[LatencyGate], latency: Latency, recorded: float | None) -> list[Verdict]:
    """Verdicts on what was timed and on the recall that an index has on record: None for one that is exact."""
    found = figures(latency, 1.0 if recorded is None else recorded)
    notes = {RECALL: "exact" if recorded is None else "recorded when the index was built"}
    return [verdict for gate in chosen for verdict in check(gate, found, notes)]


def enforce(verdicts: Iterable[Verdict]) -> None:
    """Raises GateError that says what is missed, if anything is."""
    missed: dict[str, list[str]] = {}
    for verdict in verdicts:
        if not verdict.passed:
            missed.setdefault(verdict.gate, []).append(str(verdict))
    if missed:
        raise GateError("; ".join(f"gate {gate} missed: {', '.join(rows)}" for gate, rows in missed.items()))


def check(gate: LatencyGate, measured: Mapping[str, float], notes: Mapping[str, str] | None = None) -> list[Verdict]:
    """A verdict a limit; what was not measured does not pass. notes: where a figure is from, by its name."""
    said = notes or {}
    return [Verdict(gate.name, limit, measured.get(limit.metric), said.get(limit.metric, "")) for limit in gate.limits]
