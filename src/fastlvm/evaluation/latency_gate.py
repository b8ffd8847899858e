"""What gates say of the time one prediction takes and of what its search finds: the verdict on a timed artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fastlvm.errors import InputError
from fastlvm.evaluation.gate_file import PERCENTILES, RECALL, Gate, Limit, load_gate
from fastlvm.evaluation.gates import Found, Verdict, verdicts
from fastlvm.evaluation.latency import Latency

K = 50
"""Chunks a gated search is for."""


def load_gates(gates: Iterable[str]) -> list[Gate]:
    """The gates of these names and files, each once. Raises InputError for one that says nothing of time or search."""
    found = list(dict.fromkeys(load_gate(gate) for gate in gates))
    for gate in found:
        if not is_judged(gate):
            raise InputError(f"gate {gate.name} limits neither latency nor search: fastlvm eval --gates judges it")
    return found


def is_judged(gate: Gate) -> bool:
    """Whether a gate says anything of time or search."""
    return any(limit.kind != "metric" for limit in gate.limits)


def threads_of(gates: Iterable[Gate], given: int | None) -> int | None:
    """The number of threads to time on: that of the gates, or the given one. Raises InputError where they differ."""
    threads = given
    for gate in gates:
        if gate.threads is None:
            continue
        if threads is not None and threads != gate.threads:
            raise InputError(f"gate {gate.name} is for threads {gate.threads}, and not {threads}: run it by itself")
        threads = gate.threads
    return threads


def figures(latency: Latency, recall: float) -> dict[str, float]:
    """What gates limit, by its name, of what was measured."""
    found = {
        f"{name}_{percentile}_ms": getattr(stage, percentile)
        for name, stage in latency.stages.items()
        for percentile in PERCENTILES
    }
    return found | {RECALL: recall}


def judge(gates: Iterable[Gate], latency: Latency, recorded: float | None) -> list[Verdict]:
    """Verdicts on what was timed and on the recall that an index has on record: None for one that is exact."""
    found = figures(latency, 1.0 if recorded is None else recorded)
    notes = {RECALL: "exact" if recorded is None else "recorded when the index was built"}
    return [verdict for gate in gates for verdict in check(gate, found, notes)]


def check(gate: Gate, measured: Mapping[str, float], notes: Mapping[str, str] | None = None) -> list[Verdict]:
    """A verdict a limit; metrics are not judged here. notes: where a figure is from, by its name."""
    said = notes or {}

    def find(limit: Limit) -> Found:
        if limit.kind == "metric":
            return Found(note="by a report", judged=False)
        return Found(measured.get(limit.name), said.get(limit.name, ""))

    return verdicts(gate, find)
