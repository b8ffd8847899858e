"""`fastlvm compare`: reports that the command wrote, on one table."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from cli.conftest import listing, ok, refused
from fastlvm import workflow
from fastlvm.evaluation import Report


@pytest.fixture(scope="module")
def reports(made, tmp_path_factory):
    """Folders that eval wrote: of a run, of an artifact, of another split and a sample."""
    root = tmp_path_factory.mktemp("reports")
    plain = ["--payload", made.payload, "--windows", made.windows]
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "matplotlib", None)  # no drawings, which take a second each
        patch.setattr(workflow, "LATENCY_REPEATS", 20)
        ok("eval", made.run, *plain, "--out", root / "run")
        ok("eval", made.artifact, *plain, "--rerank", "shard-assist:1", "--out", root / "artifact")
        ok("eval", made.run, *plain, "--split", "validation", "--out", root / "split")
        ok("eval", made.run, *plain, "--limit", 9, "--out", root / "number of windows")
    return root


def test_a_leaderboard_is_printed_and_written(reports, tmp_path):
    out = tmp_path / "deep" / "board.json"
    printed = ok("compare", reports / "run", reports / "artifact" / "report.json", "--out", out)
    board = json.loads(out.read_text(), parse_constant=lambda constant: pytest.fail(constant))
    assert (board["format"], board["version"]) == ("fastlvm-leaderboard", 1)
    fives = [place["ranker"]["excluded"]["R@5"]["value"] for place in board["places"]]
    assert fives == sorted(fives, reverse=True)
    names = [place["name"] for place in board["places"]]
    assert len(names) == len(set(names)) == 11 + 2 + 1 and {"run", "artifact", "artifact + shard-assist:1"} < set(names)
    first = next(place for place in board["places"] if place["ranker"]["kind"] == "model")
    for place in board["places"]:
        behind = place["less_the_first_model"]
        assert (behind is None) == (place is first)
        if behind is not None:
            five = place["ranker"]["excluded"]["R@5"]["value"] - first["ranker"]["excluded"]["R@5"]["value"]
            assert behind["R@5"]["value"] == pytest.approx(five, abs=1e-9)
    lines = printed.splitlines()
    assert lines[0].startswith("Next-chunk retrieval, payload: 18 test windows of 2 articles")


def test_only_what_is_kept_in_both_folders_is_paired(reports, tmp_path):
    shutil.copytree(reports / "run", tmp_path / "alone", ignore=shutil.ignore_patterns("ranks"))
    ok("compare", tmp_path / "alone", reports / "artifact", "--out", tmp_path / "board.json")
    places = json.loads((tmp_path / "board.json").read_text())["places"]
    assert {place["name"]: place["less_the_first_model"] for place in places}["run"] is None


@pytest.mark.parametrize("what", ["split", "number of windows"])
def test_reports_of_something_else_are_refused(reports, tmp_path, what):
    line = refused("compare", reports / "run", reports / what, "--out", tmp_path / "board.json")
    assert f"do not compare: {what} " in line and not (tmp_path / "board.json").exists()


def test_one_report_or_the_same_twice_is_refused(reports):
    assert "at least two are wanted" in refused("compare", reports / "run")
    for same in (reports / "run", reports / "run" / "report.json", reports / "artifact" / ".." / "run"):
        assert "is given twice" in refused("compare", reports / "run", same)


def test_what_is_no_report_is_one_line(reports, tmp_path):
    run = reports / "run"
    raw = json.loads((run / "report.json").read_text())
    contents = {
        "old": json.dumps(raw | {"version": 1}),
        "cut": json.dumps(raw)[:-9],
        "other": "[]",
        "lacking": json.dumps({name: value for name, value in raw.items() if name != "windows"}),
        "wrong": json.dumps(raw | {"rankers": ["run"]}),
        "figures": json.dumps(raw).replace('"R@5"', '"R@6"'),
    }
    for name, text in contents.items():
        (tmp_path / f"{name}.json").write_text(text)
        assert f"{name}.json" in refused("compare", run, tmp_path / f"{name}.json")
        assert f"{name}.json" in refused("compare", tmp_path / f"{name}.json", run)
    said = "is not a report of this version of fastlvm: run fastlvm eval again"
    assert refused("compare", run, tmp_path / "old.json").endswith(said)
    assert "does not exist: name a report.json" in refused("compare", run, tmp_path)
    assert "does not exist: name a report.json" in refused("compare", run, tmp_path / "absent")


def test_a_report_is_not_written_over(reports, tmp_path):
    shutil.copytree(reports / "artifact", tmp_path / "artifact")
    before = listing(tmp_path)
    out = tmp_path / "artifact" / "report.json"
    assert "is the file that is read" in refused("compare", reports / "run", tmp_path / "artifact", "--out", out)
    assert "is a folder" in refused("compare", reports / "run", tmp_path / "artifact", "--out", tmp_path)
    assert listing(tmp_path) == before
    Report.open(out)
