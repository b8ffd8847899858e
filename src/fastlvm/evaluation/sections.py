"""A report as sections of sentences and tables: what report.md and report.html both say, before either's markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastlvm.errors import InputError
from fastlvm.evaluation.bootstrap import Estimate
from fastlvm.evaluation.metrics import WITHIN
from fastlvm.evaluation.wording import (
    basis,
    called,
    impostor_notes,
    latency_notes,
    of,
    rank,
    row_notes,
    short,
    signed,
    space_words,
    verdict,
)

if TYPE_CHECKING:
    from fastlvm.evaluation.report import Report, Row

_INCLUDED = ("R@1", "R@5", "R@10", "MRR@10", "MRR", "Contain@20", "Contain@50")
_MACRO = ("R@1", "R@10", "MRR@10", "Contain@50")
_COMPARED = ("R@5", "Contain@50", "MRR@10")
_BEYOND_CHANCE = {"better": "better", "worse": "worse", "no": "no difference", "unknown": "not known"}


@dataclass(frozen=True)
class Table:
    """head [c] and rows of [c] cells each; the first column is text, others are figures. strong: rows that stand out.

    folded: numbers of a plot, which a page may hide until they are asked for.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """Sentences, tables, and the notes below them. key: what plots belong here."""

    key: str
    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


def sections(report: Report) -> list[Section]:
    """Everything a report says below its lede; a section without anything to say is left out."""
    made = (_rankers, _keys, _differences, _ranks, _articles, _impostors, _index, _latency, _provenance)
    found = [make(report) for make in made]
    return [section for section in found if section.sentences or section.tables or section.notes]


def findings(report: Report) -> list[tuple[str, str]]:
    """Level and sentence of what is wrong, the worst first."""
    order = {"fault": 0, "warning": 1}
    wrong = sorted(report.findings, key=lambda finding: order.get(finding["level"], 2))
    return [(finding["level"], finding["sentence"]) for finding in wrong if finding["level"] != "ok"]


def best(report: Report, kind: str) -> Row | None:
    """The ranker of a kind with the highest R@5 that looks at no keys; the payload's own before one from elsewhere."""
    rows = [row for row in report.rows if row.kind == kind and not row.keys]
    return max(rows, key=lambda row: (row.domain == "in", row.excluded["R@5"].value or 0.0), default=None)


def lede(report: Report) -> list[str]:
    """Which model is best, and whether it beats the best baseline, in plain words."""
    model, baseline = best(report, "model"), best(report, "baseline")
    w = report.windows
    named = model or baseline
    if named is None:
        return ["No model and no baseline was ranked."]
    what = "The best model" if model else "No model was ranked. The best baseline"
    lines = [
        f"{what}, {called(named)}, has the true next chunk among its first 5 in "
        f"{_share(named.excluded['R@5'].value)} of {w['evaluated']:,} {w['split']} windows: R@5 "
        f"{_interval(named.excluded['R@5'], report)}, the {w['context']} context rows left out."
    ]
    if model and baseline:
        lines.append(f"The best baseline, {baseline.name}, has R@5 {_interval(baseline.excluded['R@5'], report)}.")
        lines.append(_against(report, model, baseline))
    if any(level == "fault" for level, _ in findings(report)):
        lines.append("Something is wrong, see the faults above: do not rely on these figures.")
    return lines


def _against(report: Report, model: Row, baseline: Row) -> str:
    try:
        five = report.difference(model.name, baseline.name).metrics["R@5"]
    except InputError:
        return "The two were not compared window by window."
    said = {
        "better": "the model is better, by more than chance explains",
        "worse": "the model is worse, by more than chance explains",
        "no": "the interval holds zero, so no difference is shown",
        "unknown": "there are too few articles for an interval, so it is not known whether this is chance",
    }
    return f"Paired difference in R@5 {signed(five)}: {said[verdict(five)]}."


def _rankers(report: Report) -> Section:
    rows = [row for row in report.rows if not row.keys]
    included = [row for row in rows if row.included is not None]
    tables = [_headline(report, "Context rows excluded (headline)", rows)]
    if included:
        cells = [[called(row), *(of(row.included, name) for name in _INCLUDED)] for row in included]
        tables.append(Table("Context rows included", ["ranker", *_INCLUDED], cells, _models(included)))
    sentence = "These rankers see vectors alone. Target as query is given the answer: it is the ceiling of the others."
    return Section("rankers", "Results", [sentence], tables, [*basis(report), *row_notes(report)])


