"""Every model against the mixture on real articles: `FASTLVM_DATA=… python bench/quality.py --corpus sotu`.

A run of each model and objective on the training articles, kept by validation R@5; then all of them and the baselines
on the same test windows, exact search over the whole corpus, context rows left out. Runs lie below build/quality/ and
are gone on with where they stopped, so that models can be added one at a time. Windows are split by article (70, 10 and
20 %), seed 0; with --corpus novels-by-work, by novel, so that no test novel has a chapter in training. The options that
are not the trainer's defaults were chosen on validation articles, for all models alike.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

import fastlvm
from fastlvm import workflow
from fastlvm.evaluation import Report
from fastlvm.evaluation.latency import machine
from fastlvm.evaluation.metrics import METRICS
from fastlvm.files import atomic_file, write_json
from fastlvm.models import names
from fastlvm.training.sweep import Result, sweep
from table import section

BUILD = Path(__file__).parents[1] / "build" / "quality"
RESULTS = Path(__file__).with_name("results")
BY_WORK = "-by-work"
SPLIT = (0.7, 0.1, 0.2)
OPTIONS: dict[str, Any] = {"precision": "bf16"}
OBJECTIVES = ("contrastive", "ar")
SHOWN = tuple(metric for metric in METRICS if metric != "Eff@5")


def corpus(name: str) -> tuple[fastlvm.Payload, fastlvm.Windows]:
    """A corpus of the folder FASTLVM_DATA as a payload, and its windows, split by article or, NAME-by-work, by work."""
    folder = os.environ.get("FASTLVM_DATA")
    if not folder:
        raise SystemExit("FASTLVM_DATA is not set: name the folder that holds the corpora")
    plain = name.removesuffix(BY_WORK)
    source, path = Path(folder) / plain, BUILD / plain / "payload"
    if not path.exists():
        vectors, keys = np.load(source / "vectors.npy"), np.load(source / "keys.npy")
        fastlvm.Payload.build(path, vectors, keys, encoder="all-mpnet-base-v2", source=plain)
    payload = fastlvm.Payload.open(path)
    works = titles(source / "texts.jsonl.gz") if name.endswith(BY_WORK) else None
    return payload, fastlvm.Windows.build(payload, split=SPLIT, seed=0, works=works)


def titles(path: Path) -> np.ndarray:
    """A number per row for the title before the chapter's name in brackets."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        found = [json.loads(line)["title"].partition(" [")[0] for line in lines]
    return np.unique(found, return_inverse=True)[1]


def train(name: str, models: list[str], objective: str, seeds: list[int]) -> list[Result]:
    payload, windows = corpus(name)
    given = {**OPTIONS, "objective": objective}
    return sweep(models, payload, windows, BUILD / name / objective, seeds=seeds, progress=_started, **given)


def _started(cell: Any) -> None:
    print(cell.name, flush=True)


def judge(name: str, found: dict[str, Result]) -> Report:
    """The runs, by what to call them, and the baselines on the test windows."""
    payload, windows = corpus(name)
    paths = [result.path for result in found.values()]
    return workflow.evaluate_paths(paths, payload, windows, split="test", name=name, names=list(found), say=print)


def kept(name: str, report: Report, found: dict[str, Result]) -> dict[str, Any]:
    """What stays of a comparison, as JSON."""
    about = {"corpus": name, "machine": machine(), "date": date.today().isoformat(), "options": OPTIONS}
    left_out = {"path": None, "windows_per_s": None}  # runs may share the machine; bench/training.py measures
    runs = {called: {**result.to_dict(), **left_out} for called, result in found.items()}
    return {**about, "report": report.to_dict(), "runs": runs}


def markdown(data: dict[str, Any]) -> str:
    """Models and baselines, the best first."""
    report, rows = Report.from_dict(data["report"]), []
    for row in sorted(report.rows, key=lambda row: -(row.excluded["R@5"].value or 0)):
        run = data["runs"].get(row.name)
        own = [_shown(row.excluded[metric].value) for metric in SHOWN]
        if run is None:
            rows.append((f"*{row.name}*", *own, *[""] * 5))
            continue
        gain = report.difference(row.name, "whitened mixture").metrics["R@5"]
        rows.append(
            (
                row.name,
                *own,
                f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]",
                f"{run['parameters']:,}",
                str(run["best_epoch"]),
                f"{run['r5']:.4f} ({run['start_r5']:.4f})",
                f"{run['unseen_r5']:.4f} ({run['start_unseen_r5']:.4f})",
            )
        )
    heads = (
        "",
        *SHOWN,
        "R@5 over the whitened mixture",
        "parameters",
        "epoch kept",
        "validation R@5 (untrained)",
        "among unseen articles",
    )
    options = ", ".join(f"{key} {value}" for key, value in data["options"].items())
    about = f"{report.title()}; {data['machine']}; {data['date']}. Options: {options}. Baselines in italics."
    return "\n\n".join([about, section("Test", heads, rows)]) + "\n"


def keep(name: str, data: dict[str, Any], tables: str) -> None:
    """Both forms of a result, in bench/results/."""
    write_json(RESULTS / f"{name}.json", data)
    with atomic_file(RESULTS / f"{name}.md") as temporary:
        temporary.write_text(tables, encoding="utf-8")


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if value < 1 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="sotu", help="a folder of FASTLVM_DATA, or one with -by-work after it")
    parser.add_argument("--model", action="append", choices=names(), help="a model; all when absent")
    parser.add_argument("--objective", action="append", choices=OBJECTIVES, help="an objective; all when absent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--keep", action="store_true", help="write the table to bench/results/")
    given = parser.parse_args()
    models = given.model or names()
    found = {}
    for objective in given.objective or OBJECTIVES:
        for result in train(given.corpus, models, objective, given.seeds):
            seed = f", seed {result.cell.seed}" if len(given.seeds) > 1 else ""
            found[f"{result.cell.model}, {objective}{seed}"] = result
    data = kept(given.corpus, judge(given.corpus, found), found)
    print(markdown(data))
    if given.keep:
        keep(f"quality-{given.corpus}", data, markdown(data))


if __name__ == "__main__":
    main()
