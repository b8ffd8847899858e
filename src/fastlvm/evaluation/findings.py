"""What a check came to: a sentence with its figures, and whether it is a fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Figure = float | int | str | None

FAULT, WARNING, OK = LEVELS = ("fault", "warning", "ok")
"""Levels, the worst first."""


@dataclass(frozen=True)
class Finding:
    """code: what was found, in a word or two with hyphens; level: one of `LEVELS`; sentence: for a reader, with the
    figures that count; figures: all of them, JSON-able, None where one is undefined.
    """

    code: str
    level: str
    sentence: str
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"code": self.code, "level": self.level, "sentence": self.sentence, "figures": dict(self.figures)}


def percent(share: float) -> str:
    """A share in words: never "0 %" or "100 %" for what is only nearly so."""
    if 0 < share < 0.001:
        return "under 0.1 %"
    if 0.999 < share < 1:
        return "over 99.9 %"
    return f"{100 * share:.3g} %"
