"""The check of a report against gates, and what came of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastlvm.errors import GateError, InputError
from fastlvm.evaluation.gate_file import Gate, Limit, load_gate


class Found(NamedTuple):
    """What a limit is of, as it was measured: None, not at all. note: where from, or why not.

    judged: whether it is decided here; what is not can be neither met nor missed.
    """

    value: float | None = None
    note: str = ""
    judged: bool = True


@dataclass(frozen=True)
class Verdict:
    """One limit of a gate and what was found. An unmeasured figure does not pass. model: whose it is, where said."""

    gate: str
    limit: Limit
    value: float | None = None
    note: str = ""
    judged: bool = True
    model: str = ""

    @property
    def passed(self) -> bool:
        return self.value is not None and self.limit.passed(self.value)

    @property
    def missed(self) -> bool:
        return self.judged and not self.passed

    @property
    def word(self) -> str:
        if not self.judged:
            return "not judged"
        return "not measured" if self.value is None else "met" if self.passed else "missed"

    @property
    def wanted(self) -> str:
        return f"{self.limit.name} {self.limit.wanted}"

    @property
    def measured(self) -> str:
        """The figure, with as many digits as tell it from a limit that it misses."""
        note = f" ({self.note})" if self.note else ""
        if self.value is None:
            return f"–{note}"
        digits = 4 if self.limit.kind == "metric" else 3
        while self.limit.passed(round(self.value, digits)) != self.passed:
            digits += 1
        return f"{self.value:.{digits}f}{note}"

    def __str__(self) -> str:
        if self.value is not None:
            return f"{self.limit.name} is {self.measured}, and {self.limit.wanted} is wanted"
        note = f" ({self.note})" if self.note else ""
        return f"{self.limit.name} is {self.word}{note}, and {self.limit.wanted} is wanted"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `passed` is null for what is not judged."""
        return {
            "gate": self.gate,
            **({"model": self.model} if self.model else {}),
            "metric": self.limit.name,
            "wanted": self.limit.wanted,
            "limit": self.limit.entry(),
            "value": self.value,
            "passed": self.passed if self.judged else None,
            "note": self.note,
        }


def verdicts(gate: Gate, find: Callable[[Limit], Found], model: str = "") -> list[Verdict]:
    """A verdict a limit, on what `find` says was measured of it."""
    return [Verdict(gate.name, limit, *find(limit), model=model) for limit in gate.limits]


def sentence(rows: Iterable[Verdict]) -> str:
    """What is missed, by gate and model; "" where nothing is."""
    missed: dict[str, list[str]] = {}
    for row in rows:
        if row.missed:
            by = f" by {row.model}" if row.model else ""
            missed.setdefault(f"gate {row.gate} missed{by}", []).append(str(row))
    return "; ".join(f"{who}: {', '.join(figures)}" for who, figures in missed.items())


def enforce(rows: Iterable[Verdict]) -> None:
    """Raises GateError that says what is missed, if anything is."""
    said = sentence(rows)
    if said:
        raise GateError(said)


def check(
    report: Any, gate: Gate | str | os.PathLike[str], *, model: str | None = None, out_of_domain: Any = None
) -> list[Verdict]:
    """Compare a report (a `Report` or its dict) with a gate (one, its name or its file), a verdict a limit.

    model: which ranker is meant, where the report holds several models. out_of_domain: a report of the same model on
    another corpus. Raises InputError for an unknown gate or model, and for a report of another split than the gate's.
    """
    gate = gate if isinstance(gate, Gate) else load_gate(gate)
    data = _as_dict(report)
    check_split(gate, data["windows"]["split"])
    ranker = _model(data, model)
    other = None
    if out_of_domain is not None:
        other = _as_dict(out_of_domain)
        if other["payload"]["id"] == data["payload"]["id"]:
            raise InputError("the out-of-domain report is on the same payload as the report: evaluate another corpus")

    def find(limit: Limit) -> Found:
        if limit.kind == "latency":
            return _latency(limit, data, ranker["name"], gate.threads)
        if limit.kind == "search":
            return Found(None, "fastlvm bench latency measures it")
        if limit.domain == "in":
            return _metric(limit, data, ranker)
        if other is None:
            return Found(None, "there is no report of another corpus")
        return _metric(limit, other, _model(other, ranker["name"]))

    return verdicts(gate, find, ranker["name"])


def check_split(gate: Gate, split: str) -> None:
    """Raises InputError unless a report of this split can be judged by the gate."""
    if gate.split not in (None, split):
        raise InputError(f"gate {gate.name} is about split {gate.split}, and not {split}: evaluate {gate.split}")


def _metric(limit: Limit, data: Mapping[str, Any], ranker: Mapping[str, Any]) -> Found:
    if limit.over:
        return _difference(limit, data, ranker["name"])
    section = ranker.get(limit.rows) or {}
    if limit.rows == "ann":
        section = section.get("metrics") or {}
    return Found((section.get(limit.figure) or {}).get("value"))


def _difference(limit: Limit, data: Mapping[str, Any], model: str) -> Found:
    for difference in data["differences"]:
        if (difference["model"], difference["baseline"]) == (model, limit.over):
            found = difference["metrics"].get(limit.figure) or {}
            side = "low" if limit.upward else "high"
            if found.get(side) is None:
                return Found(None, "the difference has no interval")
            return Found(found[side], f"the {side} end of the interval of {found['value']:.4f}")
    return Found(None, f"the report does not compare with {limit.over!r}")


def _latency(limit: Limit, data: Mapping[str, Any], model: str, threads: int | None) -> Found:
    latency = (data.get("latency") or {}).get(model)
    if latency is None:
        return Found(None, "only artifacts are timed")
    if threads not in (None, latency["threads"]):
        return Found(None, f"it was timed on {latency['threads']} threads, and not {threads}")
    return Found((latency["stages"].get(limit.figure) or {}).get(limit.percentile))


def _as_dict(report: Any) -> Mapping[str, Any]:
    return report if isinstance(report, Mapping) else report.to_dict()


def _model(data: Mapping[str, Any], wanted: str | None) -> Mapping[str, Any]:
    rankers = data["rankers"]
    if wanted is not None:
        found = [r for r in rankers if r["name"] == wanted]
        if not found:
            raise InputError(f"the report has no ranker {wanted!r}: it holds {', '.join(r['name'] for r in rankers)}")
        return found[0]
    models = [r for r in rankers if r["kind"] == "model"]
    if len(models) != 1:
        names = ", ".join(r["name"] for r in models) or "none"
        raise InputError(f"the report holds {len(models)} models ({names}), and a gate judges one: name it")
    return models[0]