def _keys(report: Report) -> Section:
    rows = [row for row in report.rows if row.keys]
    if not rows:
        return Section("keys", "")
    sentence = (
        "These look at chunks' keys, and where windows are runs of chunks the key alone gives the next one: next by "
        "key is the ceiling of this table. Nothing here compares with rankers that see vectors alone."
    )
    rows = sorted(rows, key=lambda row: row.kind == "oracle")
    tables = [
        _headline(report, "With keys, context rows excluded", rows),
        *_by_article(report, "With keys, by article", rows),
    ]
    return Section("keys", "Rankers that use keys", [sentence], tables)


def _headline(report: Report, title: str, rows: Sequence[Row]) -> Table:
    level = f"{100 * report.bootstrap['level']:g} %"
    head = ("ranker", f"R@5 ({level})", "R@1", "R@10", "MRR@10", "MRR", f"Contain@50 ({level})", "Contain@20", "Eff@5")
    spaces = space_words(report)
    cells = [
        [
            f"{called(row)} (ceiling)" if row.kind == "oracle" else called(row),
            _with_interval(row.excluded, "R@5"),
            *(of(row.excluded, name) for name in ("R@1", "R@10", "MRR@10", "MRR")),
            _with_interval(row.excluded, "Contain@50"),
            *(of(row.excluded, name) for name in ("Contain@20", "Eff@5")),
            rank(row.excluded["median_rank"]) if "median_rank" in row.excluded else "–",
            of(row.excluded, "cosine"),
            spaces[row.space],
        ]
        for row in rows
    ]
    return Table(title, [*head, "median rank", "cosine", "space"], cells, _models(rows))


def _differences(report: Report) -> Section:
    if not report.differences:
        return Section("differences", "")
    level = f"{100 * report.bootstrap['level']:g} %"
    head = ["baseline", *(f"{name} ({level})" for name in _COMPARED), "R@5 beyond chance"]
    strongest = best(report, "baseline")
    tables = []
    for model in dict.fromkeys(one.model for one in report.differences):
        ones = [one for one in report.differences if one.model == model]
        cells = [
            [
                one.baseline,
                *(signed(one.metrics[name]) for name in _COMPARED),
                _BEYOND_CHANCE[verdict(one.metrics["R@5"])],
            ]
            for one in ones
        ]
        told = frozenset(at for at, one in enumerate(ones) if strongest and one.baseline == strongest.name)
        tables.append(Table(f"{model} less each baseline", head, cells, told))
    sentence = (
        f"The same windows and the same resamples of {report.bootstrap['unit']}s for both: a difference counts "
        "where its interval leaves out zero. The best baseline stands out."
    )
    return Section("differences", "Paired differences", [sentence], tables)


def _ranks(report: Report) -> Section:
    tables = []
    curves = [
        row for row in report.rows if row.curve is not None and row.kind in ("model", "baseline") and not row.keys
    ]
    if curves:
        ks = max((row.curve["k"] for row in curves if row.curve), key=len)
        cells = [[called(row), *_at(row.curve, ks)] for row in curves]
        tables.append(
            Table("Share of windows within rank k", ["ranker", *map(_count, ks)], cells, _models(curves), True)
        )
    binned = [row for row in curves if row.histogram is not None]
    if binned:
        starts = max((row.histogram["from"] for row in binned if row.histogram), key=len)
        cells = [[called(row), *_binned(row.histogram, len(starts))] for row in binned]
        head = ["ranker", *(_bin_name(start) for start in starts), "missed"]
        tables.append(Table("Windows by rank of the truth", head, cells, _models(binned), True))
    sentence = "How far down the list the true next chunk stands, context rows excluded."
    return Section("ranks", "Ranks", [sentence] if tables else [], tables)


def _articles(report: Report) -> Section:
    tables = _by_article(report, "By article, context rows excluded", [row for row in report.rows if not row.keys])
    sentence = (
        "Macro: every article counts the same, however many windows it has. Within: the rank among the chunks of the "
        "truth's own article alone, which tells order from topic."
    )
    return Section("articles", "By article", [sentence] if tables else [], tables)


def _by_article(report: Report, title: str, rows: Sequence[Row]) -> list[Table]:
    """One table, or none where nothing was measured by article."""
    rows = [row for row in rows if row.macro is not None or row.within_article is not None]
    level = f"{100 * report.bootstrap['level']:g} %"
    head = [
        "ranker",
        f"macro R@5 ({level})",
        *(f"macro {name}" for name in _MACRO),
        *(f"within {name}" for name in WITHIN),
    ]
    cells = [
        [
            called(row),
            _with_interval(row.macro or {}, "R@5"),
            *(of(row.macro, name) for name in _MACRO),
            *(of(row.within_article, name) for name in WITHIN),
        ]
        for row in rows
    ]
    return [Table(title, head, cells, _models(rows))] if rows else []


