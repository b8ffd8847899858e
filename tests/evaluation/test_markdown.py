from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from fastlvm.evaluation.findings import Finding
from fastlvm.evaluation.markdown import markdown, write_markdown
from fastlvm.evaluation.sections import lede, sections

SCHEMA = Path(__file__).parents[2] / "docs" / "report.md"
CELL = re.compile(r"(?<!\\)\|")


@pytest.fixture(scope="module")
def text(full_report):
    return markdown(full_report)


def tables(text):
    """Tables as lists of rows of cells, by the line above them."""
    found = {}
    for title, lines in re.findall(r"\*\*(.+)\*\*\n\n((?:\|.*\n)+)", text):
        found[title] = [[cell.strip() for cell in CELL.split(line)[1:-1]] for line in lines.splitlines()]
    return found


def with_best_difference(report, **interval):
    changed = [
        replace(one, metrics={name: replace(figure, value=0.02, **interval) for name, figure in one.metrics.items()})
        for one in report.differences
    ]
    return replace(report, differences=changed)


def test_every_table_has_as_many_cells_in_every_row(text):
    found = tables(text)
    assert len(found) == text.count("\n| ---") >= 9
    for title, rows in found.items():
        assert {len(row) for row in rows} == {len(rows[0])}, title
        assert set(rows[1]) <= {"---", "---:"}, title


def test_figures_are_those_of_the_report(text, full_report):
    head, _, *rows = tables(text)["Context rows excluded (headline)"]
    by_name = {row[0].strip("*"): dict(zip(head, row, strict=True)) for row in rows}
    for row in full_report.rows:
        if row.keys or row.kind == "model":
            continue
        shown = by_name[f"{row.name} (ceiling)" if row.kind == "oracle" else row.name]
        five = row.excluded["R@5"]
        assert shown["R@5 (95 %)"] == f"{five.value:.3f} ({five.low:.3f}–{five.high:.3f})"
        assert shown["MRR@10"] == f"{row.excluded['MRR@10'].value:.3f}"
    included = {row[0]: row for row in tables(text)["Context rows included"]}
    assert included["copy-last"][1] == "0.000"


def test_rankers_that_use_keys_stand_apart_and_the_ceiling_last(text):
    found = tables(text)
    keys = [row[0] for row in found["With keys, context rows excluded"][2:]]
    assert keys == ["near + by key", "next by key (ceiling)"]
    vectors = [
        row[0] for title in ("Context rows excluded (headline)", "Context rows included") for row in found[title]
    ]
    assert not set(keys) & set(vectors) and "next by key" not in vectors


def test_the_index_stands_beside_its_exact_twin(text, full_report):
    rows = tables(text)["near, a list of 20, 20 chunks listed"]
    row = full_report.row("near")
    assert [shown[0] for shown in rows[2:]] == list(row.ann["metrics"])
    five = next(shown for shown in rows if shown[0] == "R@5")
    assert five[1:3] == [f"{row.ann['metrics']['R@5'].value:.3f}", f"{row.excluded['R@5'].value:.3f}"]
    assert "asked with the target's own vector, the index has the target at R@1 1.000" in text


def test_names_are_text_whatever_they_hold(text):
    assert r"\<script>alert(" in text and "<script" not in text.replace(r"\<script", "")
    assert r"\$a_b\$ \|\_[u\](v)" in text
    assert "\x00" not in text and "\x1b" not in text


@pytest.mark.parametrize("name", ["# no heading", "- no list", "1. no list", "> no quote", "[no]: link", "=== no line"])
def test_a_note_that_looks_like_a_block_is_none(full_report, name):
    rows = [replace(full_report.rows[0], name=name, note="a note")]
    text = markdown(replace(full_report, rows=rows, differences=[], latency={}))
    line = next(line for line in text.splitlines() if line.endswith("a note."))
    assert re.match(r"- (\\\W|1\\\.)", line)


def test_the_lede_says_which_model_how_good_and_against_what(full_report):
    said = " ".join(lede(full_report))
    model = max(full_report.rows[:2], key=lambda row: row.excluded["R@5"].value)
    baselines = (row for row in full_report.rows if row.kind == "baseline")
    baseline = max(baselines, key=lambda row: row.excluded["R@5"].value)
    five, difference = model.excluded["R@5"], full_report.difference(model.name, baseline.name).metrics["R@5"]
    assert f"The best model, {model.name}, has" in said and f"best baseline, {baseline.name}, has" in said
    assert f"{five.value:.3f} (95 % interval {five.low:.3f} to {five.high:.3f})" in said
    assert f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]" in said
    assert "do not rely" not in said


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.03, "the model is better"),
        (-0.03, -0.01, "the model is worse"),
        (-0.01, 0.03, "holds zero"),
        (None, None, "not known"),
    ],
)
def test_the_verdict_follows_the_interval(full_report, low, high, said):
    assert said in lede(with_best_difference(full_report, low=low, high=high))[2]


@pytest.mark.parametrize(("level", "warned"), [("fault", True), ("warning", False), ("ok", False)])
def test_only_a_fault_takes_the_figures_their_worth(full_report, level, warned):
    wrong = [{"code": "x", "level": level, "sentence": "this was found", "figures": {}}]
    text = markdown(replace(full_report, findings=wrong))
    assert ("do not rely on these figures" in text) == warned
    assert text.startswith(f"# {full_report.title()}\n\n- **{level}**: this was found\n") == (level != "ok")


@pytest.mark.parametrize("kind", ["model", "baseline"])
def test_models_alone_and_baselines_alone_are_a_report(full_report, kind):
    rows = [row for row in full_report.rows if row.kind == kind]
    said = lede(replace(full_report, rows=rows, differences=[]))
    assert len(said) == 1 and ("No model was ranked" in said[0]) == (kind == "baseline")
    assert {len(row) for table in tables(markdown(replace(full_report, rows=rows))).values() for row in table}


def test_what_was_not_measured_is_a_dash_or_left_out(full_report):
    without = ("included", "macro", "within_article", "ann", "curve", "histogram", "impostors", "per_article")
    rows = [replace(row, **dict.fromkeys(without)) for row in full_report.rows]
    bare = replace(full_report, rows=rows, differences=[], latency={}, articles=None)
    assert [section.key for section in sections(bare)] == ["rankers", "keys", "provenance"]
    half = [replace(row, within_article=None) for row in full_report.rows]
    assert tables(markdown(replace(full_report, rows=half)))["By article, context rows excluded"][2][-1] == "–"


def test_it_is_written_whole(full_report, text, tmp_path):
    write_markdown(full_report, tmp_path / "deep" / "report.md")
    assert (tmp_path / "deep" / "report.md").read_text(encoding="utf-8") == text
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.md"]


def test_the_schema_names_every_field(full_report):
    """Below `latency` stand names of models, below estimates names of metrics: these are the report's own."""
    free = {*full_report.latency, *full_report.rows[0].excluded, *full_report.latency["near"].stages, "R@50"}
    names = set()
    waiting = [full_report.to_dict(), Finding("code", "fault", "sentence").to_dict()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            names |= set(value)
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    documented = set(re.findall(r"`(?:\w+\.)?(\w+)`", SCHEMA.read_text(encoding="utf-8")))
    assert len(names - free) > 50 and names - free <= documented
