from __future__ import annotations

import platform

import numpy as np
import pytest

from fastlvm.errors import InputError
from fastlvm.evaluation import latency


class Clock:
    """Time passes only where a call says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)


def test_stages_are_timed_apart_and_together(monkeypatch):
    clock = Clock(monkeypatch)
    seen = []

    def predict(context):
        seen.append(float(context[0, 0]))
        clock.now += 0.5 if len(seen) <= 3 else 0.002  # slow while warming up
        return context[0]

    def search(prediction):
        clock.now += 0.001

    contexts = np.arange(4, dtype=np.float32)[:, None, None] * np.ones((1, 5, 2), np.float32)
    got = latency.measure_retrieval(predict, search, contexts, warmup=3, repeats=10, threads=2)
    assert seen == [i % 4 for i in range(13)]
    for stage, wanted in (("model", 2), ("search", 1), ("total", 3)):
        for figure in vars(got.stages[stage]).values():
            assert figure == pytest.approx(wanted)
    assert (got.repeats, got.warmup, got.threads) == (10, 3, 2)


def test_percentiles(monkeypatch):
    clock = Clock(monkeypatch)

    def call(i):
        clock.now += (i + 1) / 1000

    stage = latency.measure({"call": call}, warmup=0, repeats=100).stages["call"]
    assert (stage.p50, stage.p95, stage.p99, stage.mean) == pytest.approx((50.5, 95.05, 99.01, 50.5))


def test_the_machine_is_named_without_its_host():
    got = latency.measure({"nothing": lambda i: None}, warmup=0, repeats=1)
    assert "cores" in got.machine
    assert not platform.node() or platform.node() not in got.machine
    assert latency.Latency.from_dict(got.to_dict()) == got


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}])
def test_nothing_to_measure(options):
    with pytest.raises(InputError, match="wanted are"):
        latency.measure({"nothing": lambda i: None}, **options)
    with pytest.raises(InputError, match="contexts is empty"):
        latency.measure_retrieval(lambda c: c, lambda q: q, np.empty((0, 5, 2)))
