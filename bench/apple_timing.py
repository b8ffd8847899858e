"""Who is timed in a row of the Apple bench, and how: rounds in which each takes its turn, over inputs that rotate."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from apple_check import scrubbed

OURS = "fastlvm"
CPU = "fastlvm, CPU kernels"
LOOP = "a loop over time in mlx"
TORCH = "PyTorch, fastlvm's reference"
PATCHED, MLX_LM = "mlx-lm, patched by fastlvm", "mlx-lm"

ROTATED = 2e8  # bytes that the inputs of all calls reach past: more than the caches of a chip hold
_MOST_SETS, _QUEUED_S, _MOST_QUEUED, _LONG, _SLOW = 8, 0.02, 32, 0.05, 10.0


class Missing(Exception):
    """Why there is no such contender here."""


def wait_for_mlx(found: Any) -> None:
    mx.eval(found)
    mx.synchronize()


@dataclass
class Contender:
    """`call` starts the work on one set of inputs and gives what `wait` waits for; `around` is entered before."""

    name: str
    sets: Sequence[Any]
    call: Callable[[Any], Any]
    wait: Callable[[Any], None] = wait_for_mlx
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    seconds: list[float] = field(default_factory=list)  # of a call that is waited for
    queued: list[float] = field(default_factory=list)  # of a call among many that are waited for once
    rounds: int = 1
    burst: int = 1
    warm: bool = False  # an untimed call begins a turn: it wakes the device after whoever was before

    def prepare(self, budget: float) -> None:
        """Every set once; plan rounds for `budget` seconds or so, three at least unless one call takes longer.

        A call of _SLOW seconds is the only one.
        """
        with self.around():
            for given in [*self.sets, self.sets[0]]:
                start = time.perf_counter()
                self.wait(self.call(given))
                took = time.perf_counter() - start
                if took > _SLOW:
                    self.seconds, self.rounds = [took], 0
                    return
        self.warm = took < _LONG
        self.burst = max(1, min(_MOST_QUEUED, int(_QUEUED_S / took)))
        once = took * (1 + self.warm + (self.burst if self.burst > 1 else 0))
        self.rounds = max(1 if took > budget else 3, min(50, int(budget / once)))

    def turn(self, number: int) -> None:
        """One call, and a burst of calls where they are short."""
        at = number % len(self.sets)
        with self.around():
            if self.warm:
                self.wait(self.call(self.sets[at - 1]))
            start = time.perf_counter()
            self.wait(self.call(self.sets[at]))
            self.seconds.append(time.perf_counter() - start)
            if self.burst > 1:
                given = [self.sets[(at + i) % len(self.sets)] for i in range(self.burst)]
                start = time.perf_counter()
                self.wait([self.call(one) for one in given])
                self.queued.append((time.perf_counter() - start) / self.burst)

    def figures(self) -> dict[str, Any]:
        p10, p50, p90 = (1e3 * float(x) for x in np.percentile(self.seconds, [10, 50, 90]))
        found = {"median_ms": p50, "p10_ms": p10, "p90_ms": p90, "rounds": len(self.seconds)}
        if self.queued:
            found |= {"queued_ms": 1e3 * float(np.median(self.queued)), "queued_calls": self.burst}
        return found


def rounds(contenders: Sequence[Contender], entries: Sequence[dict[str, Any]] = ()) -> None:
    """Each in turn, one with fewer rounds spread over all; the figures go to the entries of their names."""
    total = max((one.rounds for one in contenders), default=0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(total):
            for one in contenders:
                if (number + 1) * one.rounds // total > number * one.rounds // total:
                    one.turn(number)
    finally:
        if collecting:
            gc.enable()
    named = {one.name: one for one in contenders}
    for entry in entries:
        if entry["name"] in named:
            entry.update(named[entry["name"]].figures())


@contextlib.contextmanager
def reasons(entry: dict[str, Any]) -> Iterator[None]:
    """Puts an error into a contender's entry as why it has no figures, and lets go of what it held."""
    try:
        yield
    except Missing as error:
        entry["reason"] = str(error)
    except ImportError as error:
        entry["reason"] = f"not installed: {scrubbed(error)}"
    except Exception as error:
        entry["reason"] = scrubbed(error)
    gc.collect()
    mx.clear_cache()


def verdict(ours: dict[str, Any]) -> bool | None:
    """Whether a row's result is right, by the entry of fastlvm's contender; None where nothing came of it."""
    return False if ours.get("wrong") else None if "reason" in ours else True


def sets_of(size: int) -> int:
    """How many sets of inputs of `size` bytes make up ROTATED."""
    return max(2, min(_MOST_SETS, -(-int(ROTATED) // max(size, 1))))


def bandwidth(tiny: bool) -> float:
    """Bytes a second of a kernel that reads 256 MB and writes as many, the best of its rounds."""
    size = (1 if tiny else 64) * (1 << 20)  # elements of 4 bytes
    copies = Contender("copy", [mx.random.uniform(shape=(size,)) for _ in range(2)], mx.negative)
    mx.eval(copies.sets)
    copies.prepare(0.2 if tiny else 1.0)
    rounds([copies])
    return 8.0 * size / min([*copies.seconds, *copies.queued])


def memory() -> int:
    """Bytes of memory that arrays may take on the default device, as far as it says."""
    about = device_info()
    return int(about.get("max_recommended_working_set_size") or about.get("memory_size") or 0) or 8 << 30


def device_info() -> dict[str, Any]:
    """Of the default device; versions of mlx before 0.31 have it under mx.metal."""
    ask: Any = getattr(mx, "device_info", None) or mx.metal.device_info
    return dict(ask())
