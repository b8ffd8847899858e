from __future__ import annotations

import builtins
import json

import numpy as np
import pytest

from fastlvm.data import Payload, Space, Windows
from fastlvm.errors import InputError, IntegrityError
from fastlvm.evaluation import Ranker, Report, evaluate
from fastlvm.evaluation.latency import Latency, Stage


def oracle(payload, windows, split="test"):
    """A ranker that knows the answer, by looking the context's last vector up."""
    rows = windows.rows(split)
    last, target = payload.take(rows[:, -2]), payload.take(rows[:, -1])
    return Ranker("oracle", lambda context: target[np.argmax(context[:, -1] @ last.T, axis=1)])


@pytest.fixture(scope="module")
def report(payload, windows):
    return evaluate([oracle(payload, windows)], payload, windows, resamples=200)


def test_the_oracle_is_first_and_beats_everything(report):
    row = report.row("oracle")
    assert row.excluded["R@1"].value == row.included["R@1"].value == 1
    assert row.excluded["cosine"].value == pytest.approx(1)
    assert [r.kind for r in report.rows] == ["model"] + ["baseline"] * 9 + ["oracle"] * 2
    for r in report.rows[1:10]:
        difference = report.difference("oracle", r.name).metrics["R@5"]
        assert difference.value == pytest.approx(1 - r.excluded["R@5"].value)
        assert difference.low > 0, r.name


def test_context_rows_take_the_first_ranks_unless_excluded(report):
    copy = report.row("copy-last")
    assert copy.included["R@1"].value == 0  # the last context row itself
    assert copy.excluded["R@1"].value > 0
    assert report.row("random").excluded["R@5"].value < 0.1 < copy.excluded["R@5"].value


def test_the_report_says_what_it_is_of(report, payload, windows):
    assert report.payload["id"] == payload.id and report.payload["rows"] == len(payload)
    assert report.windows["id"] == windows.id and report.windows["split"] == "test"
    assert report.windows["evaluated"] == report.windows["total"] == len(windows.rows("test"))
    assert report.windows["articles"] == report.bootstrap["units"] == 8
    assert report.windows["unanswerable"] == 0
    assert 0 < report.alignment["random_pair_cosine"] < 1


def test_whitened_baselines_use_the_models_space(payload, windows):
    space = Space.fit_articles(payload, windows.articles("train")[:9])
    model = Ranker("model", lambda context: space.apply(context[:, -1]), space)
    report = evaluate([model], payload, windows, resamples=50)
    same = report.difference("model", "whitened copy-last").metrics
    assert all(figure.value == figure.low == figure.high == 0 for figure in same.values())
    assert report.row("whitened mixture").space == report.row("model").space == space.id


def test_the_table_tells_the_whitened_space_from_a_models_own(payload, windows):
    base = Space.fit_articles(payload, windows.articles("train"))
    tower = {"up.weight": np.ones((3, 16)), "up.bias": np.ones(3), "down.weight": np.ones((16, 3))}
    own = base.with_tower({**tower, "down.bias": np.ones(16)})
    models = [
        Ranker(name, lambda context, space=space: space.apply(context).mean(axis=1), space)
        for name, space in (("one", own), ("other", base))
    ]
    report = evaluate(models, payload, windows, split="test", resamples=20)
    table = report.table().renderables[1]
    column = dict(zip(*(column.cells for column in table.columns[:2]), strict=True))
    assert (column["one"], column["other"]) == ("own", "whitened")
    assert (column["whitened mixture"], column["copy-last"]) == ("whitened", "raw")


def test_a_model_in_an_identity_space_is_ranked_raw(payload, windows):
    model = Ranker("model", lambda context: context[:, -1], Space.identity(payload.dim))
    report = evaluate([model], payload, windows, resamples=50)
    assert report.row("model").space == "raw"
    assert report.row("model").excluded == report.row("copy-last").excluded
    assert report.row("whitened mixture").space != "raw"


def test_json_round_trip_and_no_nan(report, tmp_path):
    report.latency["oracle"] = Latency({"total": Stage(1.0, 2.0, 3.0, 1.5)}, 10, 2, 1, "a processor, 2 cores")
    path = tmp_path / "report.json"
    report.write(path)
    text = path.read_text()
    raw = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} in the report"))
    again = Report.open(path)
    assert again.to_dict() == report.to_dict() == raw
    assert again.text() == report.text()


def test_undefined_figures_become_null(payload, windows, tmp_path):
    last_resort = Ranker("opposite", lambda context: -context[:, -1])
    report = evaluate([last_resort], payload, windows, baselines=False, resamples=50)
    assert report.row("opposite").excluded["Contain@50"].value == 0
    assert report.to_dict()["rankers"][0]["excluded"]["Eff@5"] == {"value": None, "low": None, "high": None}
    report.write(tmp_path / "r.json")
    report.plot(tmp_path / "r.png")
    assert "–" in report.text()


