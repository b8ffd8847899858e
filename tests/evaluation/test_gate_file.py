"""Gates as TOML files: what the package's say, what a file may say, and that a wrong one is refused by its entry."""

from __future__ import annotations

import itertools

import pytest

from fastlvm import gates
from fastlvm.errors import InputError
from fastlvm.evaluation import load_gate
from fastlvm.evaluation.gate_file import Gate, Limit, parse_gate

METRIC = {"metric": "R@5", "at_least": 0.4}
LATENCY = {"latency": "total", "percentile": "p95", "at_most": 1.45}


def said(name):
    """Each limit of a gate that comes with fastlvm, as text."""
    return [f"{limit.name} {limit.wanted}" for limit in load_gate(name).limits]


def gate(*limits, **rest):
    return parse_gate({"about": "a test's", "limit": list(limits), **rest}, "g", "g.toml")


def refusal(raw):
    with pytest.raises(InputError) as caught:
        parse_gate(raw, "g", "g.toml")
    text = str(caught.value)
    assert text.startswith("gate g.toml") and "\n" not in text
    return text


def test_the_seeds_gates_are_the_published_ones():
    quality = {
        "epoch-4": ["Contain@50 ≥ 0.55", "Eff@5 ≥ 0.65", "R@5 ≥ 0.35", "total_p95_ms ≤ 2"],
        "final": ["Contain@50 ≥ 0.6", "Eff@5 ≥ 0.68", "R@5 ≥ 0.4", "total_p95_ms ≤ 1.45"],
        "target": ["Contain@50 ≥ 0.7", "R@5 ≥ 0.5", "R@10 ≥ 0.65", "total_p95_ms ≤ 1.5"],
        "stretch": ["R@5 ≥ 0.532", "total_p95_ms ≤ 1.45"],
        "epoch-2": ["cosine ≥ 0.5"],
        "deploy": ["cosine ≥ 0.4", "out-of-domain cosine ≥ 0.15", "total_p95_ms ≤ 50"],
    }
    assert {name: said(name) for name in quality} == quality
    assert {name: load_gate(name).split for name in quality} == {
        **dict.fromkeys(("epoch-2", "epoch-4", "deploy"), "validation"),
        **dict.fromkeys(("final", "target", "stretch"), "test"),
    }


def test_ours_are_a_gain_over_the_mixture_and_the_time_of_a_prediction():
    assert said("ours") == ["R@5 over whitened mixture > 0"]
    two, one = load_gate("ours-latency"), load_gate("ours-latency-1-thread")
    assert (two.threads, one.threads) == (2, 1)
    wanted = ["total_p50_ms ≤ 0.85", "total_p95_ms ≤ 1", "search_p95_ms ≤ 0.3", "recall@50 ≥ 0.95"]
    assert said("ours-latency") == wanted
    assert said("ours-latency-1-thread") == ["total_p95_ms ≤ 1.8", "recall@50 ≥ 0.95"]


@pytest.mark.parametrize("name", gates.names())
def test_a_name_and_the_path_of_its_file_are_the_same_gate(name):
    path = gates.FOLDER / f"{name}.toml"
    found = load_gate(name)
    assert found == load_gate(path) == load_gate(str(path)) and found.name == name and found.about.endswith(".")


