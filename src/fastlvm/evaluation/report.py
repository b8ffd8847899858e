"""The report of an evaluation: what it holds, and how it is written, read and shown."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastlvm.errors import InputError, IntegrityError, brief, shown
from fastlvm.evaluation.bootstrap import Estimate
from fastlvm.evaluation.latency import Latency
from fastlvm.evaluation.metrics import METRICS
from fastlvm.files import Entries, read_json, whole_number, write_json, wrong_entry

if TYPE_CHECKING:
    from rich.console import Group

FORMAT = "fastlvm-report"
VERSION = 2

_TEXT = ("a text", lambda value: isinstance(value, str))
_PARTS: dict[str, Entries] = {
    "payload": {**dict.fromkeys(("name", "id"), _TEXT), "rows": whole_number(1)},
    "windows": {
        **dict.fromkeys(("id", "split", "headline"), _TEXT),
        **dict.fromkeys(("context", "total", "evaluated", "articles"), whole_number(1)),
        "unanswerable": whole_number(0),
    },
    "alignment": {
        "article_overlap": whole_number(0),
        "random_pair_cosine": ("a number or null", lambda value: value is None or isinstance(value, float)),
    },
    "bootstrap": {
        "unit": _TEXT,
        **dict.fromkeys(("units", "resamples"), whole_number(1)),
        "seed": whole_number(0),
    },
}

HEADLINE = "context rows excluded"
"""What `excluded` figures leave out of the results; reports of another headline do not compare."""


@dataclass(frozen=True)
class Row:
    """One ranker's figures: `excluded` is the headline (context rows left out), `included` counts them.

    docs/report.md describes every field as it stands in report.json. None: not measured.
    """

    name: str
    kind: str
    keys: bool
    space: str
    note: str
    domain: str
    excluded: Mapping[str, Estimate]
    included: Mapping[str, Estimate] | None
    macro: Mapping[str, Estimate] | None
    within_article: Mapping[str, Estimate] | None
    ann: Mapping[str, Any] | None
    curve: Mapping[str, Any] | None
    histogram: Mapping[str, Any] | None
    impostors: Mapping[str, Any] | None
    per_article: Sequence[float] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, estimates as {value, low, high}."""
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Row:
        fields: dict[str, Any] = {name: raw.get(name) for name in cls.__dataclass_fields__}
        fields |= {name: str(raw[name]) for name in ("name", "kind", "space")}
        fields["excluded"] = {**raw["excluded"], **{name: raw["excluded"][name] for name in METRICS}}
        for name in ("excluded", "included", "macro", "within_article"):
            fields[name] = None if fields[name] is None else _estimates(fields[name])
        if (ann := fields["ann"]) is not None:
            fields["ann"] = {**ann, **{name: _estimates(ann[name]) for name in ("metrics", "loss")}}
        return cls(**{**fields, "keys": bool(raw.get("keys")), "domain": raw.get("domain", "in")})


@dataclass(frozen=True)
class Difference:
    """A model minus a baseline on the same windows, context rows excluded."""

    model: str
    baseline: str
    metrics: Mapping[str, Estimate]


def title(payload: Mapping[str, Any], windows: Mapping[str, Any]) -> str:
    """What a report with these entries measured, in one line."""
    return (
        f"Next-chunk retrieval, {payload['name']}: {windows['evaluated']:,} {windows['split']} windows "
        f"of {windows['articles']:,} articles, pool of {payload['rows']:,} chunks"
    )


@dataclass(frozen=True)
class Report:
    """What `evaluate` found. `latency` may be filled in afterwards, by model name."""

    payload: Mapping[str, Any]
    windows: Mapping[str, Any]
    alignment: Mapping[str, Any]
    bootstrap: Mapping[str, Any]
    rows: Sequence[Row]
    differences: Sequence[Difference]
    articles: Mapping[str, Any] | None = None
    findings: Sequence[Mapping[str, Any]] = ()
    latency: dict[str, Latency] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise InputError(f"the report has no ranker {name!r}: it holds {', '.join(row.name for row in self.rows)}")

    def difference(self, model: str, baseline: str) -> Difference:
        for difference in self.differences:
            if (difference.model, difference.baseline) == (model, baseline):
                return difference
        raise InputError(f"the report does not compare {model!r} with {baseline!r}")

    def title(self) -> str:
        """What was measured, in one line."""
        return title(self.payload, self.windows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without NaN or infinity: an undefined figure is null."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "payload": dict(self.payload),
            "windows": dict(self.windows),
            "alignment": dict(self.alignment),
            "bootstrap": dict(self.bootstrap),
            "rankers": [row.to_dict() for row in self.rows],
            "differences": [_plain(vars(difference)) for difference in self.differences],
            "articles": None if self.articles is None else dict(self.articles),
            "findings": [dict(finding) for finding in self.findings],
            "latency": {name: latency.to_dict() for name, latency in self.latency.items()},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Report:
        return cls(
            payload=raw["payload"],
            windows=raw["windows"],
            alignment=raw["alignment"],
            bootstrap=raw["bootstrap"],
            rows=[Row.from_dict(ranker) for ranker in raw["rankers"]],
            differences=[Difference(d["model"], d["baseline"], _estimates(d["metrics"])) for d in raw["differences"]],
            articles=raw.get("articles"),
            findings=raw.get("findings", ()),
            latency={name: Latency.from_dict(value) for name, value in raw["latency"].items()},
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report written by `write`."""
        raw = read_json(path)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT or raw.get("version") != VERSION:
            raise IntegrityError(f"{path} is not a report of this version of fastlvm: run fastlvm eval again")
        for part, entries in _PARTS.items():
            found = raw.get(part)
            wrong = wrong_entry(found, entries) if isinstance(found, dict) else f"{part} is {shown(found)}"
            if wrong:
                raise IntegrityError(f"{path} lacks what a report holds ({wrong}): run fastlvm eval again")
        try:
            return cls.from_dict(raw)
        except (KeyError, TypeError, AttributeError) as error:
            why = brief(error)
            raise IntegrityError(f"{path} lacks what a report holds ({why}): run fastlvm eval again") from error

    def table(self) -> Group:
        """Tables for the terminal, of at most 120 columns."""
        from fastlvm.evaluation.table import render

        return render(self)

    def text(self, width: int = 120) -> str:
        """`table` as plain text."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
        console.print(self.table())
        file = console.file
        assert isinstance(file, io.StringIO)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw R@5 and Contain@50 with their intervals as a PNG. Needs matplotlib (`pip install fastlvm[plot]`)."""
        from fastlvm.evaluation.chart import draw

        draw(self, path)


def _plain(value: Any) -> Any:
    """Estimates as dictionaries, wherever they stand, metrics in the order they are reported."""
    if isinstance(value, Estimate):
        return value.to_dict()
    if not isinstance(value, Mapping):
        return value
    order = {name: at for at, name in enumerate(METRICS)}
    return {name: _plain(value[name]) for name in sorted(value, key=lambda name: order.get(name, len(order)))}


def _estimates(raw: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: Estimate.from_dict(value) for name, value in raw.items()}
