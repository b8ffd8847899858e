"""Contenders timed in turn: a round runs each of them once, so that a slow spell of the machine touches all."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import fastlvm
from fastlvm import _C

# After a call, while the threads of whoever made it still spin.
_SETTLE = 0.01
# Untimed calls before a timed one of less than _LONG take _WARM at least: they wake the threads and raise the clock.
_WARM, _LONG = 0.005, 0.05


@dataclass(frozen=True)
class Plan:
    """How many rounds a contender gets, by what one of its calls takes.

    rounds for calls below a second, four times as many below 5 ms; for longer ones what fits into `patience` seconds,
    but one at least, and `least` where a target hangs on it. In a round a contender makes `warm` calls at least, which
    are not timed (none where a call is long), and then `burst` timed ones.
    """

    rounds: int = 30
    patience: float = 10.0
    least: int = 3
    warm: int = 1
    burst: int = 1

    def of(self, seconds: float, decisive: bool) -> int:
        if seconds < 0.005:
            return 4 * self.rounds
        if seconds < 1:
            return self.rounds
        return min(self.rounds, max(self.least if decisive else 1, int(self.patience / seconds)))


@dataclass
class Contender:
    """`call` on a number of threads, under one instruction set. `expected` seconds are for the plan only."""

    name: str
    call: Callable[[], Any]
    threads: int
    isa: str
    expected: float = 0.0
    decisive: bool = False  # a target hangs on it
    prepare: Callable[[], None] | None = None  # called before its calls of a round, and not timed
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds of the call after everybody else's, of every round

    def pin(self, warm: int = 1) -> None:
        """Give torch and the kernels this contender's threads and instruction set, and let the caches warm up."""
        self._pin()
        time.sleep(_SETTLE)
        if self.expected < _LONG:
            start = time.perf_counter()
            self.first.append(self._timed())
            for done in itertools.count(1):
                if done >= warm and time.perf_counter() - start > _WARM:
                    return
                self.call()

    def trial(self) -> Any:
        """One call for its result, which also says what to expect of the next one."""
        self._pin()
        start = time.perf_counter()
        result = self.call()
        self.expected = time.perf_counter() - start
        return result

    def time(self, plan: Plan) -> None:
        """A round."""
        self.pin(plan.warm)
        self.seconds += [self._timed() for _ in range(plan.burst)]

    def _pin(self) -> None:
        pin(self.threads, self.isa)
        if self.prepare is not None:
            self.prepare()

    def _timed(self) -> float:
        start = time.perf_counter()
        result = self.call()
        seconds = time.perf_counter() - start
        del result
        return seconds


def pin(threads: int, isa: str) -> None:
    torch.set_num_threads(threads)
    fastlvm.set_num_threads(threads)
    _C.set_isa(isa)


def measure(benchmark: Any, lead: Contender, others: Sequence[Contender], plan: Plan) -> None:
    """Fill `seconds` of all; `lead` is what pytest-benchmark itself times, and has a round whenever another one has.

    A contender with fewer rounds than the others has them spread evenly over the run.
    """
    counts = [plan.of(other.expected, other.decisive) for other in others]
    total = max([plan.of(lead.expected, True), *counts])
    calls = 0  # of the lead

    def others_first() -> None:
        nonlocal calls
        done, within = divmod(calls, plan.burst)
        calls += 1
        if within:
            return
        for other, count in zip(others, counts, strict=True):
            if (done + 1) * count // total > done * count // total:
                other.time(plan)
        lead.pin(plan.warm)

    collecting = gc.isenabled()
    gc.disable()
    try:
        benchmark.pedantic(lead.call, setup=others_first, rounds=plan.burst * total)
    finally:
        if collecting:
            gc.enable()
    if benchmark.stats is not None:
        lead.seconds = list(benchmark.stats.stats.data)