def test_every_form_of_a_limit_is_read():
    found = gate(
        METRIC,
        {"metric": "R@1", "rows": "within_article", "at_least": 0.1},
        {"metric": "R@5", "rows": "ann", "at_least": 0.1},
        {"metric": "R@5", "over": "copy-last", "above": -0.5},
        {"metric": "cosine", "domain": "out", "at_least": -0.1},
        {"metric": "median_rank", "below": 100},
        LATENCY,
        {"search": "recall@50", "at_least": 1},
        split="train",
        threads=3,
    )
    assert (found.name, found.about, found.split, found.threads) == ("g", "a test's", "train", 3)
    assert found.limits == (
        Limit("metric", "R@5", "at_least", 0.4),
        Limit("metric", "R@1", "at_least", 0.1, rows="within_article"),
        Limit("metric", "R@5", "at_least", 0.1, rows="ann"),
        Limit("metric", "R@5", "above", -0.5, over="copy-last"),
        Limit("metric", "cosine", "at_least", -0.1, domain="out"),
        Limit("metric", "median_rank", "below", 100.0),
        Limit("latency", "total", "at_most", 1.45, percentile="p95"),
        Limit("search", "recall@50", "at_least", 1.0),
    )
    assert isinstance(found, Gate) and (gate(METRIC).split, gate(METRIC).threads) == (None, None)
    names = ["R@5", "R@1 (within_article)", "R@5 (ann)", "R@5 over copy-last", "out-of-domain cosine", "median_rank"]
    assert [limit.name for limit in found.limits] == [*names, "total_p95_ms", "recall@50"]


def test_a_limit_told_as_its_entry_reads_as_the_same_limit():
    wanted = gate(METRIC, LATENCY, {"metric": "R@5", "rows": "macro", "below": 0.9})
    entries = [{key: value for key, value in limit.entry().items() if value != ""} for limit in wanted.limits]
    assert gate(*entries) == wanted


@pytest.mark.parametrize(
    ("compare", "met", "missed"),
    [
        ("at_least", (0.4, 0.5), (0.3999,)),
        ("at_most", (0.4, 0.3), (0.4001,)),
        ("above", (0.4001,), (0.4, 0.3)),
        ("below", (0.3999,), (0.4, 0.5)),
    ],
)
def test_a_bound_is_met_on_its_side_and_no_bound_by_nan(compare, met, missed):
    limit = gate({"metric": "R@5", compare: 0.4}).limits[0]
    assert all(limit.passed(value) for value in met)
    assert not any(limit.passed(value) for value in (*missed, float("nan")))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"limit": [METRIC]}, "has about None, and a sentence that says what it is for is wanted"),
        ({"about": " ", "limit": [METRIC]}, "has about ' '"),
        ({"about": 5, "limit": [METRIC]}, "has about 5"),
        ({"about": "a"}, "has limit None, and one or more tables are wanted: write [[limit]]"),
        ({"about": "a", "limit": []}, "has limit []"),
        ({"about": "a", "limit": METRIC}, "has limit {'at_least': 0.4, 'metric': 'R@5'}"),
        ({"about": "a", "limit": [METRIC], "limits": []}, "has 'limits', which is nothing it takes: choose of about, "),
        ({"about": "a", "limit": [METRIC], "split": "tset"}, "has split 'tset', and one of train, validation, test is"),
        ({"about": "a", "limit": [METRIC], "split": ["test"]}, "has split ['test']"),
        *(
            ({"about": "a", "limit": [METRIC], "threads": bad}, "and a whole number from 1 on is wanted")
            for bad in (0, 1.0, "2", True)
        ),
    ],
)
def test_a_file_that_is_no_gate_is_refused_by_its_entry(raw, reason):
    assert reason in refusal(raw)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (0.4, "is 0.4, and a table is wanted"),
        ({}, "has none of metric, latency, search, and exactly one is wanted"),
        ({**METRIC, **LATENCY}, "has metric and latency of metric, latency, search, and exactly one is wanted"),
        ({"metric": "R@5"}, "has none of at_least, at_most, above, below, and exactly one is wanted"),
        ({**METRIC, "at_most": 0.5}, "has at_least and at_most of at_least, "),
        (
            {**METRIC, "percentile": "p95"},
            "has 'percentile', which is nothing it takes: choose of metric, rows, over, ",
        ),
        ({**LATENCY, "rows": "macro"}, "has 'rows', which is nothing it takes: choose of latency, percentile, "),
        ({"metric": "R@50", "at_least": 0.4}, "has metric 'R@50', and one of R@1, R@5, "),
        ({"metric": 5, "at_least": 0.4}, "has metric 5"),
        ({**METRIC, "rows": "all"}, "has rows 'all', and one of excluded, included, "),
        ({**METRIC, "domain": "far"}, "has domain 'far', and one of in, out is wanted"),
        ({**METRIC, "over": ""}, "has over '', and the name of a ranker is wanted"),
        ({**METRIC, "over": 3}, "has over 3"),
        ({**METRIC, "over": "mean", "rows": "macro"}, "has over and rows 'macro'"),
        ({"metric": "MRR", "rows": "within_article", "at_least": 0.1}, "within_article: choose of R@1, R@5, R@10"),
        (
            {"metric": "median_rank", "rows": "macro", "at_most": 9},
            "rows 'macro', of which a report has no median_rank",
        ),
        ({"metric": "median_rank", "over": "mean", "at_most": 9}, "over and metric 'median_rank'"),
        ({"metric": "cosine", "rows": "ann", "at_least": 0.1}, "rows 'ann', of which a report has no cosine"),
        ({"latency": "end_to_end", "percentile": "p95", "at_most": 1}, "has latency 'end_to_end', and one of model, "),
        ({"latency": "total", "at_most": 1}, "has no percentile, and one of p50, p95, p99 is wanted"),
        ({"latency": "total", "percentile": "p90", "at_most": 1}, "has percentile 'p90'"),
        ({"search": "recall@10", "at_least": 0.9}, "has search 'recall@10', and one of recall@50 is wanted"),
    ],
)
def test_a_limit_that_is_none_is_refused_by_its_number_and_entry(entry, reason):
    text = refusal({"about": "a", "limit": [METRIC, entry]})
    assert text.startswith("gate g.toml: limit 2 ") and reason in text


