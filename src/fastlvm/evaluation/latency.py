"""How long one prediction takes: model, search and both together, batch 1, with the machine and threads it ran on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastlvm.errors import InputError


@dataclass(frozen=True)
class Stage:
    """Milliseconds of one stage."""

    p50: float
    p95: float
    p99: float
    mean: float

    @classmethod
    def of(cls, seconds: np.ndarray) -> Stage:
        p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1e3
        return cls(float(p50), float(p95), float(p99), float(np.mean(seconds) * 1e3))


@dataclass(frozen=True)
class Latency:
    """Stages by name, and how they were measured."""

    stages: Mapping[str, Stage]
    repeats: int
    warmup: int
    threads: int | None
    machine: str
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        return {
            "unit": "ms",
            "batch": 1,
            "stages": {name: vars(stage) | {} for name, stage in self.stages.items()},
            "repeats": self.repeats,
            "warmup": self.warmup,
            "threads": self.threads,
            "machine": self.machine,
            "device": self.device,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Latency:
        stages = {name: Stage(**stage) for name, stage in raw["stages"].items()}
        return cls(stages, raw["repeats"], raw["warmup"], raw["threads"], raw["machine"], raw.get("device", "cpu"))


def measure(
    calls: Mapping[str, Callable[[int], Any]], *, warmup: int = 20, repeats: int = 200, threads: int | None = None
) -> Latency:
    """Time each call by itself. A call gets the number of the repeat, so that it can take another input every time.

    threads is what the caller set its libraries to; it is stated, not changed. The calls alternate, so that a slow
    spell of the machine touches all of them.
    """
    _check(warmup, repeats)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-warmup, repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call(i + warmup)
            elapsed = time.perf_counter() - start
            if i >= 0:
                seconds[name].append(elapsed)
    stages = {name: Stage.of(np.asarray(values)) for name, values in seconds.items()}
    return Latency(stages, repeats, warmup, threads, machine())


def measure_retrieval(
    predict: Callable[[np.ndarray], np.ndarray],
    search: Callable[[np.ndarray], Any],
    contexts: np.ndarray,
    *,
    warmup: int = 20,
    repeats: int = 200,
    threads: int | None = None,
) -> Latency:
    """Time `predict(context)` and `search(prediction)` on contexts [n, L, dim], one at a time.

    Stages: model, search, total. The total is measured around both, not added up. Contexts are taken in turn.
    """
    _check(warmup, repeats)
    if len(contexts) == 0:
        raise InputError("contexts is empty: at least one context is needed to time a prediction")
    times = np.empty((repeats, 3))
    for i in range(-warmup, repeats):
        context = contexts[(i + warmup) % len(contexts)]
        start = time.perf_counter()
        prediction = predict(context)
        middle = time.perf_counter()
        search(prediction)
        end = time.perf_counter()
        if i >= 0:
            times[i] = middle - start, end - middle, end - start
    stages = {name: Stage.of(times[:, i]) for i, name in enumerate(("model", "search", "total"))}
    return Latency(stages, repeats, warmup, threads, machine())


def measure_predictor(
    predictor: Any,
    contexts: np.ndarray,
    k: int,
    *,
    stages: Sequence[Any] = (),
    warmup: int = 50,
    repeats: int = 2000,
    threads: int | None = None,
) -> Latency:
    """Time a `fastlvm.Predictor` on raw contexts [n, L, dim], one at a time, in turn.

    Stages: model (`predict`), search (the index alone), total (`search`, which is both). With rerankers `stages` of
    the k that are found, `rerank` is the total, and what each of them and their inputs took in it stands before it.
    """
    if np.ndim(contexts) != 3 or len(contexts) == 0:
        raise InputError(f"contexts has shape {list(np.shape(contexts))}, and [n, L, dim] with n ≥ 1 is wanted")
    predicted = predictor.predict(contexts)

    def context(i: int) -> np.ndarray:
        return contexts[i % len(contexts)]

    costs: list[dict[str, float]] = []

    def whole(i: int) -> None:
        if not stages:
            predictor.search(context(i), k)
            return
        took: dict[str, float] = {}
        for cost in predictor.rerank(context(i), stages, k, candidates=k).stages:
            took[cost.name] = took.get(cost.name, 0) + cost.ms
        costs.append(took)

    calls = {
        "model": lambda i: predictor.predict(context(i)),
        "search": lambda i: predictor.index.search(predicted[i % len(predicted)][None], k),
        "total": whole,
    }
    timed = measure(calls, warmup=warmup, repeats=repeats, threads=threads)
    total = timed.stages["total"]
    within = {name: Stage.of(np.array([took[name] for took in costs[warmup:]]) / 1e3) for name in (costs or [{}])[0]}
    alone = {name: stage for name, stage in timed.stages.items() if name != "total"}
    return replace(timed, stages={**alone, **within, "total": total})


def machine() -> str:
    """The processor's name, the cores this process may use and the operating system; never the host's name."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    return f"{_processor()}, {cores} cores, {platform.system()} {platform.machine()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return platform.processor() or platform.machine()


def _check(warmup: int, repeats: int) -> None:
    if warmup < 0 or repeats < 1:
        raise InputError(f"warmup is {warmup} and repeats {repeats}: wanted are warmup ≥ 0 and repeats ≥ 1")
