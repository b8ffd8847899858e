"""Every model against the mixture on real articles: `FASTLVM_DATA=… python bench/quality.py --corpus sotu`.

A run of each model, objective and seed asked for on the training articles, kept by validation R@5; then every run there
is and the baselines on the same test windows, exact search over the whole corpus, context rows left out. Runs lie below
build/quality/ and are gone on with where they stopped, so that models can be added one at a time. Windows are split by
article (70, 10 and 20 %), seed 0; with --corpus novels-by-work, by novel, so that no test novel has a chapter in
training, and intervals resample novels. The options that are not the trainer's defaults were chosen on validation
articles, for all models alike.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

import fastlvm
from fastlvm import workflow
from fastlvm.evaluation.latency import machine
from fastlvm.evaluation.report import title
from fastlvm.files import atomic_file, read_json, write_json
from fastlvm.models import names
from fastlvm.training import TrainOptions
from fastlvm.training.sweep import sweep
from table import section

BUILD = Path(__file__).parents[1] / "build" / "quality"
RESULTS = Path(__file__).with_name("results")
BY_WORK = "-by-work"
SPLIT = (0.7, 0.1, 0.2)
OPTIONS: dict[str, Any] = {"precision": "bf16", "negatives": "payload"}
OBJECTIVES: dict[str, dict[str, Any]] = {"contrastive": {}, "ar": {"objective": "ar"}, "two-tower": {"tower": 512}}
SHOWN = ("R@1", "R@5", "R@10", "MRR@10", "Contain@50", "median_rank", "cosine")
SEEDED = ("R@1", "R@5", "MRR@10", "Contain@50")


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
    groups = titles(source / "texts.jsonl.gz") if name.endswith(BY_WORK) else None
    return payload, fastlvm.Windows.build(payload, split=SPLIT, seed=0, groups=groups, group_by="work")


def titles(path: Path) -> np.ndarray:
    """A number per row for the title before the chapter's name in brackets."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        found = [json.loads(line)["title"].partition(" [")[0] for line in lines]
    return np.unique(found, return_inverse=True)[1]


def train(name: str, models: list[str], objective: str, seeds: list[int]) -> None:
    payload, windows = corpus(name)
    given = {**OPTIONS, **OBJECTIVES[objective]}
    sweep(models, payload, windows, BUILD / name / objective, seeds=seeds, progress=_started, **given)


def _started(cell: Any) -> None:
    print(cell.name, flush=True)


def done(name: str) -> dict[str, Path]:
    """Every run of a corpus with today's options that came to its end, by what to call it."""
    found = {}
    for objective, given in OBJECTIVES.items():
        for path in sorted((BUILD / name / objective).glob("*/history.json")):
            run = path.parent
            config, history = read_json(run / "config.json"), read_json(path)
            options = TrainOptions.from_dict(config["training"])
            wanted = TrainOptions(**{**OPTIONS, **given, "seed": options.seed})
            last, best = history[-1]["epoch"], _best(history)["epoch"]
            if options == wanted and (last == options.epochs or last - best >= options.patience):
                seed = f", seed {options.seed}" if options.seed else ""
                found[f"{config['model']['name']}, {objective}{seed}"] = run
    return found


def judge(name: str, found: dict[str, Path]) -> dict[str, Any]:
    """The runs, by what to call them, and the baselines on the test windows, as JSON."""
    payload, windows = corpus(name)
    corpora = [workflow.Corpus(payload, windows, name, windows.groups("test"))]
    (report,) = workflow.evaluate_paths(list(found.values()), corpora, names=list(found), say=print)
    about = {"corpus": name, "machine": machine(), "date": date.today().isoformat(), "options": OPTIONS}
    return {**about, "report": report.to_dict(), "runs": {own: _run(path) for own, path in found.items()}}


def _run(path: Path) -> dict[str, Any]:
    """What training came to, without its speed: runs may share the machine, and bench/training_steps.py measures."""
    config, history = read_json(path / "config.json"), read_json(path / "history.json")
    best, start = _best(history), history[0]
    return {
        "model": config["model"]["name"],
        "objective": path.parent.name,
        "seed": config["training"]["seed"],
        "parameters": _parameters(path / "best.safetensors"),
        "best_epoch": best["epoch"],
        "r5": best["val_r@5"],
        "start_r5": start["val_r@5"],
        "unseen_r5": best["val_r@5_unseen"],
        "start_unseen_r5": start["val_r@5_unseen"],
    }


def _best(history: list[dict[str, Any]]) -> dict[str, Any]:
    return max(history, key=lambda entry: entry["val_r@5"])  # the first of equals


