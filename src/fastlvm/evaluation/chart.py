"""A report as a chart. matplotlib is loaded only here, and draws to memory: no display is needed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fastlvm.errors import InputError
from fastlvm.files import atomic_file

if TYPE_CHECKING:
    from fastlvm.evaluation.report import Report, Row

_MODEL, _BASELINE, _INK, _FAINT = "#1f6f8b", "#b8bfc6", "#22272b", "#e3e6e9"
_PANELS = (("R@5", "R@5: next chunk among the first 5"), ("Contain@50", "Contain@50: among the first 50"))


def draw(report: Report, path: str | os.PathLike[str]) -> None:
    """R@5 and Contain@50 of every ranker with error bars, the models in colour, as a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("drawing needs matplotlib, which is not installed: pip install fastlvm[plot]") from error

    rows = list(report.rows)
    figure = Figure(figsize=(10, 1.5 + 0.34 * len(rows)), dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(_PANELS), sharey=True)
    for axis, (metric, title) in zip(axes, _PANELS, strict=True):
        _panel(axis, rows, metric, title)
    axes[0].set_yticks(range(len(rows)), [row.name for row in rows])
    for label, row in zip(axes[0].get_yticklabels(), rows, strict=True):
        label.set_color(_INK)
        label.set_fontweight("bold" if row.kind == "model" else "normal")
    axes[0].invert_yaxis()
    figure.suptitle(report.title(), x=0.01, ha="left", fontsize=11, fontweight="bold", color=_INK)
    level = f"{100 * report.bootstrap['level']:g} %"
    figure.text(
        0.01,
        0.012,
        f"Context rows excluded. Bars: {level} intervals, resampling {report.bootstrap['unit']}s. "
        f"Encoder: {report.payload['encoder'] or 'not stated'}.",
        fontsize=8,
        color="#5b6268",
    )
    figure.tight_layout(rect=(0, 0.03, 1, 0.98), w_pad=2.0)
    with atomic_file(path) as temporary:
        canvas.print_figure(temporary, format="png")


def _panel(axis: Any, rows: list[Row], metric: str, title: str) -> None:
    figures = [row.excluded[metric] for row in rows]
    values = [figure.value or 0.0 for figure in figures]
    lows = [v if f.low is None else f.low for v, f in zip(values, figures, strict=True)]
    highs = [v if f.high is None else f.high for v, f in zip(values, figures, strict=True)]
    errors = [
        [max(0.0, v - low) for v, low in zip(values, lows, strict=True)],
        [max(0.0, high - v) for v, high in zip(values, highs, strict=True)],
    ]
    colors = [_MODEL if row.kind == "model" else _BASELINE for row in rows]
    axis.barh(range(len(rows)), values, color=colors, height=0.68, zorder=2)
    style = {"elinewidth": 1.2, "capsize": 2.5, "capthick": 1.2}
    axis.errorbar(values, range(len(rows)), xerr=errors, fmt="none", ecolor=_INK, zorder=3, **style)
    reach = max([*highs, 0.01])
    for place, (value, high) in enumerate(zip(values, highs, strict=True)):
        axis.text(high + 0.02 * reach, place, f"{value:.3f}", va="center", fontsize=8.5, color=_INK, zorder=4)
    axis.set_xlim(0, 1.16 * reach)
    axis.set_title(title, loc="left", fontsize=9.5, color=_INK)
    axis.grid(axis="x", color=_FAINT, linewidth=0.8, zorder=0)
    axis.tick_params(axis="both", length=0, labelsize=9, colors="#5b6268")
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
    axis.spines["left"].set_color(_INK)
