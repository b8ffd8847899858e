"""The tables of a run of the forward bench, as Markdown.

python bench/forward_table.py bench/results/FILE.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from forward_cases import BATCHES, PRECISIONS, TARGETS, Target, name_of
from forward_results import COMPUTE, stream_of
from forward_rivals import RIVALS
from table import count, figure, ratio, section

NAMES = (*map(name_of, PRECISIONS), *(rival.name for rival in RIVALS))
MANY = 16  # windows, from which on one of them has to cost less


class ForwardRun:
    """The data of forward_results.py, with its figures by name and threads."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.threads: list[int] = data["threads"]
        self.rounds, self.calls, self.hogged = (
            {(row["name"], row["threads"]): row for row in data[part]} for part in ("paired", "calls", "hogged")
        )
        self.batches = {(row["name"], row["n"]): row for row in data["batches"]}

    def ms(self, name: str, threads: int) -> float | None:
        """Median of the paired rounds."""
        row = self.rounds.get((name, threads))
        return row["median_ms"] if row else None

    def percentile(self, name: str, threads: int, which: str) -> float | None:
        """Of the consecutive calls: "p50_ms", "p95_ms" or "p99_ms"."""
        row = self.calls.get((name, threads))
        return row[which] if row else None

    def fastest(self, precision: str, threads: int) -> tuple[str, float] | None:
        """The fastest rival and its milliseconds; for fp32 among those of fp32 alone."""
        names = [rival.name for rival in RIVALS if precision != "fp32" or rival.name.endswith(" fp32")]
        found = [(ms, name) for name in names if (ms := self.ms(name, threads)) is not None]
        return (min(found)[1], min(found)[0]) if found else None

    def bound(self, precision: str, threads: int) -> float | None:
        """Milliseconds of the weights' bytes and of the arithmetic, one after the other."""
        stream, compute = self.ms(stream_of(precision), threads), self.ms(COMPUTE, threads)
        return None if stream is None or compute is None else stream + compute

    def bandwidth(self, precision: str, threads: int) -> float | None:
        """Bytes a second."""
        return ratio(self.data["bytes"].get(precision), _seconds(self.ms(stream_of(precision), threads)))

    def window(self, precision: str, n: int) -> float | None:
        row = self.batches.get((name_of(precision), n))
        return row["ms_per_window"] if row else None


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else 1e-3 * ms


# --- targets


def verdict(run: ForwardRun, target: Target) -> tuple[str, str]:
    """What was measured, and "met", "missed" or "not measured"."""
    found, digits, about = _JUDGES[target.kind](run, target)
    if found is None:
        return "", "not measured"

    def met(value: float) -> bool:
        return value >= target.limit if target.kind == "rivals" else value <= target.limit

    while met(round(found, digits)) != met(found):  # no "1.25" that misses 1.25
        digits += 1
    return f"{found:.{digits}f}{about}", "met" if met(found) else "missed"


# The figure, the digits after its point, and what is printed after it.
_Judged = tuple[float | None, int, str]


def _ms(run: ForwardRun, target: Target) -> _Judged:
    return run.percentile(name_of(target.precision), target.threads, "p50_ms"), 3, " ms"


def _rivals(run: ForwardRun, target: Target) -> _Judged:
    ours, fastest = run.ms(name_of(target.precision), target.threads), run.fastest(target.precision, target.threads)
    if ours is None or fastest is None:
        return None, 2, ""
    return fastest[1] / ours, 2, f" × ({fastest[0]}, {figure(fastest[1])} ms)"


def _spread(run: ForwardRun, target: Target) -> _Judged:
    p50, p95 = (run.percentile(name_of(target.precision), target.threads, which) for which in ("p50_ms", "p95_ms"))
    return ratio(p95, p50), 2, ""


def _bound(run: ForwardRun, target: Target) -> _Judged:
    ours = run.ms(name_of(target.precision), target.threads)
    return ratio(ours, run.bound(target.precision, target.threads)), 2, ""


def _hog(run: ForwardRun, target: Target) -> _Judged:
    row = run.hogged.get((name_of(target.precision), target.threads))
    return row["busy"]["p50_ms"] / row["quiet"]["p50_ms"] if row else None, 2, ""


def _batch(run: ForwardRun, target: Target) -> _Judged:
    """The worst of the batches."""
    if target.threads != run.threads[-1]:
        return None, 3, ""
    alone = run.window(target.precision, 1)
    found = [(many / alone, n) for n in BATCHES if n >= MANY and alone and (many := run.window(target.precision, n))]
    return (max(found)[0], 3, f" (of {max(found)[1]} windows)") if found else (None, 3, "")


_JUDGES: dict[str, Callable[[ForwardRun, Target], _Judged]] = {
    "ms": _ms,
    "rivals": _rivals,
    "spread": _spread,
    "bound": _bound,
    "hog": _hog,
    "batch": _batch,
}


# --- tables


