"""How figures, rankers and what they rest on are put in words, the same in every form of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastlvm.evaluation.bootstrap import Estimate

if TYPE_CHECKING:
    from fastlvm.evaluation.report import Report, Row


def line(text: object) -> str:
    """A name or a sentence of someone's on one line, without what does not print."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())


def cut(text: object, longest: int) -> str:
    """`line`, cut where it is longer."""
    whole = line(text)
    return whole if len(whole) <= longest else f"{whole[: longest - 1]}…"


def short(figure: Estimate) -> str:
    return "–" if figure.value is None else f"{figure.value:.3f}"


def signed(figure: Estimate) -> str:
    """A difference with its interval."""
    if figure.value is None:
        return "–"
    if figure.low is None or figure.high is None:
        return f"{figure.value:+.3f}"
    return f"{figure.value:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]"


def rank(figure: Estimate) -> str:
    return "–" if figure.value is None else f"{figure.value:,.0f}"


def of(figures: Mapping[str, Estimate] | None, name: str) -> str:
    """The figure of this name, where it was measured."""
    return "–" if figures is None or name not in figures else short(figures[name])


def verdict(difference: Estimate) -> str:
    """better or worse where the interval leaves out zero, else "no"."""
    if difference.low is None or difference.high is None:
        return "unknown"
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "no"


def called(row: Row) -> str:
    return row.name if row.domain == "in" else f"{row.name} (out of domain)"


def space_words(report: Report) -> dict[str, str]:
    """By a space's id, what it is: raw, whitened as the baselines are, or a model's own."""
    whitened = next((row.space for row in report.rows if row.kind == "baseline" and row.space != "raw"), None)
    return {
        row.space: "raw" if row.space == "raw" else "whitened" if row.space == whitened else "own"
        for row in report.rows
    }


def notes(report: Report) -> list[str]:
    """What the figures rest on, as sentences."""
    ids = f"payload {report.payload['id']}, windows {report.windows['id']}"
    return [*basis(report), *impostor_notes(report), *row_notes(report), *latency_notes(report), ids]


def basis(report: Report) -> list[str]:
    """What is left out, what is resampled, and what to keep in mind of the payload and the windows."""
    w, b = report.windows, report.bootstrap
    lines = [
        f"The {w['context']} context rows are excluded from the results, except where these say incl. or included. "
        f"Intervals: {b['resamples']:,} resamples of {b['units']:,} {b['unit']}s. "
        "Cosines of different spaces do not compare.",
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
    return lines


def impostor_notes(report: Report) -> list[str]:
    """Who wins where the truth does not."""
    lines = []
    for row in report.rows:
        found = row.impostors
        if found is None or found["same_article"] is None:
            continue
        lines.append(
            f"{row.name}: another chunk scores above the truth in {100 * found['won']:.1f} % of windows, one of the "
            f"same article in {100 * found['same_article']:.1f} % of these; a context row, were it not excluded, would "
            f"win {100 * found['context_row_won']:.1f} %."
        )
    return lines


def row_notes(report: Report) -> list[str]:
    """What a reader has to know of a ranker, e.g. its fitted decay."""
    return [f"{row.name}: {row.note}." for row in report.rows if row.note]


def latency_notes(report: Report) -> list[str]:
    """How the times were taken."""
    lines = []
    for model, latency in report.latency.items():
        threads = "default" if latency.threads is None else latency.threads
        lines.append(
            f"Latency of {model}: {latency.repeats:,} repeats after {latency.warmup:,} to warm up, one context a call, "
            f"threads {threads}, {latency.device}, {latency.machine}."
        )
    return lines