@pytest.mark.parametrize(
    ("figure", "what", "bounds"),
    [
        ({"metric": "R@5"}, "a share from 0 to 1", (-0.1, 1.01, 40)),
        ({"metric": "R@5", "over": "mean"}, "a difference from -1 to 1", (-1.1, 2)),
        ({"metric": "cosine"}, "a cosine from -1 to 1", (-1.1, 1.1)),
        ({"metric": "median_rank"}, "a rank from 1 on", (0, -3)),
        ({"latency": "model", "percentile": "p50"}, "milliseconds above 0", (0, -1)),
        ({"search": "recall@50"}, "a share from 0 to 1", (95,)),
    ],
)
def test_a_bound_that_no_figure_can_be_near_is_refused(figure, what, bounds):
    never = ("0.4", True, None, float("nan"), float("inf"))
    for compare, bad in itertools.product(("at_least", "below"), (*bounds, *never)):
        text = refusal({"about": "a", "limit": [{**figure, compare: bad}]})
        assert f"limit 1 has {compare} {bad!r} for " in text and f"and {what}" in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"about = ", "mine.toml is not valid TOML ("),
        (b"\xff\xfe", "mine.toml is not valid TOML ("),
        (b"x = " + b"[" * 5000, "mine.toml is not valid TOML ("),
        (b'about = "a"\n[[limit]]\nmetric = "R@5"\nat_least = "x"', "mine.toml: limit 1 has at_least 'x'"),
    ],
)
def test_a_damaged_file_is_refused_by_its_path(tmp_path, content, reason):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_gate(path)
    assert f"gate {tmp_path}" in str(caught.value) and reason in str(caught.value)


def test_a_gate_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    for unknown in ("epoch9", "epoch2", "epoch4", "deployment", "", "gates/final"):
        with pytest.raises(InputError, match=r"is not known: choose one of deploy, epoch-2, .*, or name a \.toml file"):
            load_gate(unknown)
    with pytest.raises(
        InputError, match=r"absent\.toml does not exist: name a \.toml file that does, or one of deploy"
    ):
        load_gate(tmp_path / "absent.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(InputError, match=r"folder\.toml cannot be read \("):
        load_gate(tmp_path / "folder.toml")
