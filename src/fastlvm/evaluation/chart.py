"""A report as a chart, and what all drawings share. matplotlib is loaded only here: in memory, no display is needed."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastlvm.errors import InputError
from fastlvm.evaluation.wording import cut
from fastlvm.files import atomic_file

if TYPE_CHECKING:
    from fastlvm.evaluation.report import Report, Row

INK, MUTED, FAINT = "#22272b", "#5b6268", "#e3e6e9"
BASELINE, OTHER = "#8a9299", "#b8bfc6"
MODELS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#b07c00", "#5e4fa2")
"""Told apart by colour-blind readers too (after Okabe and Ito), and by what is drawn with them: see `plots`."""

_PANELS = (("R@5", "R@5: next chunk among the first 5"), ("Contain@50", "Contain@50: among the first 50"))
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastlvm",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.prop_cycle": f"cycler('color', ['{INK}'])",  # of what is given no colour
    "text.parse_math": False,  # names of models are no formulas
}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """matplotlib's settings while a report is drawn, whatever the user's are. InputError where it is not installed."""
    try:
        import matplotlib.style
    except ImportError as error:
        raise InputError("drawing needs matplotlib, which is not installed: pip install fastlvm[plot]") from error
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a title in a script the measuring font lacks
        yield


def new_figure(width: float, height: float, **options: Any) -> Any:
    """A matplotlib Figure of inches width × height that belongs to no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), **options)


def draw(report: Report, path: str | os.PathLike[str]) -> None:
    """R@5 and Contain@50 of the rankers `compared` with error bars, the models in colour, as a PNG."""
    with drawing():
        figure = _chart(report)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png")


def compared(report: Report) -> list[Row]:
    """What compares: neither oracles nor what looks at keys."""
    return [row for row in report.rows if not row.keys and row.kind != "oracle"]


def _chart(report: Report) -> Any:
    rows = compared(report)
    figure = new_figure(10, 1.5 + 0.34 * len(rows), dpi=150, facecolor="white")
    axes = figure.subplots(1, len(_PANELS), sharey=True)
    for axis, (metric, title) in zip(axes, _PANELS, strict=True):
        intervals(axis, rows, metric)
        axis.set_title(title, loc="left", fontsize=9.5, color=INK)
    name_rows(axes[0], rows)
    axes[0].invert_yaxis()
    figure.suptitle(report.title(), x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    level = f"{100 * report.bootstrap['level']:g} %"
    figure.text(
        0.01,
        0.012,
        f"Context rows excluded. Bars: {level} intervals, resampling {report.bootstrap['unit']}s. "
        f"Encoder: {report.payload['encoder'] or 'not stated'}.",
        fontsize=8,
        color=MUTED,
    )
    figure.tight_layout(rect=(0, 0.03, 1, 0.98), w_pad=2.0)
    return figure


def intervals(axis: Any, rows: Sequence[Row], metric: str, colours: Mapping[str, str] | None = None) -> None:
    """A bar with its interval for every row, from the first at 0 on; models in colour, by name where they have one."""
    figures = [row.excluded[metric] for row in rows]
    values = [figure.value or 0.0 for figure in figures]
    lows = [v if f.low is None else f.low for v, f in zip(values, figures, strict=True)]
    highs = [v if f.high is None else f.high for v, f in zip(values, figures, strict=True)]
    errors = [
        [max(0.0, v - low) for v, low in zip(values, lows, strict=True)],
        [max(0.0, high - v) for v, high in zip(values, highs, strict=True)],
    ]
    colors = [(colours or {}).get(row.name, MODELS[0]) if row.kind == "model" else OTHER for row in rows]
    axis.barh(range(len(rows)), values, color=colors, height=0.68, zorder=2)
    style = {"elinewidth": 1.2, "capsize": 2.5, "capthick": 1.2}
    axis.errorbar(values, range(len(rows)), xerr=errors, fmt="none", ecolor=INK, zorder=3, **style)
    reach = max([*highs, 0.01])
    for place, (value, high) in enumerate(zip(values, highs, strict=True)):
        axis.text(high + 0.02 * reach, place, f"{value:.3f}", va="center", fontsize=8.5, color=INK, zorder=4)
    axis.set_xlim(0, 1.16 * reach)
    axis.tick_params(axis="both", labelsize=9)
    plain(axis, "x")


def name_rows(axis: Any, rows: Sequence[Row], longest: int = 48) -> None:
    """The rows' names at `intervals`, the models in bold, cut where they are longer than `longest`."""
    axis.set_yticks(range(len(rows)), [cut(row.name, longest) for row in rows])
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_color(INK)
        label.set_fontweight("bold" if row.kind == "model" else "normal")


def plain(axis: Any, grid: str) -> None:
    """Faint grid lines of one direction ("x", "y" or "both"), no box."""
    axis.grid(axis=grid, color=FAINT, linewidth=0.8, zorder=0)
    axis.set_axisbelow(True)
    axis.tick_params(axis="both", which="both", length=0)
    for side in ("top", "right", "left" if grid == "y" else "bottom"):
        axis.spines[side].set_visible(False)
