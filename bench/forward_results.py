"""What a run of the forward bench leaves: what forward_table.py prints and plot_forward.py draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import forward_models
import forward_rivals
from forward_cases import BATCHES, CONTEXT, DIM, OURS, PRECISIONS, TIMED_CALLS, WARM_CALLS, name_of
from paired import Contender, Plan
from results import Record, figures

COMPUTE = "bound: compute"
TIMED = {
    OURS: "fastlvm.predictor.forward.Forward on a numpy array of one context, matrices packed in the named precision",
    **{rival.name: rival.timed for rival in forward_rivals.RIVALS},
    COMPUTE: "compute() of bench/bound.cpp: the exp and multiply-adds of all scans, softplus and SiLU, on registers",
    "bound: stream": "read() of bench/bound.cpp: as many bytes as the packed weights, on huge pages",
}


def stream_of(precision: str) -> str:
    return f"bound: stream {precision}"


class ForwardResults(Record):
    """Filled by bench_forward.py. Rows of `rounds` are paired: only they are divided by each other."""

    def __init__(self, plan: Plan, threads: Sequence[int]) -> None:
        super().__init__(plan, threads)
        self.parameters = 0
        self.bytes: dict[str, int] = {}  # of the packed weights, by precision
        self.cosines: dict[str, tuple[float, float]] = {}  # least and mean to the float32 model, by name
        self.reasons: dict[str, str] = {}  # why a rival is not timed
        self.notes: dict[str, str] = {}
        self.rounds: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []  # consecutive ones
        self.hogged: list[dict[str, Any]] = []
        self.batches: list[dict[str, Any]] = []
        self.others: list[dict[str, Any]] = []  # models of forward_models.py

    @property
    def any(self) -> bool:
        return bool(self.rounds or self.calls or self.hogged or self.batches or self.others)

    def add_rounds(self, contenders: Sequence[Contender]) -> None:
        for one in contenders:
            if one.seconds:
                first = float(np.median(one.first)) * 1e3 if one.first else None
                self.rounds.append({"name": one.name, **figures(one), "first_ms": first})

    def add_calls(self, precision: str, threads: int, seconds: Sequence[float]) -> None:
        self.calls.append({"name": name_of(precision), "threads": threads, **_percentiles(seconds)})

    def add_hogged(
        self, precision: str, threads: int, quiet: Sequence[float], busy: Sequence[float], hogs: int
    ) -> None:
        row = {"name": name_of(precision), "threads": threads, "hogs": hogs}
        self.hogged.append({**row, "quiet": _percentiles(quiet), "busy": _percentiles(busy)})

    def add_batch(self, precision: str, threads: int, n: int, seconds: Sequence[float]) -> None:
        window = float(np.median(seconds)) / n * 1e3
        row = {"name": name_of(precision), "threads": threads, "n": n, "calls": len(seconds)}
        self.batches.append({**row, "ms_per_window": window})

    def add_other(self, model: str, precision: str, threads: int, size: int, seconds: Sequence[float]) -> None:
        row = {"name": model, "precision": precision, "threads": threads, "bytes": size}
        self.others.append({**row, **_percentiles(seconds)})

    def complete(self) -> bool:
        """Whether ours have been timed in every way, on every number of threads."""
        each = {(name_of(precision), n) for precision in PRECISIONS for n in self.threads}
        parts = (self.rounds, self.calls, self.hogged)
        wanted = [
            *((each, part, "threads") for part in parts),
            ({(name, n) for name in forward_models.MODELS for n in self.threads}, self.others, "threads"),
            ({(name_of(precision), n) for precision in PRECISIONS for n in BATCHES}, self.batches, "n"),
        ]
        return all(rows <= {(row["name"], row[by]) for row in part} for rows, part, by in wanted)

    def data(self) -> dict[str, Any]:
        return {
            **self.surroundings(forward_rivals.PACKAGES),
            "model": {"name": "mamba-s", "context": CONTEXT, "dim": DIM, "parameters": self.parameters},
            "timed": TIMED,
            "round": {"warm": WARM_CALLS, "timed": TIMED_CALLS},
            "bytes": self.bytes,
            "cosines": self.cosines,
            "reasons": self.reasons,
            "notes": self.notes,
            "paired": self.rounds,
            "calls": self.calls,
            "hogged": self.hogged,
            "batches": self.batches,
            "others": self.others,
        }


def _percentiles(seconds: Sequence[float]) -> Mapping[str, float]:
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1e3
    return {"calls": len(seconds), "p50_ms": float(p50), "p95_ms": float(p95), "p99_ms": float(p99)}
