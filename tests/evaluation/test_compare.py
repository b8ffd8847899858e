"""Several reports on one table: only of the same windows, and paired where what rankers did was kept."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from fastlvm.data import Payload, Windows
from fastlvm.errors import InputError, IntegrityError
from fastlvm.evaluation import Bootstrap, Listing, Ranker, Report, evaluate
from fastlvm.evaluation.compare import RANKS, compare, open_report
from fastlvm.evaluation.outcome import Store
from fastlvm.evaluation.table import leaderboard

WEIGHTS = {"good": 0.3, "fair": -0.3, "poor": -0.6}


def weighted(name, weight, **options):
    return Ranker(name, lambda c: c[:, -1] + weight * c[:, -2], identity=f"{name} {weight}", **options)


def write(folder, models, payload, windows, *, kept=True, **options):
    """What the command writes: the report, and beside it what rankers did."""
    options.setdefault("resamples", 60)
    report = evaluate(models, payload, windows, outcomes=folder / RANKS if kept else None, **options)
    report.write(folder / "report.json")
    return report


@pytest.fixture(scope="module")
def folders(payload, windows, tmp_path_factory):
    root = tmp_path_factory.mktemp("reports")
    for name, weight in WEIGHTS.items():
        write(root / name, [weighted(name, weight)], payload, windows)
    return {name: root / name for name in WEIGHTS}


def placed(*paths):
    return compare([open_report(path) for path in paths])


def test_the_best_is_first_and_baselines_stand_once(folders):
    places = placed(*(folders[name] for name in ("poor", "good", "fair")))
    fives = [place.row.excluded["R@5"].value for place in places]
    assert fives == sorted(fives, reverse=True)
    assert [place.name for place in places if place.row.kind == "model"] == ["good", "fair", "poor"]
    names = [place.name for place in places]
    assert len(names) == len(set(names)) == 3 + 11


def test_differences_are_paired_and_of_the_first_model(folders, payload, windows):
    places = {place.name: place for place in placed(folders["poor"], folders["good"])}
    both = evaluate([weighted(n, WEIGHTS[n]) for n in ("good", "poor")], payload, windows, resamples=60)
    assert places["good"].behind is None
    hit = {name: np.array(both.row(name).per_article) for name in ("good", "poor")}
    count = np.array(both.articles["windows"])
    assert places["poor"].behind["R@5"].value == pytest.approx((hit["poor"] - hit["good"]) @ count / count.sum())
    assert places["ridge"].behind["R@5"] == flipped(both.difference("good", "ridge").metrics["R@5"])
    assert places["poor"].behind["R@5"].high < 0


def flipped(estimate):
    return type(estimate)(*(pytest.approx(-value) for value in (estimate.value, estimate.high, estimate.low)))


def test_without_kept_ranks_there_is_no_difference(folders, payload, windows, tmp_path):
    write(tmp_path, [weighted("fair", WEIGHTS["fair"])], payload, windows, kept=False)
    places = {place.name: place for place in placed(folders["good"], tmp_path, folders["poor"])}
    assert places["fair"].behind is None and places["poor"].behind is not None
    shutil.copytree(folders["good"], tmp_path / "alone")
    shutil.rmtree(tmp_path / "alone" / RANKS)
    assert all(place.behind is None for place in placed(tmp_path, tmp_path / "alone"))
    printed = shown(folders["good"], tmp_path)
    assert "–" in next(line for line in printed.splitlines() if " fair " in line)


def test_what_was_kept_of_earlier_evaluations_is_not_mixed_in(folders, payload, windows, tmp_path):
    """The same folder and name: retrained, with another seed, of a sample of the windows."""
    for weight, options in ((-0.9, {}), (-0.3, {"seed": 1}), (-0.3, {"limit": 20}), (0.3, {}), (0.0, {})):
        write(tmp_path, [weighted("fair", weight)], payload, windows, **options)
    write(tmp_path, [weighted("fair", WEIGHTS["fair"])], payload, windows)
    assert len(list((tmp_path / RANKS).glob("*.npz"))) > 6
    for order in ([folders["good"], tmp_path], [tmp_path, folders["good"]]):
        mine = {place.name: place.behind for place in placed(*order)}
        clean = {place.name: place.behind for place in placed(folders["good"], folders["fair"])}
        assert mine == clean and mine["fair"] is not None


def test_ranks_of_another_report_are_not_taken(folders, tmp_path):
    shutil.copytree(folders["good"] / RANKS, tmp_path / RANKS)
    report = json.loads((folders["fair"] / "report.json").read_text().replace('"fair"', '"good"'))
    (tmp_path / "report.json").write_text(json.dumps(report))
    places = placed(folders["poor"], tmp_path)
    assert [place.behind for place in places if place.name == "good"] == [None]


def test_other_units_are_not_paired(folders, tmp_path):
    shutil.copytree(folders["fair"], tmp_path / "fair")
    report = Report.open(tmp_path / "fair" / "report.json")
    about = {"payload": report.payload["id"], "windows": report.windows["id"], "split": "test", "seed": 0}
    store = Store(tmp_path / "fair" / RANKS, about)
    from fastlvm.evaluation.outcome import read_all

    kept = read_all(tmp_path / "fair" / RANKS, about)
    shutil.rmtree(tmp_path / "fair" / RANKS)
    store.put("all", [type(one)(**{**vars(one), "units": np.arange(len(one.units))}) for one in kept])
    places = {place.name: place for place in placed(folders["good"], tmp_path / "fair")}
    assert places["fair"].behind is None


def test_a_file_and_a_folder_are_the_same_report(folders):
    file = folders["fair"] / "report.json"
    assert [vars(p) for p in placed(folders["good"], file)] == [
        vars(p) for p in placed(folders["good"], folders["fair"])
    ]
    with pytest.raises(InputError, match="is given twice"):
        placed(file, folders["fair"])


def test_the_same_report_twice_is_refused_wherever_it_stands(folders, tmp_path):
    (tmp_path / "link").symlink_to(folders["fair"])
    with pytest.raises(InputError, match=r"link.* is given twice"):
        placed(folders["good"], folders["fair"], tmp_path / "link")


def test_two_files_of_one_folder_are_two_reports(folders, tmp_path):
    for name in ("good", "fair"):
        shutil.copyfile(folders[name] / "report.json", tmp_path / f"{name}.json")
        text = (tmp_path / f"{name}.json").read_text().replace(f'"{name}"', '"model"')
        (tmp_path / f"{name}.json").write_text(text)
    names = [place.name for place in placed(tmp_path / "fair.json", tmp_path / "good.json")]
    assert f"model ({tmp_path / 'good.json'})" in names and f"model ({tmp_path / 'fair.json'})" in names


def test_models_of_the_same_name_are_told_apart(folders, payload, windows, tmp_path):
    for folder, weight in (("a", 0.3), ("b", -0.3)):
        write(tmp_path / folder, [weighted("run", weight)], payload, windows)
    places = [place for place in placed(tmp_path / "b", tmp_path / "a", folders["poor"]) if place.row.kind == "model"]
    assert [place.name for place in places] == [f"run ({tmp_path / 'a'})", f"run ({tmp_path / 'b'})", "poor"]
    assert places[0].behind is None and places[1].behind["R@5"].value < 0


def test_reranked_orders_are_placed_too(payload, windows, folders, tmp_path):
    pool = payload.take(np.arange(len(payload)))

    def search(context, predictions, rows):
        scores = predictions @ pool.T
        scores[np.arange(len(rows))[:, None], rows] = -np.inf
        return np.argsort(-scores, axis=1)[:, :20]

    listing = Listing("list", 20, search, lambda v: np.argsort(-v @ pool.T, axis=1)[:, :20], label="by key", keys=True)
    write(tmp_path, [weighted("m", 0.3, listings=[listing])], payload, windows)
    places = {place.name: place for place in placed(folders["good"], tmp_path)}
    assert places["m + by key"].behind is not None
    assert "m + by key, uses keys" in shown(folders["good"], tmp_path)


def shown(*paths):
    found = [open_report(path) for path in paths]
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(leaderboard(found[0][1], compare(found)))
    return console.file.getvalue()


def test_the_table_numbers_models_alone(folders):
    lines = shown(*folders.values()).splitlines()
    assert max(map(len, lines)) <= 120
    for number, name in enumerate(("good", "fair", "poor"), 1):
        assert any(line.split()[:2] == [str(number), name] for line in lines), name
    assert any(line.split()[0] == "ridge" for line in lines if line.strip())


@pytest.fixture(scope="module")
def others(payload, windows, folders, tmp_path_factory):
    """What differs -> a folder with a report that does not compare with `good`."""
    root = tmp_path_factory.mktemp("others")
    vectors = -payload.take(np.arange(len(payload)))
    negative = Payload.build(root / "p", vectors, np.asarray(payload.keys), encoder="test-encoder")
    model = [weighted("m", 0.3)]
    plain = {"baselines": False}
    write(root / "payload", model, negative, Windows.build(negative, split=(0.6, 0.2, 0.2), seed=1), **plain)
    write(root / "windows", model, payload, Windows.build(payload, split=(0.6, 0.2, 0.2), seed=2), **plain)
    write(root / "split", model, payload, windows, split="validation", **plain)
    write(root / "number of windows", model, payload, windows, limit=30, **plain)
    write(root / "seed", model, payload, windows, seed=1, **plain)
    clusters = windows.keys("test")[:, 0]
    write(root / "unit of resampling", model, payload, windows, clusters=clusters, **plain)
    raw = json.loads((folders["fair"] / "report.json").read_text())
    raw["windows"]["headline"] = "nothing excluded"
    (root / "headline").mkdir()
    (root / "headline" / "report.json").write_text(json.dumps(raw))
    return root


@pytest.mark.parametrize(
    "what", ["payload", "windows", "split", "headline", "number of windows", "unit of resampling", "seed"]
)
def test_what_differs_is_named(folders, others, what):
    for order in ([folders["good"], others / what], [folders["good"], folders["fair"], others / what]):
        with pytest.raises(InputError, match=f"do not compare: {what} ") as error:
            placed(*order)
        assert str(others / what / "report.json") in str(error.value)


def test_one_report_or_none_is_refused(folders):
    for paths in ([], [folders["good"]]):
        with pytest.raises(InputError, match="at least two"):
            placed(*paths)


def test_what_is_no_report_is_refused(folders, tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match="does not exist: name a report"):
            open_report(path)
    raw = json.loads((folders["good"] / "report.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps(raw | {"version": 1}))
    with pytest.raises(IntegrityError, match="not a report of this version of fastlvm: run fastlvm eval again"):
        open_report(tmp_path / "old.json")


def test_a_difference_is_of_the_first_reports_resamples(folders, payload, windows, tmp_path):
    write(tmp_path, [weighted("fair", WEIGHTS["fair"])], payload, windows, resamples=200)
    first, other = (open_report(path)[1].bootstrap["resamples"] for path in (folders["good"], tmp_path))
    assert (first, other) == (60, 200)
    places = {place.name: place for place in placed(folders["good"], tmp_path)}
    same = {place.name: place for place in placed(folders["good"], folders["fair"])}
    assert places["fair"].behind == same["fair"].behind
    assert len(Bootstrap(windows.keys("test")[:, 0], resamples=60).weights) == 60