def _parameters(path: Path) -> int:
    with safe_open(str(path), framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping


def markdown(data: dict[str, Any]) -> str:
    """Models and baselines, the best first; then what was trained with several seeds."""
    report, rows = data["report"], []
    figures, gains = _figures(report), _gains(report)
    for name in sorted(figures, key=lambda name: -(figures[name]["R@5"] or 0)):
        run = data["runs"].get(name)
        own = [_shown(figures[name][metric]) for metric in SHOWN]
        if run is None:
            rows.append((f"*{name}*", *own, *[""] * 5))
            continue
        gain = gains[name]
        rows.append(
            (
                name,
                *own,
                f"{gain['value']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]",
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
    of = title(report["payload"], report["windows"])
    about = f"{of}; {data['machine']}; {data['date']}. Options: {options}. Baselines in italics."
    parts = [about, section("Test", heads, rows)]
    if several := _seeds(report, data["runs"]):
        parts.append(section("Seeds", ("", "runs", *SEEDED, "R@5 over the whitened mixture"), several))
    return "\n\n".join(parts) + "\n"


def _figures(report: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The figures of each model and baseline, context rows excluded; reports of version 1 are among what is stored."""
    return {
        ranker["name"]: {metric: ranker["excluded"][metric]["value"] for metric in SHOWN}
        for ranker in report["rankers"]
        if ranker["kind"] in ("model", "baseline")
    }


def _gains(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """R@5 of each model over the whitened mixture: value, low and high."""
    differences = (one for one in report["differences"] if one["baseline"] == "whitened mixture")
    return {one["model"]: one["metrics"]["R@5"] for one in differences}


def _seeds(report: dict[str, Any], runs: dict[str, Any]) -> list[tuple[str, ...]]:
    """Mean and standard deviation over seeds, of models that have several."""
    groups: dict[str, list[str]] = {}
    for called in runs:
        groups.setdefault(called.partition(", seed")[0], []).append(called)
    values, gains = _figures(report), _gains(report)
    found = []
    for group, several in groups.items():
        if len(several) == 1:
            continue
        columns = [[values[called][metric] for called in several] for metric in SEEDED]
        columns.append([gains[called]["value"] for called in several])
        cells = [f"{np.mean(column):.4f} ± {np.std(column, ddof=1):.4f}" for column in columns]
        found.append((group, str(len(several)), *cells))
    return found


def merged(stored: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """`data` and the runs that only `stored` has, whose folders may be elsewhere by now.

    Both have to be of the same windows, resamples and baselines, figure by figure, but for the random one, which every
    version draws in its own way: then a difference is that of one report. Another processor rounds otherwise, which
    moves a mean cosine in its last digits.
    """
    old, new = stored["report"], data["report"]
    parts = ("payload", "windows", "bootstrap")
    same = all(new[part].get(entry) == value for part in parts for entry, value in old[part].items())
    if not same or not _alike(_baselines(old), _baselines(new)):
        raise SystemExit(f"the stored result of {stored['corpus']} is of other windows or baselines: judge every run")
    rankers = [ranker for ranker in old["rankers"] if ranker["name"] in stored["runs"].keys() - data["runs"].keys()]
    kept = {ranker["name"] for ranker in rankers}
    differences = [difference for difference in old["differences"] if difference["model"] in kept]
    report = {
        **new,
        "rankers": rankers + new["rankers"],
        "differences": differences + new["differences"],
        "latency": {},
    }
    runs = {called: run for called, run in stored["runs"].items() if called in kept}
    return {**data, "report": report, "runs": {**runs, **data["runs"]}}


def _baselines(report: dict[str, Any]) -> dict[str, list[float | None]]:
    names = {ranker["name"] for ranker in report["rankers"] if ranker["kind"] == "baseline"} - {"random"}
    return {name: list(figures.values()) for name, figures in _figures(report).items() if name in names}


def _alike(old: dict[str, list[float | None]], new: dict[str, list[float | None]]) -> bool:
    return old.keys() == new.keys() and all(
        a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-4))
        for name in old
        for a, b in zip(old[name], new[name], strict=True)
    )


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
    parser.add_argument("--objective", action="append", choices=list(OBJECTIVES), help="all when absent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train", action="store_true", help="train alone, and look at no test window")
    parser.add_argument("--keep", action="store_true", help="write the table to bench/results/")
    given = parser.parse_args()
    for objective in given.objective or OBJECTIVES:
        train(given.corpus, given.model or names(), objective, given.seeds)
    if given.train:
        return
    data = judge(given.corpus, done(given.corpus))
    stored = RESULTS / f"quality-{given.corpus}.json"
    if given.keep and stored.exists():
        data = merged(read_json(stored), data)
    print(markdown(data))
    if given.keep:
        keep(f"quality-{given.corpus}", data, markdown(data))


if __name__ == "__main__":
    main()
