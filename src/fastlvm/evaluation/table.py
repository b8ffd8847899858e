"""A report as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastlvm.evaluation.metrics import Estimate

if TYPE_CHECKING:
    from fastlvm.evaluation.report import Report

_COLUMNS = ("R@1", "R@5  (95 %)", "R@10", "MRR@10", "Contain@50  (95 %)", "Eff@5", "median", "cosine", "R@5 incl.")


def render(report: Report) -> Group:
    """Title, the rankers, the paired differences of the models, latencies, and what the figures rest on."""
    parts: list[Table | Text] = [Text(report.title(), style="bold"), _rankers(report)]
    if report.differences:
        parts.append(_differences(report))
    if report.latency:
        parts.append(_latencies(report))
    parts.append(Text(_footnote(report), style="dim"))
    return Group(*parts)


def _rankers(report: Report) -> Table:
    table = _table()
    table.add_column("ranker", overflow="fold")
    table.add_column("space", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    whitened = next((row.space for row in report.rows if row.kind == "baseline" and row.space != "raw"), None)
    for row in report.rows:
        figures = row.excluded
        table.add_row(
            row.name,
            "raw" if row.space == "raw" else "whitened" if row.space == whitened else "own",
            _short(figures["R@1"]),
            _with_interval(figures["R@5"]),
            _short(figures["R@10"]),
            _short(figures["MRR@10"]),
            _with_interval(figures["Contain@50"]),
            _short(figures["Eff@5"]),
            _rank(figures["median_rank"]),
            _short(figures["cosine"]),
            _short(row.included["R@5"]),
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
            f"{difference.model} − {difference.baseline}",
            *(_signed(difference.metrics[name]) for name in ("R@5", "Contain@50", "MRR@10")),
            " " + verdict(five),
        )
    return table


def verdict(difference: Estimate) -> str:
    """better or worse where the interval leaves out zero, else "no"."""
    if difference.low is None or difference.high is None:
        return "unknown"
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "no"


def _latencies(report: Report) -> Table:
    table = _table()
    table.add_column("latency, batch 1 (ms)", no_wrap=True)
    for name in ("P50", "P95", "P99", "mean"):
        table.add_column(name, justify="right")
    for model, latency in report.latency.items():
        for stage, times in latency.stages.items():
            figures = (f"{value:.2f}" for value in (times.p50, times.p95, times.p99, times.mean))
            table.add_row(f"{model}: {stage}", *figures)
    return table


def _footnote(report: Report) -> str:
    w, b = report.windows, report.bootstrap
    lines = [
        f"The {w['context']} context rows are excluded from the results (R@5 incl.: they are not). Intervals: "
        f"{b['resamples']:,} resamples of {b['units']:,} {b['unit']}s. Cosines of different spaces do not compare."
    ]
    if w["unanswerable"]:
        lines.append(f"In {w['unanswerable']:,} windows the target repeats a context row: counted as misses.")
    overlap = report.alignment.get("article_overlap")
    if overlap:
        lines.append(
            f"{overlap:,} articles are in more than one split: these figures are not those of unseen articles."
        )
    random = report.alignment.get("random_pair_cosine")
    if random is not None:
        lines.append(f"Cosine of random pairs of chunks: {random:.3f}.")
    lines += [f"{row.name}: {row.note}." for row in report.rows if row.note]
    for model, latency in report.latency.items():
        threads = "default" if latency.threads is None else latency.threads
        lines.append(f"Latency of {model}: {latency.repeats:,} repeats, threads {threads}, {latency.machine}.")
    lines.append(f"payload {report.payload['id']}, windows {w['id']}")
    return "\n".join(lines)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)


def _short(figure: Estimate) -> str:
    return "–" if figure.value is None else f"{figure.value:.3f}"


def _bare(value: float) -> str:
    """.123 for 0.123: the interval beside a figure, kept short."""
    return f"{value:.3f}".replace("0.", ".", 1)


def _with_interval(figure: Estimate) -> str:
    if figure.low is None or figure.high is None:
        return _short(figure)
    return f"{_short(figure)} {_bare(figure.low)}–{_bare(figure.high)}"


def _signed(figure: Estimate) -> str:
    if figure.value is None:
        return "–"
    if figure.low is None or figure.high is None:
        return f"{figure.value:+.3f}"
    return f"{figure.value:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]"


def _rank(figure: Estimate) -> str:
    return "–" if figure.value is None else f"{figure.value:,.0f}"
