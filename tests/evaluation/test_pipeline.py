"""Every figure of a report against a slow, plain computation on a small payload, and reports of odd payloads."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastlvm.data import Payload, Space, Windows
from fastlvm.errors import InputError
from fastlvm.evaluation import MISS, Listing, Ranker, Report, evaluate
from fastlvm.evaluation.baselines import NAMES
from fastlvm.evaluation.figures import CURVE
from fastlvm.evaluation.markdown import write_markdown
from fastlvm.evaluation.metrics import METRICS
from fastlvm.evaluation.page import write_page
from fastlvm.retrieval import Index

DIM, ARTICLES = 8, 12


def vectors_of(lengths, seed=0):
    """Drifting articles of these many chunks, some of which repeat a chunk of their own or another article."""
    rng = np.random.default_rng(seed)
    parts = [
        rng.standard_normal(DIM) + 0.6 * np.cumsum(rng.standard_normal((length, DIM)), axis=0) for length in lengths
    ]
    vectors = np.concatenate(parts)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors.astype(np.float32)
    keys = np.concatenate([np.stack([np.full(n, a), np.arange(n)], axis=1) for a, n in enumerate(lengths)])
    copied = rng.choice(np.arange(10, len(vectors)), len(vectors) // 8, replace=False)
    vectors[copied] = vectors[copied - rng.integers(1, 9, len(copied))]
    return vectors, keys.astype(np.int32)


@pytest.fixture(scope="module", params=["float32", "float16"])
def small(request, tmp_path_factory):
    """A payload with duplicates, and windows of articles of unequal length."""
    vectors, keys = vectors_of([9 + 3 * (a % 4) for a in range(ARTICLES)])
    titles = {a: f"title {a}" for a in range(ARTICLES)}
    payload = Payload.build(
        tmp_path_factory.mktemp("small") / "p",
        vectors.astype(request.param),
        keys,
        encoder="e",
        texts=["t"] * len(keys),
        titles=titles,
    )
    assert payload.vectors.dtype == request.param and len(np.unique(payload.groups)) < len(payload)
    return payload, Windows.build(payload, context=3, split=(0.4, 0.2, 0.4), seed=3)


class Plain:
    """One ranker on one split, a window at a time."""

    def __init__(self, payload, windows, predict, space=None, split="test"):
        pool = payload.take(np.arange(len(payload)))
        self.pool = pool if space is None else space.apply(pool)
        self.groups, self.keys = np.asarray(payload.groups), np.asarray(payload.keys)
        self.rows = windows.rows(split)
        predictions = predict(payload.take(self.rows[:, :-1]))
        self.predictions = predictions / np.linalg.norm(predictions, axis=1, keepdims=True)
        self.scores = self.predictions @ self.pool.T
        self.article = self.keys[self.rows[:, -1], 0]

    def rank(self, i, *, excluded=True, within=False):
        truth, context = self.rows[i, -1], self.rows[i, :-1]
        left_out = {self.groups[r] for r in context} if excluded else set()
        if self.groups[truth] in left_out:
            return MISS
        rows = np.flatnonzero(self.keys[:, 0] == self.article[i]) if within else np.arange(len(self.pool))
        best = {}
        for row in rows:
            best.setdefault(self.groups[row], self.scores[i, row])
        own = best.pop(self.groups[truth])
        return 1 + sum(score > own for group, score in best.items() if group not in left_out)

    def ranks(self, **options):
        return np.array([self.rank(i, **options) for i in range(len(self.rows))])

    def impostors(self):
        """Of each window: best other row, whether it wins, whether a context row does, and the margin."""
        found = []
        for i, row in enumerate(self.rows):
            context = {self.groups[r] for r in row[:-1]} - {self.groups[row[-1]]}
            out = context | {self.groups[row[-1]]}
            rest = [r for r in range(len(self.pool)) if self.groups[r] == r and r not in out]
            best = max(rest, key=lambda r: self.scores[i, r])
            truth, top = self.scores[i, row[-1]], self.scores[i, best]
            read = max(self.scores[i, r] for r in context)
            found.append((best, top > truth, read > truth and read > top, truth - top))
        return [np.array(column) for column in zip(*found, strict=True)]

    def by_article(self, values):
        return {a: np.mean(values[self.article == a]) for a in np.unique(self.article)}


def predict(context):
    return context[:, -1] + 0.4 * context[:, -2]


@pytest.fixture(scope="module", params=["raw", "space"])
def looked_at(request, small):
    payload, windows = small
    space = Space.fit_articles(payload, windows.articles("train")) if request.param == "space" else None

    def moved(context):
        return predict(context if space is None else space.apply(context))

    report = evaluate([Ranker("m", moved, space)], payload, windows, resamples=100)
    return report, Plain(payload, windows, moved, space), payload


def test_metrics_are_those_of_plain_ranks(looked_at):
    report, plain, _ = looked_at
    row = report.row("m")
    for ranks, figures in ((plain.ranks(), row.excluded), (plain.ranks(excluded=False), row.included)):
        reciprocal = np.where(ranks == MISS, 0, 1 / ranks)
        five, fifty = np.mean(ranks <= 5), np.mean(ranks <= 50)
        middle = int(np.sort(ranks)[(len(ranks) - 1) // 2])
        want = {f"R@{k}": np.mean(ranks <= k) for k in (1, 5, 10)}
        want |= {"MRR": reciprocal.mean(), "MRR@10": np.where(ranks <= 10, reciprocal, 0).mean()}
        want |= {"Contain@20": np.mean(ranks <= 20), "Contain@50": fifty, "Eff@5": five / fifty}
        want |= {"median_rank": middle}
        truth = plain.pool[plain.rows[:, -1]]
        want["cosine"] = np.mean(np.sum(plain.predictions * truth, axis=1) / np.linalg.norm(truth, axis=1))
        assert {name: figures[name].value for name in METRICS} == pytest.approx(want, abs=1e-5)
    assert report.windows["unanswerable"] == np.count_nonzero(plain.ranks() == MISS) > 0


def test_a_macro_average_is_the_mean_of_the_articles_means(looked_at):
    report, plain, _ = looked_at
    macro, ranks = report.row("m").macro, plain.ranks()
    for k in (1, 5, 10):
        assert macro[f"R@{k}"].value == pytest.approx(np.mean([*plain.by_article(ranks <= k).values()]))
        assert macro[f"R@{k}"].low <= macro[f"R@{k}"].value <= macro[f"R@{k}"].high
    assert macro["R@5"].value != pytest.approx(report.row("m").excluded["R@5"].value)


def test_ranks_within_the_article(looked_at):
    report, plain, _ = looked_at
    ranks = plain.ranks(within=True)
    within = report.row("m").within_article
    assert {k: within[f"R@{k}"].value for k in (1, 5, 10)} == pytest.approx(
        {k: np.mean(ranks <= k) for k in (1, 5, 10)}
    )
    assert within["R@5"].value >= report.row("m").excluded["R@5"].value


def test_curve_and_histogram_count_every_window(looked_at):
    report, plain, _ = looked_at
    row = report.row("m")
    assert row.curve["k"] == list(CURVE)
    for name, ranks in (("excluded", plain.ranks()), ("included", plain.ranks(excluded=False))):
        assert row.curve[name] == [np.mean(ranks <= k) for k in CURVE]
    ranks, bins = plain.ranks(), row.histogram
    for first, count in zip(bins["from"], bins["windows"], strict=True):
        assert count == np.count_nonzero((first <= ranks) & (ranks < 2 * first)), first
    assert bins["misses"] == np.count_nonzero(ranks == MISS)
    assert sum(bins["windows"]) + bins["misses"] == len(ranks) and bins["windows"][-1] > 0


def test_impostors(looked_at):
    report, plain, _ = looked_at
    best, won, read, margin = plain.impostors()
    found = report.row("m").impostors
    assert found["won"] == pytest.approx(won.mean()) and found["context_row_won"] == pytest.approx(read.mean())
    same = plain.keys[best, 0] == plain.article
    assert found["same_article"] == pytest.approx(same[won].mean())
    assert found["margin"] == pytest.approx(margin.mean(), abs=1e-5)
    assert found["same"] == same.tolist()
    np.testing.assert_allclose(np.subtract(found["truth"], found["impostor"]), margin, atol=2e-4)
    assert all(report.row(name).impostors is None for name in NAMES)


def test_articles_and_what_stands_beside_them(looked_at):
    report, plain, _ = looked_at
    five = plain.by_article(plain.ranks() <= 5)
    assert report.articles["number"] == list(five)
    assert report.row("m").per_article == pytest.approx(list(five.values()))
    assert report.articles["windows"] == [np.count_nonzero(plain.article == a) for a in five]
    assert report.articles["title"] == [f"title {a}" for a in five]
    assert report.windows["articles"] == report.bootstrap["units"] == len(five)


def test_a_difference_is_of_what_both_rows_say(looked_at):
    report = looked_at[0]
    for name in NAMES[:9]:
        metrics = report.difference("m", name).metrics
        for metric in set(METRICS) - {"median_rank"}:
            want = report.row("m").excluded[metric].value - report.row(name).excluded[metric].value
            assert metrics[metric].value == pytest.approx(want, abs=1e-9), (name, metric)
    assert {d.baseline for d in report.differences} == set(NAMES[:9])


def test_oracles_are_ceilings_whatever_repeats(looked_at):
    report = looked_at[0]
    answerable = 1 - report.windows["unanswerable"] / report.windows["evaluated"]
    for name in ("target as query", "next by key"):
        assert report.row(name).excluded["R@1"].value == pytest.approx(answerable)
    assert report.row("next by key").keys and not report.row("target as query").keys


def test_a_report_is_the_same_when_read_back(looked_at, tmp_path):
    report = looked_at[0]
    again = Report.from_dict(report.to_dict())
    assert again.rows == report.rows and again.differences == report.differences
    assert again.to_dict() == report.to_dict()
    report.write(tmp_path / "r.json")
    assert Report.open(tmp_path / "r.json").to_dict() == json.loads((tmp_path / "r.json").read_text())


@pytest.mark.parametrize("kind", ["flat", "ivf_flat"])
def test_what_an_index_lists(small, kind):
    """A flat index loses nothing, also where chunks repeat; one that looks at few lists does."""
    payload, windows = small
    index = Index.build(payload, kind=kind, **({} if kind == "flat" else {"nlist": 16, "nprobe": 1}))
    listing = Listing(
        kind, 20, lambda c, p, rows: index.search(p, 20, rows).ids, lambda vectors: index.search(vectors, 20).ids
    )
    report = evaluate([Ranker("m", predict, listings=[listing])], payload, windows, resamples=50)
    row, plain = report.row("m"), Plain(payload, windows, predict)
    assert (row.ann["index"], row.ann["k"]) == (kind, 20)
    assert set(row.ann["metrics"]) == set(row.ann["loss"]) == {"R@1", "R@5", "R@10", "MRR@10", "Contain@20"}
    assert set(row.ann["target_recall"]) == {"R@1", "R@5", "R@10"}
    groups = np.asarray(payload.groups)
    ids = index.search(plain.predictions, 20, plain.rows[:, :-1]).ids
    hit = (groups[ids] == groups[plain.rows[:, -1]][:, None]) & (ids >= 0)
    for name, k in (("R@1", 1), ("R@5", 5), ("R@10", 10), ("Contain@20", 20)):
        assert row.ann["metrics"][name].value == pytest.approx(hit[:, :k].any(axis=1).mean())
        loss = row.ann["metrics"][name].value - row.excluded[name].value
        assert row.ann["loss"][name].value == pytest.approx(loss)
        assert (loss == pytest.approx(0, abs=1e-12)) == (kind == "flat") or k < 20
    assert row.ann["target_recall"]["R@1"] == 1  # its own list is the one that is looked at


def fixed(payload, windows, orders):
    """A list of given orders [n, k], whatever is asked."""
    at = {row[:-1].tobytes(): i for i, row in enumerate(windows.rows("test"))}

    def search(context, predictions, rows):
        return orders[[at[row.tobytes()] for row in np.ascontiguousarray(rows)]]

    return search


def test_an_order_of_the_list_is_a_row_of_its_own(small):
    payload, windows = small
    rows = windows.rows("test")
    orders = np.full((len(rows), 50), -1)
    orders[:, 7] = rows[:, -1]  # the truth is eighth, after nothing
    listings = [
        Listing("flat", 50, fixed(payload, windows, orders), lambda v: orders[: len(v)]),
        Listing("flat", 50, fixed(payload, windows, orders[:, ::-1]), lambda v: orders[: len(v)], "turned"),
        Listing("flat", 50, fixed(payload, windows, orders), lambda v: orders[: len(v)], "by key", keys=True),
    ]
    report = evaluate([Ranker("m", predict, listings=listings, note="n")], payload, windows, resamples=20)
    assert [row.name for row in report.rows[:4]] == ["m", "m + turned", "m + by key", "random"]
    row = report.row("m + turned")
    assert (row.kind, row.keys, row.space, row.domain) == ("reranked", False, "raw", "in")
    assert row.excluded["median_rank"].value == 43 and row.excluded["Contain@50"].value == 1
    assert row.excluded["Contain@20"].value == 0
    assert row.included is row.within_article is row.impostors is row.curve["included"] is row.ann is None
    assert "others are misses" in row.note
    assert report.row("m + by key").keys and report.row("m + by key").excluded["R@10"].value == 1
    assert {d.model for d in report.differences} == {"m"}
    assert report.row("m").ann["metrics"]["R@10"].value == 1 and report.row("m").ann["metrics"]["R@5"].value == 0


def test_rows_that_were_added_to_an_index_are_others(small):
    """They are of no article of the payload, and stand in the way."""
    payload, windows = small
    rows = windows.rows("test")
    orders = np.full((len(rows), 50), len(payload))
    orders[:, 1] = rows[:, -1]
    listing = Listing("grown", 50, fixed(payload, windows, orders), lambda v: np.full((len(v), 50), len(payload) + 7))
    report = evaluate([Ranker("m", predict, listings=[listing])], payload, windows, resamples=20, baselines=False)
    metrics = report.row("m").ann["metrics"]
    assert metrics["R@1"].value == 0 and metrics["R@5"].value == 1
    assert set(report.row("m").ann["target_recall"].values()) == {0.0}


def test_names_that_an_order_would_have_are_refused(small):
    payload, windows = small
    listing = Listing("flat", 5, lambda *_: None, lambda _: None, "x")
    models = [Ranker("m", predict, listings=[listing]), Ranker("m + x", predict)]
    with pytest.raises(InputError, match=r"two rankers are named 'm \+ x'"):
        evaluate(models, payload, windows)


def test_groups_of_articles_are_resampled_where_windows_have_them(small):
    payload, _ = small
    groups = np.asarray(payload.keys)[:, 0] // 2
    windows = Windows.build(payload, context=3, split=(0.4, 0.2, 0.4), seed=0, groups=groups, group_by="pairs")
    report = evaluate([Ranker("m", predict)], payload, windows, resamples=100)
    own = windows.groups("test")
    assert (report.bootstrap["unit"], report.bootstrap["units"]) == ("group", len(np.unique(own)))
    assert report.windows["articles"] == 2 * report.bootstrap["units"]
    assert f"resamples of {report.bootstrap['units']} groups" in " ".join(report.text().split())
    same = evaluate([Ranker("m", predict)], payload, windows, resamples=100, clusters=own)
    assert same.bootstrap["unit"] == "given clusters" and same.row("m").excluded == report.row("m").excluded
    macro = np.mean(
        [*Plain(payload, windows, predict).by_article(Plain(payload, windows, predict).ranks() <= 5).values()]
    )
    assert report.row("m").macro["R@5"].value == pytest.approx(macro)  # articles, not groups, count once


def test_a_sample_is_of_the_windows_and_in_their_order(small):
    payload, windows = small
    whole, plain = len(windows.rows("test")), Plain(payload, windows, predict)
    few = evaluate([Ranker("m", predict)], payload, windows, limit=9, seed=4, resamples=20)
    chosen = np.sort(np.random.default_rng(4).choice(whole, 9, replace=False))
    assert (few.windows["evaluated"], few.windows["total"]) == (9, whole)
    assert few.row("m").curve["excluded"] == [np.mean(plain.ranks()[chosen] <= k) for k in CURVE]
    for limit in (whole, whole + 1):
        report = evaluate([Ranker("m", predict)], payload, windows, limit=limit, resamples=20)
        assert report.windows["evaluated"] == whole
    assert few.articles["windows"] == [np.count_nonzero(plain.article[chosen] == a) for a in few.articles["number"]]


def test_a_split_by_its_other_name(small):
    payload, windows = small
    one, other = (
        evaluate([Ranker("m", predict)], payload, windows, split=split, baselines=False, resamples=20)
        for split in ("val", "validation")
    )
    assert one.to_dict() == other.to_dict() and one.windows["split"] == "validation"


def test_baselines_are_in_the_space_of_a_model_that_is_at_home(small):
    payload, windows = small
    home, other = (Space.fit_articles(payload, windows.articles(split)) for split in ("train", "test"))
    models = [
        Ranker("away", lambda c: other.apply(predict(c)), other, domain="out"),
        Ranker("plain", predict, Space.identity(payload.dim)),
        Ranker("home", lambda c: home.apply(predict(c)), home),
    ]
    for order in (models, models[::-1]):
        report = evaluate(order, payload, windows, resamples=10)
        assert report.row("whitened mixture").space == home.id
        assert report.row("away").domain == "out" and "away (out of domain)" in report.text()
    alone = evaluate(models[:1], payload, windows, resamples=10)
    assert alone.row("whitened mixture").space == other.id


@pytest.fixture
def one_window(tmp_path):
    vectors, keys = vectors_of([6, 12, 12])
    kept = np.ones(len(keys), bool)
    payload = Payload.build(tmp_path / "p", vectors[kept], keys[kept], encoder="e")
    built = Windows.build(payload, context=5, split=(1, 0, 0))
    rows, truth, split = (array.copy() for array in built.arrays())
    split[truth[:, 0] == 0] = 2
    return payload, Windows(payload.id, rows, truth, split)


def test_a_single_window_has_figures_and_no_intervals(one_window, tmp_path):
    payload, windows = one_window
    ids = np.arange(10)[None].repeat(1, axis=0)
    listing = Listing("flat", 10, lambda *_: ids, lambda _: ids)
    report = evaluate([Ranker("m", predict, listings=[listing])], payload, windows, resamples=20)
    assert report.windows["evaluated"] == report.windows["articles"] == report.bootstrap["units"] == 1
    for row in report.rows:
        for estimate in (*row.excluded.values(), *row.macro.values()):
            assert estimate.low is None and estimate.high is None
    assert all(e.low is None for d in report.differences for e in d.metrics.values())
    assert report.findings == []  # one window may be anything
    assert "unknown" in report.text() and "[" not in report.row("m").note
    report.write(tmp_path / "r.json")
    assert Report.open(tmp_path / "r.json").to_dict() == report.to_dict()
    write_markdown(report, tmp_path / "r.md")
    write_page(report, tmp_path / "r.html")
    report.plot(tmp_path / "r.png")
    assert (tmp_path / "r.md").read_text() and (tmp_path / "r.html").read_text()


def test_a_payload_of_fewer_chunks_than_are_listed(one_window):
    payload, windows = one_window
    index = Index.build(payload)
    listing = Listing("flat", 50, lambda c, p, rows: index.search(p, 50, rows).ids, lambda v: index.search(v, 50).ids)
    report = evaluate([Ranker("m", predict, listings=[listing])], payload, windows, resamples=20, baselines=False)
    assert report.row("m").ann["loss"]["Contain@50"].value == 0


def knows(payload, windows):
    rows = windows.rows("test")
    known = {payload.take(row[:-1]).tobytes(): payload.take(row[-1:])[0] for row in rows}
    return lambda context: np.stack([known[one.tobytes()] for one in context])


FAULTS = {
    "the truth": (knows, "model-returns-truth"),
    "the last row": (lambda *_: lambda c: c[:, -1], "model-copies-last"),
    "a constant": (lambda *_: lambda c: np.ones((len(c), c.shape[2]), np.float32), "model-constant"),
}


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("what", FAULTS)
def test_a_model_that_is_none_is_found_out(payload, windows, what, whitened):
    make, code = FAULTS[what]
    plain = make(payload, windows)
    space = Space.fit_articles(payload, windows.articles("train")) if whitened else None

    def moved(context):
        return plain(context) if space is None or what == "a constant" else space.apply(plain(context))

    models = [Ranker("honest", predict), Ranker("suspect", moved, space)]
    report = evaluate(models, payload, windows, resamples=20)
    assert [(one["code"], one["level"]) for one in report.findings] == [(code, "fault")]
    assert report.findings[0]["sentence"].startswith("suspect ")
    printed = " ".join(report.text().split())
    assert f"fault: {' '.join(report.findings[0]['sentence'].split())}" in printed
    json.dumps(report.to_dict(), allow_nan=False)


def test_knowing_the_training_articles_is_a_warning(payload, windows):
    rows = windows.rows("train")
    known = {payload.take(row[:-1]).tobytes(): payload.take(row[-1:])[0] for row in rows}
    model = Ranker("m", lambda context: np.stack([known[one.tobytes()] for one in context]))
    report = evaluate([model], payload, windows, split="train", resamples=10, baselines=False)
    assert [one["level"] for one in report.findings] == ["warning"]


def test_names_are_printed_as_they_are(payload, windows):
    names = ["[u]nder", "a[/b]", "[red]x[/red]"]
    models = [Ranker(name, lambda c, w=i: c[:, -1] + 0.1 * (w + 1) * c[:, 0]) for i, name in enumerate(names)]
    text = evaluate(models, payload, windows, resamples=10).text()
    for name in names:
        assert name in text and f"{name} − copy-last" in text


def test_what_is_going_on_is_said(small):
    payload, windows = small
    said, shares = [], []
    evaluate([Ranker("m", predict)], payload, windows, resamples=10, progress=said.append, step=shares.append)
    assert said[0] == "ranking m" and said[1] == "fitting the baselines" and said[-1] == "resampling articles"
    assert max(shares) == 1 and min(shares) > 0


@pytest.mark.parametrize("seed", [-1, True, 1.5, None])
def test_a_seed_that_is_none_is_refused(small, seed):
    payload, windows = small
    with pytest.raises(InputError, match="seed is"):
        evaluate([Ranker("m", predict)], payload, windows, seed=seed)
