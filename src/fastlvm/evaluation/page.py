"""A report as one HTML page that needs nothing beside it: no script, no font, no file, no address."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from fastlvm.errors import InputError
from fastlvm.evaluation.page_style import CSS
from fastlvm.evaluation.plots import Plot, plots
from fastlvm.evaluation.sections import Section, Table, findings, lede, sections
from fastlvm.evaluation.wording import line
from fastlvm.files import atomic_file

if TYPE_CHECKING:
    from fastlvm.evaluation.report import Report

# Names and titles are escaped; were one not, the browser would still load and run nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_page(report: Report, path: str | os.PathLike[str]) -> None:
    """Write everything a report says, and its plots where matplotlib is installed, as one HTML file, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """What `write_page` writes."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    try:
        drawn, without = plots(report), ""
    except InputError:
        drawn, without = [], "There are no plots: matplotlib is not installed (pip install fastlvm[plot])."
    title = _text(report.title())
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<meta name="color-scheme" content="light dark">'
    yield f"<title>{title}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n<main>"
    yield f"<h1>{title}</h1>"
    for level, sentence in findings(report):
        kind = "fault" if level == "fault" else "warning"
        yield f'<p class="finding {kind}"><strong>{_text(level)}</strong> {_text(sentence)}</p>'
    yield '<div class="lede">'
    yield from (f"<p>{_text(sentence)}</p>" for sentence in lede(report))
    yield "</div>"
    if without:
        yield f"<p>{_text(without)}</p>"
    for section in sections(report):
        yield from _section(section, [plot for plot in drawn if plot.key == section.key])
    yield "</main>\n</body>\n</html>"


def _section(section: Section, drawn: Sequence[Plot]) -> Iterator[str]:
    yield f'<section id="{section.key}">\n<h2>{_text(section.title)}</h2>'
    yield from (f"<p>{_text(sentence)}</p>" for sentence in section.sentences)
    shown = [plot for plot in drawn if not plot.more]
    more = [plot for plot in drawn if plot.more]
    if shown:
        yield from _figures(shown)
    for table in section.tables:
        yield from _table(table)
    if more:
        yield "<details>\n<summary>The same plots of the other models</summary>"
        yield from _figures(more)
        yield "</details>"
    if section.notes:
        yield '<ul class="notes">'
        yield from (f"<li>{_text(note)}</li>" for note in section.notes)
        yield "</ul>"
    yield "</section>"


def _figures(drawn: Sequence[Plot]) -> Iterator[str]:
    yield '<div class="plots">'
    for plot in drawn:
        yield f"<figure>\n<h3>{_text(plot.title)}</h3>\n{plot.svg}"
        yield f"<figcaption>{_text(plot.caption)}</figcaption>\n</figure>"
    yield "</div>"


def _table(table: Table) -> Iterator[str]:
    title = _text(table.title)
    if table.folded:
        yield f"<details>\n<summary>{title}</summary>"
    else:
        yield f"<h3>{title}</h3>"
    # A box that scrolls has to be reached by keyboard, and named.
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">'
    yield f'<table class="{"words" if len(table.head) == 2 else "figures"}">'
    if any(table.head):
        cells = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.head)
        yield f"<thead><tr>{cells}</tr></thead>"
    yield "<tbody>"
    for at, row in enumerate(table.rows):
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
        strong = ' class="strong"' if at in table.strong else ""
        yield f'<tr{strong}><th scope="row">{_text(row[0])}</th>{cells}</tr>'
    yield "</tbody>\n</table>\n</div>"
    if table.folded:
        yield "</details>"


def _text(text: str) -> str:
    return escape(line(text)).replace(" %", "\u00a0%")
