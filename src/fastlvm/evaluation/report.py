"""Evaluate rankers on a split, and the report that holds what came out: JSON, table and chart."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlvm.data import Payload, Space, Windows
from fastlvm.errors import InputError, IntegrityError
from fastlvm.evaluation import baselines as baseline
from fastlvm.evaluation.latency import Latency
from fastlvm.evaluation.metrics import METRICS, MISS, Bootstrap, Estimate, Ranks, cosines
from fastlvm.evaluation.ranker import Pools, Ranker, predict_all, rank_windows, space_key
from fastlvm.files import read_json, write_json

if TYPE_CHECKING:
    from rich.console import Group

FORMAT = "fastlvm-report"
VERSION = 1


@dataclass(frozen=True)
class Row:
    """One ranker's figures: `excluded` is the headline (context rows left out), `included` counts them."""

    name: str
    kind: str
    space: str
    note: str
    excluded: Mapping[str, Estimate]
    included: Mapping[str, Estimate]


@dataclass(frozen=True)
class Difference:
    """A model minus a baseline on the same windows, context rows excluded."""

    model: str
    baseline: str
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True)
class Report:
    """What `evaluate` found. `latency` may be filled in afterwards, by model name."""

    payload: Mapping[str, Any]
    windows: Mapping[str, Any]
    alignment: Mapping[str, Any]
    bootstrap: Mapping[str, Any]
    rows: Sequence[Row]
    differences: Sequence[Difference]
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
        w, p = self.windows, self.payload
        return (
            f"Next-chunk retrieval, {p['name']}: {w['evaluated']:,} {w['split']} windows "
            f"of {w['articles']:,} articles, pool of {p['rows']:,} chunks"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without NaN or infinity: an undefined figure is null."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "payload": dict(self.payload),
            "windows": dict(self.windows),
            "alignment": dict(self.alignment),
            "bootstrap": dict(self.bootstrap),
            "rankers": [
                {
                    "name": row.name,
                    "kind": row.kind,
                    "space": row.space,
                    "note": row.note,
                    "excluded": _plain(row.excluded),
                    "included": _plain(row.included),
                }
                for row in self.rows
            ],
            "differences": [
                {"model": d.model, "baseline": d.baseline, "metrics": _plain(d.metrics)} for d in self.differences
            ],
            "latency": {name: latency.to_dict() for name, latency in self.latency.items()},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Report:
        rows = [
            Row(r["name"], r["kind"], r["space"], r["note"], _estimates(r["excluded"]), _estimates(r["included"]))
            for r in raw["rankers"]
        ]
        differences = [Difference(d["model"], d["baseline"], _estimates(d["metrics"])) for d in raw["differences"]]
        latency = {name: Latency.from_dict(value) for name, value in raw["latency"].items()}
        return cls(raw["payload"], raw["windows"], raw["alignment"], raw["bootstrap"], rows, differences, latency)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report written by `write`."""
        raw = read_json(path)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT or raw.get("version") != VERSION:
            raise IntegrityError(f"{path} is not a report of this version of fastlvm: run fastlvm eval again")
        try:
            return cls.from_dict(raw)
        except (KeyError, TypeError) as error:
            raise IntegrityError(f"{path} lacks what a report holds ({error}): run fastlvm eval again") from error

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


def evaluate(
    models: Sequence[Ranker],
    payload: Payload,
    windows: Windows,
    *,
    split: str = "test",
    space: Space | None = None,
    baselines: bool = True,
    name: str | None = None,
    clusters: np.ndarray | None = None,
    limit: int | None = None,
    seed: int = 0,
    resamples: int = 1000,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Rank the target of every window of a split over the whole payload, for the models and the baselines.

    The integrity gate `windows.verify(payload)` runs first. models: see `Ranker`. space: whitening of the whitened
    baselines; None takes the first model's, or fits one on the training articles. name: how the report calls the
    payload; None takes its folder's. clusters int [windows of the split]: what is resampled, None = articles.
    limit: rank a seeded sample of this many windows. progress is called with what is about to be done.

    Raises IntegrityError where the windows are not of this payload, InputError for an empty split or bad predictions.
    """
    say = progress or (lambda _: None)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}, and a whole number of at least 0 is wanted")
    alignment = windows.verify(payload)
    rows, articles = np.asarray(windows.rows(split)), np.asarray(windows.keys(split))[:, 0]
    total = len(rows)
    if total == 0:
        raise InputError(f"the windows have none in split {split!r}: build them with a fraction for it")
    rows, articles, unit = _selected(rows, articles, clusters, limit, seed)

    if space is None:
        space = next((m.space for m in models if m.space is not None and not baseline.is_identity(m.space)), None)
    rankers = list(models)
    if baselines:
        say("fitting the baselines")
        rankers += baseline.fit_baselines(payload, windows, space, seed=seed)
    _check_names(rankers)
    ranks, cosine = _rank(rankers, payload, rows, say)

    say("resampling articles")
    bootstrap = Bootstrap(unit, resamples=resamples, seed=seed)
    report_rows, differences = _figures(rankers, ranks, cosine, bootstrap)
    unanswerable = int(np.count_nonzero(next(iter(ranks.values())).excluded == MISS))
    return Report(
        payload={
            "name": name or payload.path.name,
            "id": payload.id,
            "rows": len(payload),
            "dim": payload.dim,
            "encoder": str(getattr(payload.provenance, "encoder", "")),
        },
        windows={
            "id": windows.id,
            "split": split,
            "context": int(windows.context),
            "total": total,
            "evaluated": len(rows),
            "articles": len(np.unique(articles)),
            "unanswerable": unanswerable,
        },
        alignment=_numbers(alignment),
        bootstrap={
            "unit": "article" if clusters is None else "given clusters",
            "units": len(bootstrap.names),
            "resamples": resamples,
            "seed": seed,
            "level": bootstrap.level,
        },
        rows=report_rows,
        differences=differences,
    )


