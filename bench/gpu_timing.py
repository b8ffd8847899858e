"""Times of calls on a GPU: graphs of several calls where they are short, rounds in turn, and what the device can do."""

from __future__ import annotations

import contextlib
import functools
import gc
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_case import Arrays
from gpu_rivals import Contender

_GRAPHED = 2.0  # ms: calls shorter than this are timed as a graph of one call for every set of inputs
_SLOW = 200.0  # ms: calls that take longer are warm enough after the one whose result was judged
_LONG = 5.0  # ms: calls longer than this have fewer than LAUNCHES
_ONCE_EACH = 2000.0  # ms that a call for every set of inputs may take
LAUNCHES = 100
_LEAST = 3


@dataclass
class Timed:
    """A contender on its way through the rounds. `milliseconds` are those of one call, `calls` of them a round."""

    name: str
    run: Callable[[], Any]
    calls: int
    rounds: int
    how: str
    host_us: float | None = None  # of a call from Python, without a graph, many of them in flight
    extra_mb: float | None = None  # the peak above what was allocated before the call, its results included
    milliseconds: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        p10, p50, p90 = np.percentile(self.milliseconds, [10, 50, 90]) * 1e3
        found = {"median_us": p50, "p10_us": p10, "p90_us": p90}
        found = {name: float(value) for name, value in found.items()}
        return {**found, "launches": self.calls * len(self.milliseconds), "how": self.how, **self._more()}

    def _more(self) -> dict[str, float]:
        more = {"host_us": self.host_us, "extra_mb": self.extra_mb}
        return {name: value for name, value in more.items() if value is not None}


