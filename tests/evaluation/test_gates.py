"""The check of a report against a gate."""

from __future__ import annotations

import json

import pytest

from fastlvm import gates
from fastlvm.errors import GateError, InputError
from fastlvm.evaluation import Verdict, check, enforce, load_gate
from fastlvm.evaluation.gate_file import Limit, parse_gate

JUDGED = [name for name in gates.names() if not name.startswith("ours-")]


def figures(**values):
    return {name: {"value": value, "low": None, "high": None} for name, value in values.items()}


def report(split="test", p95=1.0, threads=2, low=0.01, payload="a" * 16, **changed):
    """A report of one model that passes every gate, changed by `changed`."""
    good = figures(**{"R@5": 0.54, "R@10": 0.66, "Contain@50": 0.71, "Eff@5": 0.76, "cosine": 0.6, **changed})
    over = {"R@5": {"value": 0.02, "low": low, "high": 0.03}}
    ranker = {
        "name": "m",
        "kind": "model",
        "excluded": good,
        "included": figures(**{"R@5": 0.3}),
        "macro": figures(**{"R@5": 0.5}),
        "within_article": figures(**{"R@5": 0.8}),
        "ann": {"metrics": figures(**{"R@5": 0.52})},
    }
    stages = {"total": {"p95": p95}, "search": {"p95": 99.0}}
    return {
        "payload": {"id": payload},
        "windows": {"split": split},
        "rankers": [ranker, {"name": "copy-last", "kind": "baseline", "excluded": good}],
        "differences": [{"model": "m", "baseline": "whitened mixture", "metrics": over}],
        "latency": {} if p95 is None else {"m": {"stages": stages, "threads": threads}},
    }


ELSEWHERE = report(payload="b" * 16, cosine=0.2)


def gate(*limits, **rest):
    return parse_gate({"about": "a test's", "limit": list(limits), **rest}, "g", "g.toml")


def one(limit, data=None, **rest):
    [row] = check(data or report(), gate(limit, **rest))
    return row


@pytest.mark.parametrize("name", JUDGED)
def test_a_good_report_passes_and_every_limit_can_be_missed(name):
    split = load_gate(name).split
    rows = check(report(split), name, out_of_domain=ELSEWHERE)
    enforce(rows)
    assert all(row.passed and row.word == "met" and row.model == "m" for row in rows)
    for limit in load_gate(name).limits:
        worse = limit.bound - 0.01 if limit.upward else limit.bound + 0.01
        bad, elsewhere = report(split), ELSEWHERE
        if limit.kind == "latency":
            bad = report(split, p95=worse)
        elif limit.over:
            bad = report(split, low=worse)
        elif limit.domain == "out":
            elsewhere = report(payload="b" * 16, cosine=worse)
        else:
            bad = report(split, **{limit.figure: worse})
        rows = check(bad, name, out_of_domain=elsewhere)
        assert [row.limit for row in rows if not row.passed] == [limit]
        with pytest.raises(GateError, match=f"gate {name} missed by m: {limit.name} is "):
            enforce(rows)


def test_a_gate_is_named_or_a_file_or_loaded():
    wanted = check(report(), "final")
    assert check(report(), gates.FOLDER / "final.toml") == wanted == check(report(), load_gate("final"))


@pytest.mark.parametrize(
    ("rows", "value"), [("excluded", 0.54), ("included", 0.3), ("macro", 0.5), ("within_article", 0.8), ("ann", 0.52)]
)
def test_a_limit_reads_its_section_of_the_report(rows, value):
    assert one({"metric": "R@5", "rows": rows, "at_least": 0.0}).value == value
    for lost in (None, {}):
        data = report()
        data["rankers"][0][rows] = lost
        row = one({"metric": "R@5", "rows": rows, "at_least": 0.0}, data)
        assert (row.value, row.passed, row.word) == (None, False, "not measured")
    data["rankers"][0].pop(rows)
    assert one({"metric": "R@5", "rows": rows, "at_least": 0.0}, data).word == "not measured"


@pytest.mark.parametrize(
    ("compare", "bound", "value", "passed"),
    [
        ("above", 0.0, 0.01, True),
        ("at_least", 0.01, 0.01, True),
        ("above", 0.01, 0.01, False),
        ("at_least", 0.015, 0.01, False),  # the difference is 0.02, its lower end is not enough
        ("below", 0.025, 0.03, False),
        ("at_most", 0.03, 0.03, True),
    ],
)
def test_a_difference_is_judged_by_the_worse_end_of_its_interval(compare, bound, value, passed):
    row = one({"metric": "R@5", "over": "whitened mixture", compare: bound})
    assert (row.value, row.passed) == (value, passed) and "of 0.0200" in row.note


def test_a_difference_that_was_not_taken_does_not_pass():
    over = {"metric": "R@5", "over": "whitened mixture", "above": -1}
    assert str(one({**over, "over": "mean"})) == (
        "R@5 over mean is not measured (the report does not compare with 'mean'), and > -1 is wanted"
    )
    assert one(over, report(low=None)).note == "the difference has no interval"
    assert one({**over, "metric": "R@10"}).word == "not measured"