def _selected(
    rows: np.ndarray, articles: np.ndarray, clusters: np.ndarray | None, limit: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, articles and clusters of the windows to rank."""
    unit = articles if clusters is None else np.asarray(clusters)
    if len(unit) != len(rows):
        raise InputError(f"clusters names {len(unit)} windows, and the split has {len(rows)}")
    if limit is None or limit >= len(rows):
        return rows, articles, unit
    if limit < 1:
        raise InputError(f"limit is {limit}, and at least 1 window is wanted")
    chosen = np.sort(np.random.default_rng(seed).choice(len(rows), limit, replace=False))
    return rows[chosen], articles[chosen], unit[chosen]


def _check_names(rankers: Sequence[Ranker]) -> None:
    if not rankers:
        raise InputError("there is nothing to evaluate: give a model, or leave the baselines on")
    names = [ranker.name for ranker in rankers]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two rankers are named {name!r}: name each model, and none like a baseline")


def _rank(
    rankers: Sequence[Ranker], payload: Payload, rows: np.ndarray, say: Callable[[str], None]
) -> tuple[dict[str, Ranks], dict[str, np.ndarray]]:
    """Ranks and cosines by ranker name; rankers of one space share a pass over the payload."""
    groups = np.asarray(payload.groups)
    pools = Pools(payload)
    ranks: dict[str, Ranks] = {}
    cosine: dict[str, np.ndarray] = {}
    for key in dict.fromkeys(_space_name(ranker) for ranker in rankers):
        together = [ranker for ranker in rankers if _space_name(ranker) == key]
        say(f"ranking {', '.join(ranker.name for ranker in together)}")
        pool = pools.of(together[0].space)
        predictions = [predict_all(ranker, payload, rows[:, :-1]) for ranker in together]
        for ranker, found, p in zip(together, rank_windows(predictions, pool, rows, groups), predictions, strict=True):
            ranks[ranker.name] = found
            cosine[ranker.name] = cosines(p, pool, rows[:, -1])
    return ranks, cosine


def _figures(
    rankers: Sequence[Ranker], ranks: Mapping[str, Ranks], cosine: Mapping[str, np.ndarray], bootstrap: Bootstrap
) -> tuple[list[Row], list[Difference]]:
    rows = [
        Row(
            ranker.name,
            ranker.kind,
            _space_name(ranker),
            ranker.note,
            bootstrap.summarise(ranks[ranker.name].excluded, cosine[ranker.name]),
            bootstrap.summarise(ranks[ranker.name].included, cosine[ranker.name]),
        )
        for ranker in rankers
    ]
    differences = []
    for model in (r.name for r in rankers if r.kind == "model"):
        for other in (r.name for r in rankers if r.kind == "baseline"):
            figures = bootstrap.difference(ranks[model].excluded, cosine[model], ranks[other].excluded, cosine[other])
            differences.append(Difference(model, other, figures))
    return rows, differences


def _space_name(ranker: Ranker) -> str:
    """The id of the space a ranker works in; an identity is the payload's own space."""
    return "raw" if ranker.space is None or baseline.is_identity(ranker.space) else space_key(ranker.space)


def _plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: estimates[name].to_dict() for name in METRICS if name in estimates}


def _estimates(raw: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: Estimate.from_dict(value) for name, value in raw.items()}


def _numbers(alignment: Any) -> dict[str, float | int | None]:
    """The figures of an Alignment as JSON numbers; NaN becomes null."""
    fields = {name: getattr(alignment, name) for name in alignment.__dataclass_fields__}
    result: dict[str, float | int | None] = {}
    for name, value in fields.items():
        if isinstance(value, (int, np.integer)):
            result[name] = int(value)
        elif isinstance(value, (float, np.floating)):
            result[name] = float(value) if np.isfinite(value) else None
    return result
