"""A leaderboard of several reports, of those alone that measured the same thing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlvm.errors import InputError
from fastlvm.evaluation.bootstrap import Bootstrap, Estimate
from fastlvm.evaluation.figures import recall_curve
from fastlvm.evaluation.outcome import Outcome, read_all
from fastlvm.evaluation.report import Report, Row

RANKS = "ranks"
"""Folder beside a report that keeps what each ranker did on every window."""

_SAME = (
    ("payload", "id", "payload"),
    ("windows", "id", "windows"),
    ("windows", "split", "split"),
    ("windows", "headline", "headline"),
    ("windows", "evaluated", "number of windows"),
    ("bootstrap", "unit", "unit of resampling"),
    ("bootstrap", "seed", "seed"),
)


@dataclass(frozen=True)
class Place:
    """A ranker's place: what to call it, its row, and less the first model on the same windows; None if not known."""

    name: str
    row: Row
    behind: dict[str, Estimate] | None

    def to_dict(self) -> dict[str, Any]:
        behind = None if self.behind is None else {name: one.to_dict() for name, one in self.behind.items()}
        return {"name": self.name, "ranker": self.row.to_dict(), "less_the_first_model": behind}


def open_report(path: Path) -> tuple[Path, Report]:
    """A report.json, or the one in a folder, and its path."""
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} does not exist: name a report.json, or a folder that fastlvm eval wrote")
    return file, Report.open(file)


def compare(found: Sequence[tuple[Path, Report]]) -> list[Place]:
    """All rankers of reports and their files, by R@5, the best first; baselines and oracles as in the first report.

    Raises InputError, naming what differs, where reports are not of the same windows of the same payload in the same
    setting.
    """
    if len(found) < 2:
        raise InputError(f"{len(found)} report is given, and at least two are wanted")
    first_file, first = found[0]
    for at, (file, report) in enumerate(found[1:], 1):
        if any(file.resolve() == other.resolve() for other, _ in found[:at]):
            raise InputError(f"{file} is given twice: name every report once")
        for part, entry, what in _SAME:
            one, other = getattr(first, part).get(entry), getattr(report, part).get(entry)
            if one != other:
                raise InputError(
                    f"{first_file} and {file} do not compare: {what} {one!r} and {other!r}; evaluate the models on the "
                    "same windows with the same options"
                )
    rows: list[tuple[Path, Row]] = [
        (file, row) for at, (file, report) in enumerate(found) for row in report.rows if _counts(row, at)
    ]
    rows.sort(key=lambda pair: -(pair[1].excluded["R@5"].value or 0))
    names = [row.name for _, row in rows]
    called = [row.name if names.count(row.name) == 1 else f"{row.name} ({_short(file)})" for file, row in rows]
    return [Place(name, row, behind) for name, (_, row), behind in zip(called, rows, _behind(rows, first), strict=True)]


def _counts(row: Row, report: int) -> bool:
    return report == 0 or row.kind in ("model", "reranked")


def _short(file: Path) -> Path:
    """What a user calls a report: its folder, where it has the name that fastlvm eval gives."""
    return file.parent if file.name == "report.json" else file


def _behind(rows: Sequence[tuple[Path, Row]], report: Report) -> list[dict[str, Estimate] | None]:
    """Each ranker less the first model, where both folders keep their ranks; `report` is one of those compared."""
    about = {
        "payload": report.payload["id"],
        "windows": report.windows["id"],
        "split": report.windows["split"],
        "seed": report.bootstrap["seed"],
    }
    kept = {file: read_all(file.parent / RANKS, about) for file in {file for file, _ in rows}}
    outcomes = [_of(kept[file], row) for file, row in rows]
    best = next((one for one, (_, row) in zip(outcomes, rows, strict=True) if row.kind == "model"), None)
    if best is None:
        return [None] * len(rows)
    resampled = Bootstrap(best.units, resamples=report.bootstrap["resamples"], seed=report.bootstrap["seed"])
    return [
        None
        if one is None or one is best or not np.array_equal(one.units, best.units)
        else resampled.difference(one.ranks.excluded, one.cosine, best.ranks.excluded, best.cosine)
        for one in outcomes
    ]


def _of(kept: Sequence[Outcome], row: Row) -> Outcome | None:
    """The outcome that a row's figures were made of: a folder may keep those of a model's earlier states too."""
    for one in kept:
        if (one.name, one.kind, one.space) != (row.name, row.kind, row.space) or row.curve is None:
            continue
        same = math.isclose(float(np.mean(one.cosine)), row.excluded["cosine"].value or 0, rel_tol=1e-9)
        if same and recall_curve(one.ranks.excluded) == list(row.curve["excluded"]):
            return one
    return None