def test_the_table_fits_and_names_everything(report):
    text = report.text()
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text
    for row in report.rows:
        assert row.name in text
    for word in ("excluded", "Contain@50", "payload", "random pairs", "oracle − whitened ridge"):
        assert word in text


def test_the_chart_is_a_png(report, tmp_path):
    path = tmp_path / "charts" / "report.png"
    report.plot(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in path.parent.iterdir()] == ["report.png"]


def test_without_matplotlib_the_extra_is_named(report, tmp_path, monkeypatch):
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(InputError, match=r"pip install fastlvm\[plot\]"):
        report.plot(tmp_path / "report.png")
    assert not list(tmp_path.iterdir())


def test_repeated_targets_are_counted_as_misses(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((120, 8)).astype(np.float32)
    vectors[np.arange(9, 120, 10)] = vectors[np.arange(7, 120, 10)]  # the last chunk of an article repeats its eighth
    keys = np.stack([np.arange(120) // 10, np.arange(120) % 10], axis=1).astype(np.int32)
    payload = Payload.build(tmp_path / "p", vectors, keys, encoder="test")
    windows = Windows.build(payload, split=(0.5, 0.0, 0.5))
    rows = windows.rows("test")
    by_last = {payload.take(row[-2]).tobytes(): payload.take(row[-1]) for row in rows}
    knowing = Ranker("knowing", lambda context: np.stack([by_last[c[-1].tobytes()] for c in context]))
    report = evaluate([knowing], payload, windows, resamples=50)
    articles = len(windows.articles("test"))
    assert report.windows["unanswerable"] == articles
    assert report.row("knowing").excluded["R@1"].value == pytest.approx(1 - articles / len(rows))
    assert report.row("knowing").included["R@1"].value == 1
    assert "repeats a context row" in report.text()


def test_windows_of_another_payload_are_refused_first(windows, tmp_path):
    rng = np.random.default_rng(0)
    keys = np.stack([np.arange(600) // 20, np.arange(600) % 20], axis=1).astype(np.int32)
    other = Payload.build(tmp_path / "p", rng.standard_normal((600, 16)).astype(np.float32), keys, encoder="test")
    model = Ranker("model", lambda context: pytest.fail("predicted before the windows were checked"))
    with pytest.raises(IntegrityError):
        evaluate([model], other, windows)


def test_limit_and_clusters(payload, windows):
    model = oracle(payload, windows)
    few = evaluate([model], payload, windows, baselines=False, limit=10, resamples=50)
    assert few.windows["evaluated"] == 10 < few.windows["total"]
    assert few.to_dict() == evaluate([model], payload, windows, baselines=False, limit=10, resamples=50).to_dict()
    halves = np.arange(len(windows.rows("test"))) % 2
    grouped = evaluate([model], payload, windows, baselines=False, clusters=halves, resamples=50)
    assert grouped.bootstrap["units"] == 2 and grouped.windows["articles"] == 8


def bad_models(payload):
    return [
        ([], {"baselines": False}, "nothing to evaluate"),
        ([Ranker("random", lambda c: c[:, -1])], {}, "two rankers are named 'random'"),
        ([Ranker("m", lambda c: np.zeros((len(c), c.shape[2])))], {}, "prediction of m row 0 is zero"),
        ([Ranker("m", lambda c: c[:, -1] * np.nan)], {}, "prediction of m row 0 holds NaN"),
        ([Ranker("m", lambda c: c[:3, -1])], {}, "prediction of m is float32"),
        ([Ranker("m", lambda c: c[:, -1], Space.identity(3))], {"baselines": False}, "dimensions"),
        ([Ranker("m", lambda c: c[:, -1])], {"limit": 0}, "limit is 0"),
        ([Ranker("m", lambda c: c[:, -1])], {"clusters": np.zeros(3)}, "clusters names 3"),
    ]


@pytest.mark.parametrize("case", range(8))
def test_bad_models_are_refused(payload, windows, case):
    models, options, message = bad_models(payload)[case]
    with pytest.raises(InputError, match=message):
        evaluate(models, payload, windows, **options)


def test_an_empty_split_is_refused(payload):
    windows = Windows.build(payload, split=(1.0, 0.0, 0.0))
    with pytest.raises(InputError, match="none in split 'test'"):
        evaluate([Ranker("m", lambda c: c[:, -1])], payload, windows)


def test_what_is_not_a_report_is_refused(report, tmp_path):
    for content in ("[]", '{"format": "other"}', '{"format": "fastlvm-report", "version": 1}', "{"):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(InputError, match=r"r\.json"):
            Report.open(tmp_path / "r.json")
    with pytest.raises(InputError, match="kind of ranker"):
        Ranker("m", lambda c: c, kind="other")
    with pytest.raises(InputError, match="has no ranker"):
        report.row("x")
    with pytest.raises(InputError, match="does not compare"):
        report.difference("x", "y")
