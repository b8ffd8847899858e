"""What tables in Markdown are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def figure(ms: float) -> str:
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 10 else f"{ms:.1f}" if ms < 1000 else f"{ms:.0f}"


def count(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def section(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A heading and a table with its columns aligned; nothing where there are no rows."""
    lines = [tuple(cell.replace("|", "\\|") for cell in line) for line in (heads, *rows)]
    if len(lines) == 1:
        return ""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    drawn = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([f"### {title}", "", drawn[0], rule, *drawn[1:]])
