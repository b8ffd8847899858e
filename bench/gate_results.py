"""What a run of the gate bench leaves: what gate_table.py prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import forward_rivals
import gate_rivals
import make_payload
from fastlvm.evaluation import Verdict
from fastlvm.evaluation.gate_file import RECALL
from gate_cases import ASKED, CLIENTS, HEAD, PRECISION, RECALLED, STAGES, TUNING, K
from paired import Contender, Plan
from results import Record

OURS = "fastlvm"
PACKAGES = (*forward_rivals.PACKAGES, "faiss-cpu", "usearch")
TIMED = {
    "model": f"Predictor.predict of one context, {PRECISION} weights, or the rival's forward of forward_rivals.py",
    "search": f"Index.search for the {K} nearest to one prediction, index of kind ivf_rabitq, or the rival's search",
    "end_to_end": "Predictor.search of one context, both in one call, or the rival's forward and then its search",
    "reranker": f"Predictor.rerank of one context, the {K} nearest in another order; keys are given",
    **gate_rivals.TIMED,
}


class GateResults(Record):
    """Filled by test_latency_gate.py. Rows of `paired` are timed in turn: only they are divided by each other."""

    def __init__(self, plan: Plan, threads: Sequence[int]) -> None:
        super().__init__(plan, threads)
        self.setting: dict[str, Any] = {}  # rows, kind, options, bytes read, how real predictions are
        self.indexes: dict[str, dict[str, Any]] = {}  # by name: options, recall, bytes a row, build_s
        self.reasons: dict[str, str] = {}  # why a rival is not timed
        self.calls: list[dict[str, Any]] = []  # consecutive ones
        self.paired: list[dict[str, Any]] = []
        self.load_rows: list[dict[str, Any]] = []  # several clients
        self.rerankers: list[dict[str, Any]] = []  # one after a prediction
        self.batches: list[dict[str, Any]] = []
        self.verdicts: list[dict[str, Any]] = []

    @property
    def any(self) -> bool:
        return bool(self.calls or self.paired or self.load_rows or self.rerankers or self.batches or self.verdicts)

    def add_calls(self, stage: str, threads: int, seconds: Sequence[float]) -> None:
        self.calls.append({"stage": stage, "threads": threads, **percentiles(seconds)})

    def add_paired(self, stage: str, contenders: Sequence[Contender]) -> None:
        for one in contenders:
            if one.seconds:
                self.paired.append(
                    {"stage": stage, "name": one.name, "threads": one.threads, **percentiles(one.seconds)}
                )

    def add_load(self, clients: int, threads: int, seconds: Sequence[float], elapsed: float) -> None:
        row = {"clients": clients, "threads": threads, "per_s": len(seconds) / elapsed}
        self.load_rows.append(row | percentiles(seconds))

    def add_reranker(self, stage: str, uses_keys: bool, threads: int, costs: Sequence[Mapping[str, float]]) -> None:
        """costs: seconds of a call by stage, those of the whole being "end_to_end"."""
        row = {"name": stage, "uses_keys": uses_keys, "threads": threads}
        self.rerankers.append(row | {name: percentiles([cost[name] for cost in costs]) for name in costs[0]})

    def add_batch(self, name: str, threads: int, queries: int, seconds: Sequence[float]) -> None:
        median = float(np.median(seconds))
        row = {"name": name, "threads": threads, "queries": queries, "calls": len(seconds)}
        self.batches.append(row | {"per_s": queries / median})

    def add_verdicts(self, verdicts: Sequence[Verdict], threads: int) -> None:
        self.verdicts += [
            {**one.to_dict(), "threads": threads, "measured": one.measured, "verdict": one.word} for one in verdicts
        ]

    def figures(self, threads: int) -> dict[str, float]:
        """What gates limit, of the consecutive calls on so many threads."""
        called = {"end_to_end": "total"}
        found = {
            f"{called.get(row['stage'], row['stage'])}_{percentile}_ms": row[f"{percentile}_ms"]
            for row in self.calls
            if row["threads"] == threads
            for percentile in ("p50", "p95", "p99")
        }
        recall = self.indexes.get(OURS, {}).get("recall")
        return found if recall is None else found | {RECALL: recall}

    def complete(self) -> bool:
        """Whether ours have been timed in every way over all rows, and judged."""
        each = {(stage, n) for stage in STAGES for n in self.threads}
        return bool(
            self.setting.get("rows") == make_payload.ROWS
            and each <= {(row["stage"], row["threads"]) for row in self.calls}
            and each <= {(row["stage"], row["threads"]) for row in self.paired if row["name"] == OURS}
            and {(c, n) for c in CLIENTS for n in self.threads}
            <= {(r["clients"], r["threads"]) for r in self.load_rows}
            and self.rerankers
            and self.batches
            and self.verdicts
        )

    def data(self) -> dict[str, Any]:
        return {
            **self.surroundings(PACKAGES),
            **self.setting,
            "asked": {"recall": ASKED, "chosen_on": TUNING, "measured_on": RECALLED, "head": HEAD},
            "timed": TIMED,
            "verdicts": self.verdicts,
            "calls": self.calls,
            "paired": self.paired,
            "indexes": self.indexes,
            "load_rows": self.load_rows,
            "rerankers": self.rerankers,
            "batches": self.batches,
            "reasons": self.reasons,
        }


def percentiles(seconds: Sequence[float]) -> Mapping[str, float]:
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1e3
    return {"calls": len(seconds), "p50_ms": float(p50), "p95_ms": float(p95), "p99_ms": float(p99)}
