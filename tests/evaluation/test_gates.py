from __future__ import annotations

import pytest

from fastlvm.errors import GateError, InputError
from fastlvm.evaluation import GATES, check, enforce


def report(p95=1.0, payload="a" * 16, **figures):
    """A report of one model that passes every gate, changed by `figures`."""
    values = {"R@5": 0.54, "R@10": 0.66, "Contain@50": 0.71, "Eff@5": 0.76, "cosine": 0.6} | figures
    excluded = {name: {"value": value, "low": None, "high": None} for name, value in values.items()}
    return {
        "payload": {"id": payload},
        "rankers": [
            {"name": "m", "kind": "model", "excluded": excluded},
            {"name": "copy-last", "kind": "baseline", "excluded": excluded},
        ],
        "latency": {} if p95 is None else {"m": {"stages": {"total": {"p95": p95}, "search": {"p95": 99.0}}}},
    }


ELSEWHERE = report(payload="b" * 16, cosine=0.2)


def limits(name):
    return {threshold.metric: threshold.bound for threshold in GATES[name]}


def test_the_gates_are_the_published_ones():
    assert limits("epoch2") == {"cosine": 0.50}
    assert limits("epoch4") == {"Contain@50": 0.55, "Eff@5": 0.65, "R@5": 0.35, "p95_ms": 2.0}
    assert limits("final") == {"Contain@50": 0.60, "Eff@5": 0.68, "R@5": 0.40, "p95_ms": 1.45}
    assert limits("target") == {"Contain@50": 0.70, "R@5": 0.50, "R@10": 0.65, "p95_ms": 1.5}
    assert limits("stretch") == {"R@5": 0.532, "p95_ms": 1.45}
    assert limits("deployment") == {"cosine": 0.40, "out_of_domain_cosine": 0.15, "p95_ms": 50.0}


@pytest.mark.parametrize("name", GATES)
def test_a_good_report_passes_and_every_threshold_can_fail(name):
    assert all(row.passed for row in enforce(report(), name, out_of_domain=ELSEWHERE))
    for threshold in GATES[name]:
        worse = threshold.bound + 0.01 if threshold.at_most else threshold.bound - 0.01
        bad, elsewhere = report(), ELSEWHERE
        if threshold.metric == "p95_ms":
            bad = report(p95=worse)
        elif threshold.metric == "out_of_domain_cosine":
            elsewhere = report(payload="b" * 16, cosine=worse)
        else:
            bad = report(**{threshold.metric: worse})
        rows = check(bad, name, out_of_domain=elsewhere)
        assert [row.metric for row in rows if not row.passed] == [threshold.metric]
        with pytest.raises(GateError, match=f"gate {name} missed: {threshold.metric}"):
            enforce(bad, name, out_of_domain=elsewhere)


def test_a_figure_on_the_bound_passes():
    assert all(row.passed for row in check(report(p95=1.45, **{"R@5": 0.532}), "stretch"))


def test_what_was_not_measured_does_not_pass():
    with pytest.raises(GateError, match="p95_ms not measured"):
        enforce(report(p95=None), "final")
    with pytest.raises(GateError, match="Eff@5 not measured"):
        enforce(report(**{"Eff@5": None}), "final")
    with pytest.raises(GateError, match="out_of_domain_cosine not measured"):
        enforce(report(), "deployment")


def test_bad_questions_are_refused():
    with pytest.raises(InputError, match="choose one of epoch2"):
        check(report(), "epoch9")
    with pytest.raises(InputError, match="has no ranker 'x'"):
        check(report(), "final", model="x")
    two = report()
    two["rankers"].append(two["rankers"][0] | {"name": "n"})
    with pytest.raises(InputError, match=r"2 models \(m, n\)"):
        check(two, "final")
    assert check(two, "epoch2", model="n")[0].passed
    with pytest.raises(InputError, match="same payload"):
        check(report(), "deployment", out_of_domain=report())
