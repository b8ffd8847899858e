"""Draws a run of the forward bench: the median of ours and of every rival on one and two threads.

    python bench/plot_forward.py [bench/results/FILE.json [docs/forward.png]]

Without a file the newest of bench/results/ is drawn.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import plot
from forward_cases import OURS
from forward_table import NAMES, ForwardRun
from table import count, figure

_RIVAL = "#b4bdc6"


def draw(data: dict[str, Any], path: Path) -> None:
    """A panel for each number of threads, the most first."""
    run = ForwardRun(data)
    threads = run.threads[::-1]
    names = sorted(
        (name for name in NAMES if any(run.ms(name, n) for n in threads)),
        key=lambda name: run.ms(name, threads[0]) or float("inf"),
    )
    drawn = plot.blank(1.5 + 0.36 * len(names))
    panels = drawn.subplots(1, len(threads), sharey=True, sharex=True, squeeze=False)[0]
    for axis, n in zip(panels, threads, strict=True):
        _bars(axis, run, names, n)
        plot.style(axis)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    for label in panels[0].get_yticklabels():
        label.set_color(plot.INK if label.get_text().startswith(OURS) else plot.GREY)
    model = data["model"]
    plot.save(
        drawn, data, path, f"Mamba-S, {model['parameters'] / 1e6:.0f} M weights, a context of {model['context']}. "
    )


def _bars(axis: Any, run: ForwardRun, names: list[str], threads: int) -> None:
    for place, name in enumerate(names):
        ms = run.ms(name, threads)
        if ms is not None:
            axis.barh(place, ms, height=0.72, color=plot.OURS if name.startswith(OURS) else _RIVAL, zorder=2)
            axis.annotate(
                f"{figure(ms)} ms",
                (ms, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=plot.INK,
                zorder=4,
            )
    axis.set_xlim(0, 1.2 * max(row["median_ms"] for row in run.rounds.values()))  # alike in all panels
    axis.spines["left"].set_color(plot.FAINT)
    axis.set_title(f"Milliseconds a prediction, {count(threads)}", **plot.TITLE)


def main(arguments: list[str]) -> None:
    draw(
        plot.newest("forward", arguments), Path(arguments[1]) if len(arguments) > 1 else plot.ROOT / "docs/forward.png"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