def _impostors(report: Report) -> Section:
    return Section("impostors", "What beats the truth", impostor_notes(report))


def _index(report: Report) -> Section:
    tables, lines = [], []
    for row in report.rows:
        if row.ann is None:
            continue
        cells = [
            [metric, short(found), of(row.excluded, metric), signed(row.ann["loss"][metric])]
            for metric, found in row.ann["metrics"].items()
        ]
        title = f"{called(row)}, {row.ann['index']}, {row.ann['k']} chunks listed"
        tables.append(Table(title, ["metric", "index", "exact search", "index − exact"], cells))
        targets = ", ".join(f"{name} {value:.3f}" for name, value in row.ann["target_recall"].items())
        lines.append(f"{called(row)}: asked with the target's own vector, the index has the target at {targets}.")
    if not tables:
        return Section("index", "")
    sentence = "Results above are of exact search. This is what the index a user searches finds, and what it loses."
    return Section("index", "What the index loses", [sentence], tables, lines)


def _latency(report: Report) -> Section:
    tables = []
    for model, latency in report.latency.items():
        cells = [
            [stage, *(f"{value:.2f}" for value in (times.p50, times.p95, times.p99, times.mean))]
            for stage, times in latency.stages.items()
        ]
        total = frozenset(at for at, stage in enumerate(latency.stages) if stage == "total")
        tables.append(Table(f"{model}, milliseconds, batch 1", ["stage", "P50", "P95", "P99", "mean"], cells, total))
    sentence = "Stages are timed by themselves and the total around all of them, so they need not add up."
    return Section("latency", "Latency", [sentence] if tables else [], tables, latency_notes(report))


def _provenance(report: Report) -> Section:
    p, w, b = report.payload, report.windows, report.bootstrap
    cells = [
        ["payload", f"{p['name']}, id {p['id']}, {p['rows']:,} chunks of {p['dim']} dimensions"],
        ["encoder", p.get("encoder") or "not stated"],
        ["windows", f"id {w['id']}, split {w['split']}, {w['context']} context rows and the target"],
        ["evaluated", f"{w['evaluated']:,} of {w['total']:,} windows, {w['articles']:,} articles"],
        ["unanswerable", f"{w['unanswerable']:,} windows whose target repeats a context row"],
        ["headline", str(w.get("headline", "–"))],
        ["intervals", f"{100 * b['level']:g} %, {b['resamples']:,} resamples of {b['units']:,} {b['unit']}s"],
        ["seed", str(b["seed"])],
    ]
    cells += [[f"alignment: {name.replace('_', ' ')}", _number(value)] for name, value in report.alignment.items()]
    return Section("provenance", "Provenance", (), [Table("What was evaluated, and how", ["", ""], cells)])


def _models(rows: Sequence[Row]) -> frozenset[int]:
    return frozenset(at for at, row in enumerate(rows) if row.kind == "model")


def _at(curve: Mapping[str, Any] | None, ks: Sequence[int]) -> list[str]:
    by_k = dict(zip(curve["k"], curve["excluded"], strict=True)) if curve else {}
    return [f"{by_k[k]:.3f}" if k in by_k else "–" for k in ks]


def _binned(histogram: Mapping[str, Any] | None, bins: int) -> list[str]:
    assert histogram is not None
    counts = list(histogram["windows"])
    return [_count(n) for n in [*counts, *[0] * (bins - len(counts)), histogram["misses"]]]


def _bin_name(start: int) -> str:
    return "1" if start == 1 else f"{start:,}–{2 * start - 1:,}"


def _count(value: int) -> str:
    return f"{value:,}"


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else str(value)


def _share(value: float | None) -> str:
    return "an unknown share" if value is None else f"{100 * value:.1f} %"


def _interval(figure: Estimate, report: Report) -> str:
    if figure.low is None or figure.high is None:
        return short(figure)
    return f"{short(figure)} ({100 * report.bootstrap['level']:g} % interval {figure.low:.3f} to {figure.high:.3f})"


def _with_interval(figures: Mapping[str, Estimate], name: str) -> str:
    figure = figures.get(name)
    if figure is None or figure.low is None or figure.high is None:
        return of(figures, name)
    return f"{short(figure)} ({figure.low:.3f}–{figure.high:.3f})"