def markdown(data: dict[str, Any]) -> str:
    run = ForwardRun(data)
    load = "" if data["load"] is None else f" Load average before the run: {data['load']:.2f}."
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    model = data["model"]
    sizes = f"{model['name']} of {model['parameters'] / 1e6:.1f} M weights, one context of {model['context']} × "
    heads = [f"{count(n)}{what}" for n in run.threads for what in (", ms", ", first", ", calls")]
    parts = [
        f"{data['machine']}; {data['isa']}; {data['date']}. {versions}.{load}",
        f"{sizes}{model['dim']} a call." if model["parameters"] else "",  # 0 when it was not run
        section("Targets", ("precision", "threads", "target", "measured", ""), _targets(run)),
        section("Medians of paired rounds", ("", *heads, "cosine: least", "mean"), _rounds(run)),
        _turn(run),
        section("Not timed", ("", "why"), data["reasons"].items()),
        section("Timed otherwise than said below", ("", "how"), data["notes"].items()),
        section(
            "Consecutive calls, milliseconds",
            ("", "threads", "calls", "median", "P95", "P99", "P95 ÷ median"),
            _calls(run),
        ),
        section(
            "The machine's own bound: the packed weights read once, then the arithmetic",
            ("", "threads", "MB", "GB/s", "stream, ms", "compute, ms", "time, ms", "time ÷ bound"),
            _bounds(run),
        ),
        section(
            "With a busy process on every core, milliseconds",
            ("", "threads", "calls", "quiet median", "busy median", "busy P95", "busy ÷ quiet"),
            _hogged(run),
        ),
        section(
            f"Milliseconds a window by windows a call, {count(run.threads[-1])}",
            ("", *map(str, BATCHES)),
            _batches(run),
        ),
        section(
            "The seeds' other models, random weights, milliseconds",
            ("", "precision", "threads", "MB", "calls", "median", "P95"),
            _others(run),
        ),
        "### What is timed\n\n" + "\n".join(f"- {name}: {what}" for name, what in data["timed"].items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _targets(run: ForwardRun) -> Iterable[Sequence[str]]:
    for target in TARGETS:
        yield target.precision, str(target.threads), target.text, *verdict(run, target)


def _rounds(run: ForwardRun) -> Iterable[Sequence[str]]:
    for name in NAMES:
        found = [run.rounds.get((name, n)) for n in run.threads]
        if any(found):
            cells = [cell for row in found for cell in _three(row)]
            near = run.data["cosines"].get(name)
            yield name, *cells, *((f"{cosine:.7f}" for cosine in near) if near else ("–", "–"))


def _turn(run: ForwardRun) -> str:
    """How a round goes; older runs do not say."""
    calls = run.data.get("round")
    if not run.rounds or not calls:
        return ""
    return (
        f"In a round everybody in turn makes {calls['warm']} calls and then {calls['timed']} that are timed, or only "
        "these where one takes 50 ms. first: milliseconds of a round's first call, before which the others have filled "
        "the caches."
    )


def _three(row: dict[str, Any] | None) -> tuple[str, str, str]:
    if row is None:
        return "–", "–", "–"
    first = row.get("first_ms")
    return figure(row["median_ms"]), "–" if first is None else figure(first), str(row["rounds"])


def _calls(run: ForwardRun) -> Iterable[Sequence[str]]:
    for (name, threads), row in run.calls.items():
        times = [figure(row[which]) for which in ("p50_ms", "p95_ms", "p99_ms")]
        yield name, str(threads), str(row["calls"]), *times, f"{row['p95_ms'] / row['p50_ms']:.2f}"


def _bounds(run: ForwardRun) -> Iterable[Sequence[str]]:
    for precision in PRECISIONS:
        for threads in run.threads:
            ours, bound = run.ms(name_of(precision), threads), run.bound(precision, threads)
            rate = run.bandwidth(precision, threads)
            if ours is not None and bound is not None and rate is not None:
                loops = (run.ms(stream_of(precision), threads), run.ms(COMPUTE, threads), ours)
                work = (f"{run.data['bytes'][precision] / 1e6:.1f}", f"{rate / 1e9:.1f}")
                shown = (figure(ms) for ms in loops if ms is not None)
                yield name_of(precision), str(threads), *work, *shown, f"{ours / bound:.2f}"


def _hogged(run: ForwardRun) -> Iterable[Sequence[str]]:
    for (name, threads), row in run.hogged.items():
        quiet, busy = row["quiet"], row["busy"]
        times = (figure(quiet["p50_ms"]), figure(busy["p50_ms"]), figure(busy["p95_ms"]))
        yield name, str(threads), str(busy["calls"]), *times, f"{busy['p50_ms'] / quiet['p50_ms']:.2f}"


def _batches(run: ForwardRun) -> Iterable[Sequence[str]]:
    for precision in PRECISIONS:
        found = [run.window(precision, n) for n in BATCHES]
        if any(found):
            yield name_of(precision), *("–" if ms is None else figure(ms) for ms in found)


def _others(run: ForwardRun) -> Iterable[Sequence[str]]:
    for row in run.data["others"]:
        name = (row["name"], row["precision"], str(row["threads"]), f"{row['bytes'] / 1e6:.1f}", str(row["calls"]))
        yield *name, figure(row["p50_ms"]), figure(row["p95_ms"])


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
