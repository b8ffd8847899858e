"""What gates say of time and search, judged on a timed artifact."""

from __future__ import annotations

import pytest

from fastlvm import gates
from fastlvm.errors import InputError
from fastlvm.evaluation import latency_gate
from fastlvm.evaluation.gate_file import parse_gate
from fastlvm.evaluation.latency import Latency, Stage

STAGE = Stage(p50=0.8, p95=1.0, p99=1.2, mean=0.9)
TIMED = Latency({"model": STAGE, "search": STAGE, "total": STAGE}, 10, 2, 1, "a processor")
RECALL = {"search": "recall@50", "at_least": 0.95}


def gate(*limits, **rest):
    return parse_gate({"about": "a test's", "limit": list(limits), **rest}, "g", "g.toml")


def at_most(stage, percentile, bound):
    return {"latency": stage, "percentile": percentile, "at_most": bound}


def test_gates_are_loaded_once_and_only_where_they_limit_time_or_search():
    path = str(gates.FOLDER / "final.toml")
    assert [one.name for one in latency_gate.load_gates(["final", "ours-latency", path])] == ["final", "ours-latency"]
    for name in ("epoch-2", "ours"):
        with pytest.raises(InputError, match=f"gate {name} limits neither latency nor search: fastlvm eval --gates"):
            latency_gate.load_gates(["final", name])


@pytest.mark.parametrize(
    ("wanted", "given", "threads"), [((), None, None), ((None,), 3, 3), ((2, None, 2), None, 2), ((2,), 2, 2)]
)
def test_the_threads_are_the_gates_or_the_given_ones(wanted, given, threads):
    made = [gate(RECALL, **({} if n is None else {"threads": n})) for n in wanted]
    assert latency_gate.threads_of(made, given) == threads


@pytest.mark.parametrize(("wanted", "given"), [((2,), 1), ((2, 1), None)])
def test_threads_that_differ_are_refused(wanted, given):
    with pytest.raises(InputError, match="run it by itself"):
        latency_gate.threads_of([gate(RECALL, threads=n) for n in wanted], given)


def test_a_figure_is_judged_under_the_name_of_its_limit():
    limits = at_most("total", "p50", 0.8), at_most("search", "p95", 0.9), at_most("model", "p99", 1.3), RECALL
    rows = latency_gate.judge([gate(*limits)], TIMED, 0.9)
    assert [(row.value, row.passed) for row in rows] == [(0.8, True), (1.0, False), (1.2, True), (0.9, False)]
    assert rows[-1].note == "recorded when the index was built"
    [exact] = latency_gate.judge([gate(RECALL)], TIMED, None)
    assert (exact.value, exact.note) == (1.0, "exact")
    [untimed] = latency_gate.judge([gate(at_most("rerank", "p50", 9.0))], TIMED, None)
    assert untimed.missed and untimed.word == "not measured"


def test_metrics_are_left_to_reports():
    rows = latency_gate.judge([gate({"metric": "R@5", "at_least": 1}, at_most("total", "p99", 2.0))], TIMED, None)
    assert [(row.word, row.missed) for row in rows] == [("not judged", False), ("met", False)]
