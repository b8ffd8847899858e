"""Thresholds a report has to pass, kept as data, and the check of a report against them.

Figures are fractions and milliseconds. A gate's P95 is that of model and search together, batch 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastlvm.errors import GateError, InputError


@dataclass(frozen=True)
class Threshold:
    """`metric` of the headline (context rows excluded), at least or at most `bound`.

    `p95_ms` is the report's total latency; `out_of_domain_cosine` the cosine of a second report, from another corpus.
    """

    metric: str
    bound: float
    at_most: bool = False

    def wanted(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}"

    def passed(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def _gate(contain: float | None, efficiency: float | None, recall: float, p95: float, ten: float | None = None):
    rows = [("Contain@50", contain), ("Eff@5", efficiency), ("R@5", recall), ("R@10", ten)]
    limits = [Threshold(metric, bound) for metric, bound in rows if bound is not None]
    return (*limits, Threshold("p95_ms", p95, at_most=True))


GATES: dict[str, tuple[Threshold, ...]] = {
    "epoch2": (Threshold("cosine", 0.50),),
    "epoch4": _gate(0.55, 0.65, 0.35, 2.0),
    "final": _gate(0.60, 0.68, 0.40, 1.45),
    "target": _gate(0.70, None, 0.50, 1.5, ten=0.65),
    "stretch": _gate(None, None, 0.532, 1.45),
    "deployment": (
        Threshold("cosine", 0.40),
        Threshold("out_of_domain_cosine", 0.15),
        Threshold("p95_ms", 50.0, at_most=True),
    ),
}
"""The gates by name; `deployment` reads its cosine from a report on the validation split."""


@dataclass(frozen=True)
class GateRow:
    """One threshold of a gate, what was measured, and whether it holds. An unmeasured figure does not pass."""

    gate: str
    metric: str
    wanted: str
    value: float | None
    passed: bool

    def __str__(self) -> str:
        got = "not measured" if self.value is None else f"{self.value:.4g}"
        return f"{self.metric} {got}, wanted {self.wanted}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "gate": self.gate,
            "metric": self.metric,
            "wanted": self.wanted,
            "value": self.value,
            "passed": self.passed,
        }


def check(report: Any, name: str, *, model: str | None = None, out_of_domain: Any = None) -> list[GateRow]:
    """Compare a report (a `Report` or its dict) with the gate `name`, one row per threshold.

    model: which ranker is meant, where the report holds several models. out_of_domain: a report of the same model on
    another corpus. Raises InputError for an unknown gate or model.
    """
    if name not in GATES:
        raise InputError(f"gate {name!r} is not known: choose one of {', '.join(GATES)}")
    data = _as_dict(report)
    ranker = _model(data, model)
    rows = []
    for threshold in GATES[name]:
        value = _measured(threshold.metric, data, ranker, out_of_domain)
        passed = value is not None and threshold.passed(value)
        rows.append(GateRow(name, threshold.metric, threshold.wanted(), value, passed))
    return rows


def enforce(report: Any, name: str, *, model: str | None = None, out_of_domain: Any = None) -> list[GateRow]:
    """`check`, raising a GateError that lists the thresholds missed; returns the rows when all hold."""
    rows = check(report, name, model=model, out_of_domain=out_of_domain)
    missed = [str(row) for row in rows if not row.passed]
    if missed:
        raise GateError(f"gate {name} missed: {'; '.join(missed)}")
    return rows


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


def _measured(metric: str, data: Mapping[str, Any], ranker: Mapping[str, Any], out_of_domain: Any) -> float | None:
    if metric == "p95_ms":
        latency = (data.get("latency") or {}).get(ranker["name"])
        return None if latency is None else latency["stages"]["total"]["p95"]
    if metric == "out_of_domain_cosine":
        if out_of_domain is None:
            return None
        other = _as_dict(out_of_domain)
        if other["payload"]["id"] == data["payload"]["id"]:
            raise InputError("the out-of-domain report is on the same payload as the report: evaluate another corpus")
        return _model(other, ranker["name"])["excluded"]["cosine"]["value"]
    return ranker["excluded"][metric]["value"]
