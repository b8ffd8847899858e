"""The plots of a report page: small enough that their text is read on a phone, in colours that the page chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlvm.evaluation import chart
from fastlvm.evaluation.sections import best
from fastlvm.evaluation.svg import inline
from fastlvm.evaluation.wording import cut

if TYPE_CHECKING:
    from fastlvm.evaluation.report import Report, Row

COLOURS = {
    chart.INK: "var(--ink)",
    chart.MUTED: "var(--muted)",
    chart.FAINT: "var(--faint)",
    chart.BASELINE: "var(--baseline)",
    chart.OTHER: "var(--other)",
    **{colour: f"var(--model-{at})" for at, colour in enumerate(chart.MODELS)},
}
"""What the page has to define, by the colour that stands for it."""

_WIDTH = 3.8  # inches: at 360 CSS pixels 9 points are 12 pixels
_MARKERS = ("o", "s", "^", "D", "v", "P")
_STAGES = (("model", chart.MODELS[0]), ("search", chart.MODELS[1]), ("rerank", chart.MODELS[2]))
_MOST_ARTICLES = 500
_LONGEST = 40  # letters of a name in a legend


@dataclass(frozen=True)
class Plot:
    """key: the section it belongs to; svg: an element; more: one that is shown only when asked for."""

    key: str
    title: str
    caption: str
    svg: str
    more: bool = False


def plots(report: Report) -> list[Plot]:
    """Every plot the report has the figures for. Raises InputError where matplotlib is not installed."""
    with chart.drawing():
        return list(_plots(report))


def _plots(report: Report) -> Iterator[Plot]:
    models, count = _models(report)
    reference = _named(report, "whitened mixture") or best(report, "baseline")
    yield _intervals(report, {row.name: colour for row, colour in zip(models, chart.MODELS, strict=False)})
    curves = [*models, *_baselines(report, reference)]
    if any(row.curve for row in curves):
        yield _recall(curves, "" if len(models) == count else f" Drawn are the {len(models)} best of {count} models.")
    for at, model in enumerate(models):
        if model.histogram:
            yield _histogram(model, reference, at)
    for at, model in enumerate(models):
        if report.articles and model.per_article and reference and reference.per_article:
            yield _articles(report, model, reference, at)
    for at, model in enumerate(models):
        if model.impostors and model.impostors["truth"]:
            yield _impostors(model, at)
    if report.latency:
        yield _latency(report)


def _models(report: Report) -> tuple[list[Row], int]:
    """The models that are drawn, as many as can be told apart, the best first; and how many there are."""
    rows = [row for row in report.rows if row.kind == "model" and not row.keys]
    first = best(report, "model")
    rows.sort(key=lambda row: (row is not first, -(row.excluded["R@5"].value or 0.0)))
    return rows[: len(chart.MODELS)], len(rows)


def _baselines(report: Report, reference: Row | None) -> list[Row]:
    copy = _named(report, "copy-last")
    return [row for row in (reference, copy if copy is not reference else None) if row is not None]


def _named(report: Report, name: str) -> Row | None:
    return next((row for row in report.rows if row.name == name), None)


def _intervals(report: Report, colours: Mapping[str, str]) -> Plot:
    rows = chart.compared(report)
    figure, axis = _canvas(0.8 + 0.24 * len(rows))
    chart.intervals(axis, rows, "R@5", colours)
    chart.name_rows(axis, rows, longest=26)
    axis.invert_yaxis()
    axis.set_xlabel("R@5")
    said = ", ".join(f"{row.name} {_figure(row.excluded['R@5'].value)}" for row in rows)
    level = f"{100 * report.bootstrap['level']:g} %"
    return Plot(
        "rankers",
        "R@5 with intervals",
        f"Share of windows whose next chunk is among the first 5, with its {level} interval. Context rows excluded.",
        inline(figure, "intervals", f"Bars of R@5 with intervals: {said}.", COLOURS),
    )


def _recall(rows: Sequence[Row], drawn: str) -> Plot:
    figure, axis = _canvas(3.1 + 0.17 * len(rows))
    said, model = [], 0
    for row in rows:
        if not row.curve:
            continue
        style: dict[str, Any] = {"color": chart.BASELINE, "linestyle": "--" if row.name != "copy-last" else ":"}
        if row.kind == "model":
            style = {"color": chart.MODELS[model], "marker": _MARKERS[model], "markersize": 3.5}
            model += 1
        axis.plot(row.curve["k"], row.curve["excluded"], linewidth=1.5, label=_legend(row.name), zorder=3, **style)
        ends = [(k, row.curve["excluded"][row.curve["k"].index(k)]) for k in (5, 50) if k in row.curve["k"]]
        said.append(f"{row.name} " + " and ".join(f"{value:.3f} at k = {k}" for k, value in ends))
    axis.set_xscale("log")
    ticks = [k for k in (1, 5, 10, 50, 100, 1000) if k <= max(axis.get_xlim())]
    axis.set_xticks(ticks, [f"{k:,}" for k in ticks])
    axis.set_xticks([], minor=True)
    axis.set_ylim(0, None)
    axis.set_xlabel("k (log scale)")
    axis.set_ylabel("share of windows")
    chart.plain(axis, "both")
    _legend_below(figure, axis)
    return Plot(
        "ranks",
        "Recall curve",
        f"Share of windows whose next chunk is among the first k. Context rows excluded.{drawn}",
        inline(figure, "recall", f"Recall over k: {', '.join(said)}.", COLOURS),
    )


def _histogram(model: Row, reference: Row | None, at: int) -> Plot:
    rows = [row for row in (model, reference) if row is not None and row.histogram]
    bins = max(len(row.histogram["windows"]) for row in rows if row.histogram)
    misses = any(row.histogram["misses"] for row in rows if row.histogram)
    figure, axis = _canvas(3.0 + 0.17 * len(rows))
    width = 0.8 / len(rows)
    for place, row in enumerate(rows):
        assert row.histogram is not None
        windows = [*row.histogram["windows"], *[0] * (bins - len(row.histogram["windows"]))]
        counts = [*windows, row.histogram["misses"]] if misses else windows
        colour = chart.BASELINE if row is reference else chart.MODELS[at]
        left = np.arange(len(counts)) - 0.4 + width * (place + 0.5)
        axis.bar(left, counts, width, color=colour, label=_legend(row.name), zorder=2)
    ticks = list(range(0, bins, 2 if bins > 8 else 1))
    names = [_compact(2**tick) for tick in ticks]
    axis.set_xticks([*ticks, bins] if misses else ticks, [*names, "missed"] if misses else names)
    axis.set_xlabel("rank of the truth, by powers of two")
    axis.set_ylabel("windows")
    chart.plain(axis, "y")
    _legend_below(figure, axis)
    first, total = (sum(model.histogram["windows"][:part]) for part in (3, bins)) if model.histogram else (0, 0)
    against = "" if reference is None else f" against {reference.name}"
    label = f"Histogram of ranks of {model.name}{against}: {first} of {total} windows have a rank below 8."
    return Plot(
        "ranks",
        f"Ranks of the truth: {cut(model.name, _LONGEST)}",
        "Windows by the rank of the true next chunk; every bar spans twice the ranks of the one before it.",
        inline(figure, f"histogram-{at}", label, COLOURS),
        more=at > 0,
    )


def _impostors(model: Row, at: int) -> Plot:
    assert model.impostors is not None
    truth, other, same = (np.asarray(model.impostors[name]) for name in ("truth", "impostor", "same"))
    figure, axis = _canvas(4.1)
    low, high = float(min(truth.min(), other.min())), float(max(truth.max(), other.max()))
    room = 0.03 * (high - low or 1.0)
    ends = (low - room, high + room)
    axis.plot(ends, ends, color=chart.MUTED, linewidth=1, linestyle="--", label="as close as each other", zorder=2)
    for wanted, name, colour, marker in (
        (False, "impostor of another article", chart.MODELS[0], "o"),
        (True, "impostor of the same article", chart.MODELS[1], "^"),
    ):
        chosen = same.astype(bool) == wanted
        style = {"markersize": 4, "alpha": 0.55, "markeredgewidth": 0, "linestyle": "none"}
        axis.plot(truth[chosen], other[chosen], color=colour, marker=marker, label=name, zorder=3, **style)
    axis.set_xlim(*ends)
    axis.set_ylim(*ends)
    axis.set_aspect("equal")
    axis.locator_params(nbins=6)
    axis.set_xlabel("cosine to the truth")
    axis.set_ylabel("cosine to the best impostor")
    chart.plain(axis, "both")
    _legend_below(figure, axis)
    lost = int(np.count_nonzero(other > truth))
    return Plot(
        "impostors",
        f"Truth against best impostor: {cut(model.name, _LONGEST)}",
        f"{len(truth):,} windows, evenly chosen. Above the diagonal another chunk is closer to the prediction than the "
        "true next one.",
        inline(
            figure,
            f"impostors-{at}",
            f"Scatter for {model.name} of the cosine to the truth and to the best impostor: in {lost} of {len(truth)} "
            f"windows the impostor is closer, {int(np.count_nonzero(same & (other > truth)))} of them of the same "
            "article.",
            COLOURS,
        ),
        more=at > 0,
    )


def _articles(report: Report, model: Row, reference: Row, at: int) -> Plot:
    assert report.articles is not None
    x, y = np.asarray(reference.per_article), np.asarray(model.per_article)
    windows = np.asarray(report.articles["windows"])
    chosen = np.unique(np.linspace(0, len(x) - 1, min(_MOST_ARTICLES, len(x))).astype(int))
    figure, axis = _canvas(3.7)
    high = 1.08 * max(float(x.max()), float(y.max()), 0.05)
    axis.plot((0, high), (0, high), color=chart.MUTED, linewidth=1, linestyle="--", zorder=2)
    # Areas in steps, so that articles of about as many windows share one marker of the SVG.
    area = (12 + 108 * np.ceil(8 * windows[chosen] / windows.max()) / 8) * (0.3 if len(chosen) > 100 else 1.0)
    style = {"alpha": 0.55, "linewidths": 0, "zorder": 3, "clip_on": False}
    axis.scatter(x[chosen], y[chosen], s=area, color=chart.MODELS[at], **style)
    axis.set_xlim(0, high)
    axis.set_ylim(0, high)
    axis.set_aspect("equal")
    axis.locator_params(nbins=6)
    axis.set_xlabel(f"R@5 of {cut(reference.name, _LONGEST)}")
    axis.set_ylabel(f"R@5 of {cut(model.name, 26)}")
    chart.plain(axis, "both")
    better, worse = int(np.count_nonzero(y > x)), int(np.count_nonzero(y < x))
    shown = "" if len(chosen) == len(x) else f" {len(chosen):,} of {len(x):,} articles are drawn, evenly chosen."
    return Plot(
        "articles",
        f"R@5 by article: {cut(model.name, _LONGEST)}",
        f"A dot an article, its area grows with its windows (up to {int(windows.max()):,}). Above the diagonal the "
        f"model is better: {better:,} of {len(x):,} articles, worse in {worse:,}.{shown}",
        inline(
            figure,
            f"articles-{at}",
            f"Scatter of R@5 by article, {model.name} over {reference.name}: better in {better}, worse in {worse} of "
            f"{len(x)} articles.",
            COLOURS,
        ),
        more=at > 0,
    )


def _latency(report: Report) -> Plot:
    bars = [(name, percentile) for name in report.latency for percentile in ("p50", "p95")]
    figure, axis = _canvas(1.6 + 0.3 * len(bars))
    end, said = 0.0, []
    names = {stage for name in report.latency for stage in _split(report.latency[name].stages, "p50")}
    for place, (name, percentile) in enumerate(bars):
        stages = report.latency[name].stages
        left = 0.0
        for stage, width in _split(stages, percentile).items():
            axis.barh(place, width, 0.62, left, color=dict(_STAGES)[stage], zorder=2)
            left += width
        if "total" in stages:
            total = getattr(stages["total"], percentile)
            axis.plot([total, total], [place - 0.4, place + 0.4], color=chart.INK, linewidth=2, zorder=3)
            left = max(left, total)
            said.append(f"{name} {percentile.upper()} {total:.2f} ms")
            beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "color": chart.INK}
            axis.annotate(f"{total:.2f}", (left, place), **beside)
        end = max(end, left)
    axis.set_xlim(0, 1.18 * end or 1.0)
    axis.set_yticks(range(len(bars)), [f"{cut(name, 20)} {percentile.upper()}" for name, percentile in bars])
    for label in axis.get_yticklabels():
        label.set_color(chart.INK)
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds, batch 1")
    chart.plain(axis, "x")
    for stage, colour in _STAGES:
        if stage in names:
            axis.barh(0, 0, color=colour, label=stage)
    axis.plot([], [], color=chart.INK, linewidth=2, label="total")
    _legend_below(figure, axis, columns=2)
    return Plot(
        "latency",
        "Latency by stage",
        "Milliseconds of one context. The mark is the total, which is measured around all stages.",
        inline(figure, "latency", f"Bars of latency by stage; totals: {', '.join(said)}.", COLOURS),
    )


def _split(stages: Any, percentile: str) -> dict[str, float]:
    """Milliseconds of model, search and everything else but the total, which is reranking."""
    found: dict[str, float] = {}
    for name, times in stages.items():
        if name != "total":
            own = name if name in ("model", "search") else "rerank"
            found[own] = found.get(own, 0.0) + getattr(times, percentile)
    return {name: found[name] for name, _ in _STAGES if name in found}


def _canvas(height: float) -> tuple[Any, Any]:
    figure = chart.new_figure(_WIDTH, height, layout="constrained")
    return figure, figure.subplots()


def _legend(name: str) -> str:
    """A name for a legend, which hides those that begin with an underscore: a space of no width before it."""
    return f"\u200b{cut(name, _LONGEST)}"


def _legend_below(figure: Any, axis: Any, columns: int = 1) -> None:
    handles, labels = axis.get_legend_handles_labels()
    style = {"frameon": False, "handlelength": 2.2, "columnspacing": 1.2, "labelcolor": chart.INK}
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, **style)


def _compact(rank: int) -> str:
    return f"{rank // 1024}k" if rank >= 1024 else str(rank)


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