class Device:
    """A GPU, or the processor of a rehearsal, where a clock of the host takes the place of events."""

    def __init__(self, name: str) -> None:
        self.name, self.gpu = name, name == "cuda"

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def once(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        ended = self.start(call)
        self.synchronize()
        return ended()

    def start(self, call: Callable[[], Any]) -> Callable[[], float]:
        """Make a call; what comes back gives its milliseconds once the device has been synchronized."""
        if not self.gpu:
            before = time.perf_counter()
            call()
            took = 1e3 * (time.perf_counter() - before)
            return lambda: took
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        return lambda: float(first.elapsed_time(last))

    def sets(self, size: float) -> int:
        """How many sets of inputs, of that many bytes each, reach past the L2 cache three times over."""
        cache = torch.cuda.get_device_properties(0).L2_cache_size if self.gpu else 0
        return int(min(16, max(2, np.ceil(3 * cache / max(size, 1)))))


def prepare(device: Device, one: Contender, sets: Sequence[Arrays], seconds: float) -> Timed:
    """Warmed up, captured where its calls are short, and planned: `seconds` for calls over 5 ms, `LAUNCHES` below."""
    given = [one.prepare(arrays) for arrays in sets]
    expected, extra = _weighed(device, lambda: one.call(given[0]))
    if expected < _SLOW:
        for arrays in given[:2]:
            one.call(arrays)
        expected = min(device.once(lambda: one.call(given[0])) for _ in range(2))
        _, extra = _weighed(device, lambda: one.call(given[0]))
    turn = iter(range(1 << 62))
    timed = Timed(one.name, lambda: one.call(given[next(turn) % len(given)]), 1, LAUNCHES, "events", extra_mb=extra)
    if expected > _LONG:
        timed.rounds = max(_LEAST, min(LAUNCHES, int(1e3 * seconds / expected)))
    if not device.gpu or expected > _GRAPHED:
        if expected * len(given) < _ONCE_EACH:
            _on_every_set(device, one, given)
        return timed
    timed.host_us = _host(device, timed.run)
    try:
        timed.run, timed.calls = _graph([lambda arrays=arrays: one.call(arrays) for arrays in given]), len(given)
        timed.rounds, timed.how = max(25, -(-LAUNCHES // len(given))), f"graph of {len(given)} calls"
    except Exception as error:
        device.synchronize()  # raises again where the device itself is in error
        timed.how = f"events; no graph: {str(error).splitlines()[0][:120]}"
    return timed


def _on_every_set(device: Device, one: Contender, given: Sequence[Arrays]) -> None:
    """One call each, waited for: whoever reaches outside its memory is named, before the rounds mix the calls."""
    try:
        for arrays in given:
            one.call(arrays)
            device.synchronize()
    except Exception as error:
        raise RuntimeError(f"{one.name}: {str(error).splitlines()[0]}") from error


def _graph(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One replay makes all the calls; the results of each have memory of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for call in calls:
            kept.append(call())

    def replay(kept: Any = kept) -> None:
        graph.replay()

    replay()
    torch.cuda.synchronize()
    return replay


def _host(device: Device, call: Callable[[], Any], calls: int = 40) -> float:
    device.synchronize()
    before = time.perf_counter()
    for _ in range(calls):
        call()
    device.synchronize()
    return 1e6 * (time.perf_counter() - before) / calls


def _weighed(device: Device, call: Callable[[], Any]) -> tuple[float, float | None]:
    """Milliseconds of a call, and by how many MB the allocated memory rose for it."""
    if not device.gpu:
        return device.once(call), None
    device.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    took = device.once(call)
    return took, (torch.cuda.max_memory_allocated() - before) / 1e6


def rounds(device: Device, timed: Sequence[Timed]) -> None:
    """Fill `milliseconds`: a round runs each of them in turn; one with fewer rounds has them spread over all."""
    total = max((one.rounds for one in timed), default=0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        pending: list[tuple[Timed, Callable[[], float]]] = []
        for number in range(total):
            for one in timed:
                if (number + 1) * one.rounds // total > number * one.rounds // total:
                    pending.append((one, device.start(one.run)))
            if len(pending) > 60 or number == total - 1:
                device.synchronize()
                for one, ended in pending:
                    one.milliseconds.append(ended() / one.calls)
                pending.clear()
    finally:
        if collecting:
            gc.enable()


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- the device


def clock(run: Callable[[], Any], milliseconds: float) -> float | None:
    """MHz of the multiprocessors while `run` keeps them busy."""
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        found = []
        for _ in range(8):
            for _ in range(max(1, int(30 / max(milliseconds, 0.01)))):
                run()
            time.sleep(0.01)
            found.append(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
            torch.cuda.synchronize()
        return float(np.median(found[2:]))
    for _ in range(max(1, int(600 / max(milliseconds, 0.01)))):
        run()
    found_by_tool = smi("clocks.sm")
    torch.cuda.synchronize()
    with contextlib.suppress(ValueError, AttributeError):
        return float(found_by_tool["clocks.sm"].split()[0])
    return None


def smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; nothing where there is no such tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    query = [tool, "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        return dict(zip(fields, map(str.strip, done.stdout.strip().splitlines()[0].split(",")), strict=True))
    return {}


def describe(device: Device) -> dict[str, Any]:
    if not device.gpu:
        return {"name": "rehearsal on a CPU", "sms": 0}
    found = torch.cuda.get_device_properties(0)
    names = ("driver_version", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "clocks.mem", "power.limit")
    return {
        "name": found.name,
        "capability": f"sm_{found.major}{found.minor}",
        "sms": found.multi_processor_count,
        "l2_mb": found.L2_cache_size / 1e6,
        "memory_gb": found.total_memory / 1e9,
        "cuda": torch.version.cuda,
        **smi(*names),
    }


def ceilings(device: Device) -> dict[str, float]:
    """Bytes a second of a copy, read and written counted, and operations a second of products of random matrices."""
    size = 1 << 31 if device.gpu else 1 << 20
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    found = {"bytes_per_s": 2e3 * size / _median(device, functools.partial(target.copy_, source))}
    del source, target
    for name, dtype, n in (("bf16", torch.bfloat16, 8192), ("fp32", torch.float32, 4096)):
        n = n if device.gpu else 64
        a, b = (torch.randn(n, n, device=device.name, dtype=dtype) for _ in range(2))
        out: Tensor = torch.empty_like(a)
        found[f"flops_{name}"] = 2e3 * n**3 / _median(device, lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
    release()
    return found


def _median(device: Device, call: Callable[[], Any], calls: int = 20) -> float:
    for _ in range(3):
        call()
    ends = [device.start(call) for _ in range(calls)]
    device.synchronize()
    return float(np.median([end() for end in ends]))
