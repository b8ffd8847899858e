"""Draws a run of the kernel benches: speed-ups over the reference, and the kernel beside the machine's own bound.

    python bench/plot.py [bench/results/FILE.json [docs/kernels.png]]

Without a file the newest of bench/results/ is drawn.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fastlvm.files import atomic_file, read_json
from table import RIVALS, Run, count

ROOT = Path(__file__).parents[1]
OURS, INK, FAINT, GREY = "#1f6f8b", "#22272b", "#e3e6e9", "#5b6268"
_COLORS = {"fastlvm": OURS, "torch.compile": "#c9843f", "transformers": "#8d99a6", "mambapy": "#c3cad1"}


def draw(data: dict[str, Any], path: Path) -> None:
    """Both panels as a PNG."""
    run = Run(data)
    cases = [case for case, about in run.cases.items() if about["op"] == "ssm_scan"]
    figure = blank(1.6 + 0.85 * len(cases))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _speed(left, run, cases)
    _bound(right, run, cases)
    left.set_yticks(range(len(cases)), [run.cases[case]["title"].replace(") ", ")\n") for case in cases])
    left.invert_yaxis()
    for axis in (left, right):
        style(axis)
    save(figure, data, path, "float32. ")


def blank(height: float) -> Any:
    """An empty figure of the width of all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, data: dict[str, Any], path: Path, note: str = "") -> None:
    """Write the figure as a PNG, with the machine and the date below it."""
    figure.text(0.01, 0.012, f"{note}{data['machine']}, {data['isa']}, {data['date']}.", fontsize=8, color=GREY)
    figure.tight_layout(rect=(0, 0.03, 1, 1), w_pad=2.0)
    with atomic_file(path) as temporary:
        figure.canvas.print_figure(temporary, format="png")


def _speed(axis: Any, run: Run, cases: list[str]) -> None:
    """How many times as fast as the reference, on the most threads."""
    names = ("fastlvm", *(name for name in RIVALS if name != "reference"))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        for place, case in enumerate(cases):
            y = place + (i - (len(names) - 1) / 2) * height
            speed = run.times(case, "reference", name)
            if speed is None:
                axis.text(1.04, y, "not run", va="center", fontsize=7, color=GREY)
                continue
            axis.barh(y, speed - 1, left=1, height=0.9 * height, color=_COLORS[name], zorder=2)
            axis.text(max(speed, 1) * 1.04, y, f"{speed:.3g} ×", va="center", fontsize=7.5, color=INK, zorder=4)
        axis.barh([0], [0], color=_COLORS[name], label=name)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(low, high * 1.6)
    axis.axvline(1, color=INK, linewidth=1, zorder=3)
    axis.legend(loc="lower right", fontsize=8, frameon=True, edgecolor=FAINT)
    axis.set_title(f"Times as fast as the PyTorch reference, {count(run.threads[-1])}", **TITLE)


def _bound(axis: Any, run: Run, cases: list[str]) -> None:
    """The kernel's time over the bound's, for every number of threads."""
    height = 0.7 / len(run.threads)
    reach = 1.0
    for i, threads in enumerate(run.threads):
        shade = {"color": OURS, "alpha": 0.55 + 0.45 * i / max(1, len(run.threads) - 1)}
        for place, case in enumerate(cases):
            over = run.over_bound(case, threads)
            if over is not None:
                y = place + (i - (len(run.threads) - 1) / 2) * height
                axis.barh(y, over, height=0.9 * height, zorder=2, **shade)
                axis.text(over + 0.03, y, f"{over:.2f}", va="center", fontsize=7.5, color=INK, zorder=4)
                reach = max(reach, over)
        axis.barh([0], [0], label=count(threads), **shade)
    axis.axvline(1, color=INK, linewidth=1, zorder=3)
    axis.set_xlim(0, 1.2 * reach)
    axis.legend(loc="upper right", fontsize=8, frameon=True, edgecolor=FAINT)
    axis.set_title("Kernel ÷ the machine's own bound (1: none faster)", **TITLE)


TITLE = {"loc": "left", "fontsize": 9.5, "color": INK}


def style(axis: Any) -> None:
    axis.grid(axis="x", color=FAINT, linewidth=0.8, zorder=0)
    axis.tick_params(axis="both", which="both", length=0, labelsize=8.5, colors=GREY)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
    axis.spines["left"].set_color(INK)


def main(arguments: list[str]) -> None:
    data = newest("kernels", arguments)
    draw(data, Path(arguments[1]) if len(arguments) > 1 else ROOT / "docs/kernels.png")


def newest(kind: str, arguments: list[str]) -> dict[str, Any]:
    """The run named on the command line, or the newest one of bench/results/."""
    found = [Path(arguments[0])] if arguments else sorted((ROOT / "bench/results").glob(f"{kind}-*.json"))
    if not found:
        sys.exit(f"bench/results holds no {kind}-*.json: run make bench, or name a file")
    return max((read_json(path) for path in found), key=lambda data: data["date"])


if __name__ == "__main__":
    main(sys.argv[1:])