def test_time_is_judged_on_the_gates_threads_alone():
    limit = {"latency": "total", "percentile": "p95", "at_most": 1}
    assert one(limit).passed and one(limit, threads=2).passed
    row = one(limit, threads=1)
    assert not row.passed and row.note == "it was timed on 2 threads, and not 1"
    assert one(limit, report(p95=None)).note == "only artifacts are timed"
    assert one({**limit, "latency": "rerank"}).word == one({**limit, "percentile": "p99"}).word == "not measured"


def test_a_report_has_no_recall_of_the_index():
    row = one({"search": "recall@50", "at_least": 0})
    assert not row.passed and row.note == "fastlvm bench latency measures it"


def test_another_corpus_is_asked_for_where_a_limit_is_of_one():
    limit = {"metric": "cosine", "domain": "out", "at_least": 0.15}
    [row] = check(report(), gate(limit), out_of_domain=ELSEWHERE)
    assert (row.value, row.passed) == (0.2, True)
    assert one(limit).note == "there is no report of another corpus" and not one(limit).passed
    with pytest.raises(InputError, match="same payload"):
        check(report(), gate(limit), out_of_domain=report())
    other = report(payload="b" * 16)
    other["rankers"][0]["name"] = "n"
    with pytest.raises(InputError, match="has no ranker 'm'"):
        check(report(), gate(limit), out_of_domain=other)


def test_a_report_of_another_split_is_refused_unless_the_gate_names_none():
    with pytest.raises(InputError, match="gate final is about split test, and not validation: evaluate test"):
        check(report("validation"), "final")
    assert check(report("train"), gate({"metric": "R@5", "at_least": 0.4}))[0].passed


def test_one_model_is_judged():
    with pytest.raises(InputError, match="has no ranker 'x'"):
        check(report(), "final", model="x")
    two = report()
    two["rankers"].append(two["rankers"][0] | {"name": "n", "excluded": figures(**{"R@5": 0.1})})
    with pytest.raises(InputError, match=r"2 models \(m, n\)"):
        check(two, "final")
    [row] = check(two, gate({"metric": "R@5", "at_least": 0.4}), model="n")
    assert (row.value, row.model) == (0.1, "n")
    assert check(two, gate({"metric": "R@5", "at_least": 0.4}), model="copy-last")[0].passed
    with pytest.raises(InputError, match=r"0 models \(none\)"):
        check(report() | {"rankers": []}, "final")


def test_a_verdict_is_json_with_the_whole_limit():
    row = one({"metric": "R@5", "at_least": 0.6})
    assert json.loads(json.dumps(row.to_dict())) == {
        "gate": "g",
        "model": "m",
        "metric": "R@5",
        "wanted": "≥ 0.6",
        "limit": {"metric": "R@5", "rows": "excluded", "over": "", "domain": "in", "at_least": 0.6},
        "value": 0.54,
        "passed": False,
        "note": "",
    }
    unjudged = Verdict("g", row.limit, judged=False)
    assert unjudged.to_dict()["passed"] is None and "model" not in unjudged.to_dict()
    assert not unjudged.passed and not unjudged.missed and unjudged.word == "not judged"
    enforce([unjudged])


@pytest.mark.parametrize(
    ("compare", "bound", "value", "word", "measured"),
    [
        ("at_most", 1.45, 1.45, "met", "1.4500"),
        ("at_most", 1.45, 1.4500000000000002, "missed", None),
        ("at_most", 1.45, 1.450004, "missed", "1.450004"),
        ("at_least", 0.95, 0.949996, "missed", "0.949996"),
        ("above", 0.0, 0.0, "missed", "0.0000"),
        ("above", 0.0, 0.000004, "met", "0.000004"),
        ("below", 0.5, float("nan"), "missed", "nan"),
        ("at_least", 0.5, None, "not measured", "–"),
    ],
)
def test_no_figure_beyond_its_limit_looks_as_if_it_met_it(compare, bound, value, word, measured):
    verdict = Verdict("g", Limit("metric", "R@5", compare, bound), value)
    assert (verdict.word, verdict.passed) == (word, word == "met")
    if measured is not None:
        assert verdict.measured == measured
    else:
        assert not verdict.limit.passed(float(verdict.measured))


def test_what_is_missed_is_said_by_gate_and_model():
    limits = Limit("metric", "R@5", "at_least", 0.4), Limit("search", "recall@50", "at_least", 0.9)
    rows = [Verdict("a", limits[0], 0.1, model="m"), Verdict("a", limits[1], 0.8, "on record", model="m")]
    rows += [Verdict("a", limits[0], 0.5, model="n"), Verdict("b", limits[0])]
    with pytest.raises(GateError) as caught:
        enforce(rows)
    assert str(caught.value) == (
        "gate a missed by m: R@5 is 0.1000, and ≥ 0.4 is wanted, recall@50 is 0.800 (on record), and ≥ 0.9 is wanted; "
        "gate b missed: R@5 is not measured, and ≥ 0.4 is wanted"
    )
