"""The whole forward of Mamba-S at seed size, batch 1, on packed weights: against rivals, the bound and a busy machine.

Every prediction is compared with the float32 model's before it is timed; targets are in forward_cases.py.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import bound
import forward_models
import forward_rivals
import paired
from contenders import BEST, ISAS
from fastlvm.predictor.export import describe
from fastlvm.predictor.forward import Forward, Plan
from fastlvm.predictor.pack import pack
from forward_cases import (
    BATCHES,
    CHECKED,
    CONTEXT,
    COSINES,
    DIM,
    PRECISIONS,
    RIVAL_COSINE,
    TIMED_CALLS,
    WARM_CALLS,
    contexts,
    model,
    name_of,
    scans,
)
from forward_results import COMPUTE, stream_of
from hog import hogs
from paired import Contender, measure, pin

BATCH_ROUNDS = 3  # of --bench-rounds for one of the batches
CALLS = 70  # consecutive calls for one of --bench-rounds
WARM = 0.05  # of those, made before and not timed
BUSY_SECONDS, LEAST_BUSY = 20, 50  # calls on a busy machine: what fits, but as many at least

Call = Callable[[], np.ndarray]


class Setting:
    """The model, its predictions for `contexts(CHECKED)`, and our forwards of it by precision, found to agree."""

    def __init__(self, results: Any) -> None:
        self.module = model()
        self.contexts = contexts(CHECKED)
        with torch.inference_mode():
            found = [self.module(torch.from_numpy(one)) for one in self.contexts[:, None]]
        self.wanted = torch.cat(found).numpy()
        results.parameters = sum(parameter.numel() for parameter in self.module.parameters())
        layers = Plan(describe(self.module.config), CONTEXT, DIM)
        weights = {name: tensor.numpy() for name, tensor in self.module.state_dict().items()}
        self.ours = {precision: Forward(layers, pack(layers, weights, precision)) for precision in PRECISIONS}
        for precision, forward in self.ours.items():
            near = self.cosines(forward)
            assert all(a >= limit for a, limit in zip(near, COSINES[precision], strict=True)), (precision, near)
            results.cosines[name_of(precision)], results.bytes[precision] = near, forward.nbytes

    def cosines(self, forward: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        """Smallest and mean cosine to the model, of one context a call."""
        return self.compare(np.concatenate([forward(one) for one in self.contexts[:, None]]))

    def compare(self, found: np.ndarray) -> tuple[float, float]:
        """The same of predictions for `contexts(n)`."""
        assert found.shape == (len(found), DIM) and found.dtype == np.float32, f"{found.dtype} {found.shape} came back"
        wanted = np.resize(self.wanted, found.shape).astype(np.float64)
        product = (found * wanted).sum(axis=1)
        cosines = product / np.linalg.norm(found.astype(np.float64), axis=1) / np.linalg.norm(wanted, axis=1)
        return float(cosines.min()), float(cosines.mean())

    def caller(self, forward: Callable[[np.ndarray], np.ndarray]) -> Call:
        """A call with the next of the contexts."""
        turn = itertools.cycle(list(self.contexts[:, None]))
        return lambda: forward(next(turn))

    def contender(self, precision: str, threads: int) -> Contender:
        one = Contender(name_of(precision), self.caller(self.ours[precision]), threads, BEST, decisive=True)
        for _ in range(2):
            one.trial()
        return one


@pytest.fixture(scope="module")
def setting(forward_results):
    return Setting(forward_results)


@pytest.fixture(autouse=True)
def unpinned(threads):
    yield
    pin(threads[-1], BEST)


BY_PRECISION = pytest.mark.parametrize("precision", PRECISIONS)
BY_THREADS = pytest.mark.parametrize("count", (2, 1))


@pytest.mark.benchmark(group="forward: paired rounds")
def test_rounds(benchmark, setting, threads, plan, forward_results, tmp_path):
    own = [setting.contender(precision, n) for precision in setting.ours for n in threads]
    library = bound.Bound(next(isa for isa in reversed(ISAS) if isa in bound.FLAGS), tmp_path)
    bounds = _bounds(library, setting, threads, forward_results)
    rivals = _rivals(forward_rivals.Source(setting.module, contexts(1), tmp_path), setting, threads, forward_results)
    *others, lead = own
    try:
        rounds = paired.Plan(plan.rounds, plan.patience, warm=WARM_CALLS, burst=TIMED_CALLS)
        measure(benchmark, lead, [*others, *bounds, *rivals], rounds)
    finally:
        library.close()
    forward_results.add_rounds([*own, *bounds, *rivals])


def _bounds(library: bound.Bound, setting: Setting, threads: list[int], results: Any) -> list[Contender]:
    work = bound.Work.of(scans(setting.module.config))
    loops: dict[str, Callable[[], None]] = {COMPUTE: lambda: library.compute(work)}
    for precision in setting.ours:
        size = results.bytes[precision]
        loops[stream_of(precision)] = lambda size=size: library.read(size)
    made = []
    for name, loop in loops.items():
        for n in threads:

            def call(loop: Callable[[], None] = loop, n: int = n) -> None:
                library.set_threads(n)
                loop()

            made.append(Contender(name, call, n, library.isa, decisive=True))
            for _ in range(2):
                made[-1].trial()
    return made


def _rivals(source: forward_rivals.Source, setting: Setting, threads: list[int], results: Any) -> list[Contender]:
    """Those that load and agree with the model, on every number of threads; `results` gets why others do not."""
    found: list[Contender] = []
    for rival in forward_rivals.RIVALS:
        made, near, reason = _checked(rival, source, setting, threads)
        if reason:
            results.reasons[rival.name] = reason
            continue
        found += made
        results.cosines[rival.name] = near
        if rival.name in source.notes:
            results.notes[rival.name] = source.notes[rival.name]
    return found


def _checked(
    rival: forward_rivals.Rival, source: forward_rivals.Source, setting: Setting, threads: list[int]
) -> tuple[list[Contender], tuple[float, float], str]:
    """A rival on every number of threads, its smallest and mean cosine, and why it cannot be timed if it cannot."""
    made, near = [], []
    for n in threads:
        pin(n, BEST)
        call, reason = forward_rivals.load(rival, source, n)
        if call is None:
            return [], (0, 0), reason
        try:
            near.append(setting.cosines(call))
            made.append(Contender(rival.name, setting.caller(call), n, BEST))
            for _ in range(2):
                made[-1].trial()
        except Exception as error:  # whatever a rival throws
            return [], (0, 0), f"cannot be run: {forward_rivals.described(error)}"
    least, mean = map(float, np.min(near, axis=0))  # NaN if one of them is
    if not least >= RIVAL_COSINE:
        return [], (0, 0), f"its cosine to the float32 model falls to {least:.4f}"
    return made, (least, mean), ""


@BY_THREADS
@BY_PRECISION
@pytest.mark.benchmark(group="forward: consecutive calls")
def test_calls(benchmark, setting, precision, count, threads, plan, forward_results):
    _need(count, threads)
    rounds = CALLS * plan.rounds
    one = setting.contender(precision, count)
    one.pin()
    _repeat(one.call, int(WARM * rounds))
    benchmark.pedantic(one.call, rounds=rounds)
    if benchmark.stats is not None:
        forward_results.add_calls(precision, count, benchmark.stats.stats.data)


@BY_THREADS
@BY_PRECISION
@pytest.mark.benchmark(group="forward: a busy process on every core")
def test_hogged(benchmark, setting, precision, count, threads, plan, forward_results):
    _need(count, threads)
    rounds = CALLS * plan.rounds // 2
    one = setting.contender(precision, count)
    one.pin()
    quiet = _repeat(one.call, rounds)
    with hogs() as started:
        each = statistics.median(_repeat(one.call, max(3, int(WARM * rounds))))
        benchmark.pedantic(one.call, rounds=min(rounds, max(LEAST_BUSY, int(BUSY_SECONDS / each))))
    if benchmark.stats is not None:
        forward_results.add_hogged(precision, count, quiet, benchmark.stats.stats.data, started)


@BY_PRECISION
@pytest.mark.benchmark(group="forward: batches")
def test_batches(benchmark, setting, precision, threads, plan, forward_results):
    made, forward = {}, setting.ours[precision]
    for n in BATCHES:
        given = contexts(n)
        one = made[n] = Contender(name_of(precision), lambda given=given: forward(given), threads[-1], BEST)
        for _ in range(2):
            found = one.trial()
        assert setting.compare(found)[0] >= COSINES[precision][0]
    lead, *others = made.values()
    measure(benchmark, lead, others, paired.Plan(max(1, plan.rounds // BATCH_ROUNDS), plan.patience))
    for n, one in made.items():
        if one.seconds:
            forward_results.add_batch(precision, threads[-1], n, one.seconds)


@pytest.mark.parametrize("name", forward_models.MODELS)
@pytest.mark.benchmark(group="forward: the seeds' other models")
def test_other_models(benchmark, name, threads, plan, forward_results):
    forward = forward_models.forward(name, "int8")
    context = contexts(1)
    assert abs(np.linalg.norm(forward(context)) - 1) < 1e-5
    for n in threads:
        pin(n, BEST)
        _repeat(lambda: forward(context), 3)
        seconds = _repeat(lambda: forward(context), 10 * plan.rounds)
        forward_results.add_other(name, "int8", n, forward.nbytes, seconds)
    benchmark.pedantic(lambda: forward(context), rounds=1)


def _need(count: int, threads: list[int]) -> None:
    if count not in threads:
        pytest.skip(f"{count} threads are not to be had here")


def _repeat(call: Call, times: int) -> list[float]:
    """Seconds of each of `times` calls."""
    seconds = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(times):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return seconds
