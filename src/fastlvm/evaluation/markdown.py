"""A report as Markdown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fastlvm.evaluation.sections import Table, findings, lede, sections
from fastlvm.evaluation.wording import line
from fastlvm.files import atomic_file

if TYPE_CHECKING:
    from fastlvm.evaluation.report import Report

# What is markup wherever it stands: links by their middle, so that an interval in brackets stays as it is.
_MARKUP = re.compile(r"[\\`*<|~$]|\](?=[(\[])|(?<!\w)_|_(?!\w)|&(?=#?\w+;)")
_AT_START = re.compile(r"^([-+#>=[]|\d+(?=[.)]))")


def write_markdown(report: Report, path: str | os.PathLike[str]) -> None:
    """Write everything a report says in GitHub's Markdown, atomically; names and titles stand as they are."""
    with atomic_file(path) as temporary:
        temporary.write_text(markdown(report), encoding="utf-8")


def markdown(report: Report) -> str:
    """What `write_markdown` writes."""
    return "\n\n".join(_blocks(report)) + "\n"


def _blocks(report: Report) -> Iterator[str]:
    yield f"# {_text(report.title())}"
    wrong = findings(report)
    if wrong:
        yield "\n".join(f"- **{_text(level)}**: {_text(sentence)}" for level, sentence in wrong)
    yield "\n".join(_text(sentence) for sentence in lede(report))
    for section in sections(report):
        yield f"## {_text(section.title)}"
        yield from (_sentence(sentence) for sentence in section.sentences)
        for table in section.tables:
            yield f"**{_text(table.title)}**"
            yield _table(table)
        if section.notes:
            yield "\n".join(f"- {_sentence(note)}" for note in section.notes)


def _table(table: Table) -> str:
    """The first column to the left, figures to the right; text columns of two are text."""
    figures = "---" if len(table.head) == 2 else "---:"
    lines = [table.head, ["---", *[figures] * (len(table.head) - 1)]]
    body = [_row([_text(cell) for cell in table.head]), _row(lines[1])]
    for at, cells in enumerate(table.rows):
        shown = [_text(cell) for cell in cells]
        body.append(_row([f"**{shown[0]}**", *shown[1:]] if at in table.strong else shown))
    return "\n".join(body)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(text: str) -> str:
    """Text as text: nothing in it is markup."""
    return _MARKUP.sub(r"\\\g<0>", line(text))


def _sentence(text: str) -> str:
    """`_text` that begins a line, and no list or heading."""
    found = _AT_START.match(line(text))
    if found is None:
        return _text(text)
    head = found[0]
    rest = _text(line(text)[len(head) :])
    return f"{head}\\{rest}" if head.isdigit() else f"\\{head}{rest}"
