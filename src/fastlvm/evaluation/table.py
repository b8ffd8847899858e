"""A report as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastlvm.evaluation.bootstrap import Estimate
from fastlvm.evaluation.wording import basis, called, line, notes, of, rank, short, signed, space_words, verdict

if TYPE_CHECKING:
    from fastlvm.evaluation.compare import Place
    from fastlvm.evaluation.report import Report

_COLUMNS = ("R@1", "R@5  (95 %)", "R@10", "MRR@10", "Contain@50  (95 %)", "Eff@5", "median", "cosine", "R@5 incl.")
_MORE = ("MRR", "Contain@20", "macro R@5  (95 %)", "R@1", "R@5", "R@10")


def render(report: Report) -> Group:
    """Title, what is wrong, the rankers, what differs from what, the index, latencies, and what the figures rest on."""
    parts: list[Table | Text] = [Text(line(report.title()), style="bold")]
    parts += [Text(line(f"{f['level']}: {f['sentence']}"), style="bold red") for f in report.findings]
    parts += [_rankers(report, "vectors alone", keys=False), _more(report)]
    if any(row.keys for row in report.rows):
        parts.append(_rankers(report, "with keys (next by key is the ceiling)", keys=True))
    if report.differences:
        parts.append(_differences(report))
    if any(row.ann for row in report.rows):
        parts.append(_indexes(report))
    if report.latency:
        parts.append(_latencies(report))
    parts.append(Text("\n".join(map(line, notes(report))), style="dim"))
    return Group(*parts)


def leaderboard(report: Report, places: Sequence[Place]) -> Group:
    """Rankers of several reports, the best first; `report` is one of these."""
    table = _table()
    table.add_column("", justify="right")
    table.add_column("ranker", overflow="fold")
    for name in ("R@1", "R@5  (95 %)", "R@10", "MRR@10", "Contain@50", "median", "R@5 less the first model's"):
        table.add_column(name, justify="right", no_wrap=True)
    number = 0
    for place in places:
        figures, model = place.row.excluded, place.row.kind == "model"
        number += model
        table.add_row(
            f"{number}" if model else "",
            _plain(place.name + (", uses keys" if place.row.keys else "")),
            short(figures["R@1"]),
            _with_interval(figures["R@5"]),
            short(figures["R@10"]),
            short(figures["MRR@10"]),
            short(figures["Contain@50"]),
            rank(figures["median_rank"]),
            "–" if place.behind is None else signed(place.behind["R@5"]),
            style="bold" if model else "",
        )
    return Group(Text(line(report.title()), style="bold"), table, Text("\n".join(basis(report)), style="dim"))


def _rankers(report: Report, title: str, *, keys: bool) -> Table:
    table = _table()
    table.add_column(title, overflow="fold")
    table.add_column("space", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    spaces = space_words(report)
    for row in report.rows:
        if row.keys != keys:
            continue
        figures = row.excluded
        table.add_row(
            _plain(called(row)),
            spaces[row.space],
            short(figures["R@1"]),
            _with_interval(figures["R@5"]),
            short(figures["R@10"]),
            short(figures["MRR@10"]),
            _with_interval(figures["Contain@50"]),
            short(figures["Eff@5"]),
            rank(figures["median_rank"]),
            short(figures["cosine"]),
            of(row.included, "R@5"),
            style="bold" if row.kind == "model" else "",
        )
    return table


def _more(report: Report) -> Table:
    """The rest of the metrics of those that see vectors alone."""
    table = _table()
    table.add_column("vectors alone", overflow="fold")
    for name in _MORE[:3]:
        table.add_column(name, justify="right", no_wrap=True)
    for name in _MORE[3:]:
        table.add_column(f"{name} within article", justify="right")
    for row in report.rows:
        if not row.keys:
            macro = row.macro or {}
            table.add_row(
                _plain(called(row)),
                of(row.excluded, "MRR"),
                of(row.excluded, "Contain@20"),
                _with_interval(macro["R@5"]) if "R@5" in macro else "–",
                *(of(row.within_article, name) for name in _MORE[3:]),
                style="bold" if row.kind == "model" else "",
            )
    return table


def _differences(report: Report) -> Table:
    table = _table()
    table.add_column("paired difference", overflow="fold")
    for name in ("R@5", "Contain@50", "MRR@10"):
        table.add_column(f"{name}  (95 %)", justify="right", no_wrap=True, min_width=23)
    table.add_column(" R@5 beyond chance", no_wrap=True)
    for difference in report.differences:
        five = difference.metrics["R@5"]
        table.add_row(
            _plain(f"{difference.model} − {difference.baseline}"),
            *(signed(difference.metrics[name]) for name in ("R@5", "Contain@50", "MRR@10")),
            " " + verdict(five),
        )
    return table


def _indexes(report: Report) -> Table:
    """What the index finds, beside exact search."""
    table = _table()
    table.add_column("what the index loses", overflow="fold")
    for name in ("found", "exact", "loss  (95 %)"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        if row.ann is None:
            continue
        for metric, found in row.ann["metrics"].items():
            loss = row.ann["loss"][metric]
            name = _plain(f"{row.name}, {row.ann['index']}: {metric}")
            table.add_row(name, short(found), short(row.excluded[metric]), signed(loss))
        targets = ", ".join(f"{name} {value:.3f}" for name, value in row.ann["target_recall"].items())
        table.add_row(_plain(f"{row.name}: target as query, {targets}"))
    return table


def _latencies(report: Report) -> Table:
    table = _table()
    table.add_column("latency, batch 1 (ms)", no_wrap=True)
    for name in ("P50", "P95", "P99", "mean"):
        table.add_column(name, justify="right")
    for model, latency in report.latency.items():
        for stage, times in latency.stages.items():
            figures = (f"{value:.2f}" for value in (times.p50, times.p95, times.p99, times.mean))
            table.add_row(_plain(f"{model}: {stage}"), *figures)
    return table


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)


def _plain(name: str) -> str:
    """A name that rich prints as it is."""
    return escape(line(name))


def _bare(value: float) -> str:
    """.123 for 0.123: the interval beside a figure, kept short."""
    return f"{value:.3f}".replace("0.", ".", 1)


def _with_interval(figure: Estimate) -> str:
    if figure.low is None or figure.high is None:
        return short(figure)
    return f"{short(figure)} {_bare(figure.low)}–{_bare(figure.high)}"
