"""What training owes its gain to, on validation articles: `FASTLVM_DATA=… python bench/recipe.py --corpus sotu`.

One model with one setting at a time changed, and with a part of the training articles for as many steps as with all of
them. Every row is the epoch of the best validation R@5, which is why none of these figures is one of the test split;
`bench/quality.py` has those. Runs lie below build/quality/ and are taken as they are where they are done.
"""

from __future__ import annotations

import argparse
import hashlib
from datetime import date
from typing import Any

import numpy as np

import fastlvm
from fastlvm.evaluation.latency import machine
from fastlvm.models import names
from fastlvm.training import TrainOptions
from fastlvm.training.sweep import Result, sweep
from quality import BUILD, OPTIONS, corpus, keep
from table import section

CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "lr 1e-4": {"lr": 1e-4},
    "lr 1e-3": {"lr": 1e-3},
    "the head as quick as the rest": {"head_lr": 1.0},
    "no dropout": {"dropout": 0.0},
    "dropout 0.5": {"dropout": 0.5},
    "4,096 rows as negatives, others in every step": {"negatives": "payload:4096"},
    "negatives of the batch alone": {"negatives": "batch"},
    "and 3 of the same article": {"negatives": "batch", "hard_negatives": "same-article:3"},
    "and 3 mined from the index": {"negatives": "batch", "hard_negatives": "index:3"},
    "no negatives of the target's article": {"false_negatives": "article"},
    "temperature 0.03": {"temperature": 0.03},
    "temperature 0.1": {"temperature": 0.1},
    "InfoNCE alone": {"objective": "infonce"},
    "cosine and squared error alone": {"objective": "ar"},
    "a projection head": {"projection": "mlp"},
    "context dropout 0.2": {"context_dropout": 0.2},
    "span corruption 0.1": {"span_corruption": 0.1},
    "averaged weights, 0.99": {"ema": 0.99},
    "articles read backwards": {"reverse": True},
    "no whitening": {"space": "none"},
    "without the mixture": {"residual": False},
}
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)


def part(payload: fastlvm.Payload, windows: fastlvm.Windows, share: float) -> fastlvm.Windows:
    """The windows with a share of the training articles, a smaller one's within a larger one's."""
    articles = windows.articles("train")
    kept = sorted(articles, key=lambda a: hashlib.sha256(f"part:{a}".encode()).digest())[: round(share * len(articles))]
    rows, codes = [], []
    for code, split in enumerate(windows.splits):
        found = windows.rows(split)
        if split == "train":
            found = found[np.isin(payload.keys[found[:, -1], 0], kept)]
        rows.append(found)
        codes.append(np.full(len(found), code, np.uint8))
    together = np.concatenate(rows)
    source = f"{share:.4g} of the training articles"
    return fastlvm.Windows(payload.id, together, payload.keys[together[:, -1]], np.concatenate(codes), source=source)


def run(name: str, model: str, share: float, settings: dict[str, Any]) -> tuple[Result, int]:
    """A run, and how many windows it was trained on."""
    payload, windows = corpus(name)
    if share < 1:
        windows = part(payload, windows, share)
    label = "-".join(f"{key}={value}" for key, value in settings.items()) or "plain"
    out = BUILD / name / "recipe" / f"{label}-{share:.4g}".replace(":", "")
    print(f"{model}, {label}, {share:.4g} of the training articles", flush=True)
    return sweep([model], payload, windows, out, **{**OPTIONS, **settings})[0], len(windows.rows("train"))


def kept(name: str, model: str) -> dict[str, Any]:
    """Everything that is measured, as JSON."""
    about = {"corpus": name, "model": model, "machine": machine(), "date": date.today().isoformat(), "options": OPTIONS}
    changes = [{"change": change, **_figures(*run(name, model, 1, given))} for change, given in CHANGES.items()]
    steps = {share: {"epochs": round(TrainOptions.epochs / share), "patience": 0} for share in SHARES if share < 1}
    curve = [_figures(*run(name, model, share, steps.get(share, {}))) for share in SHARES]
    return {**about, "changes": changes, "curve": curve}


def _figures(result: Result, windows: int) -> dict[str, Any]:
    return {**result.to_dict(), "path": None, "windows_per_s": None, "windows": windows}


def markdown(data: dict[str, Any]) -> str:
    """Two tables: changes, and the curve."""
    options = ", ".join(f"{key} {value}" for key, value in data["options"].items())
    about = (
        f"`{data['model']}` on validation articles of {data['corpus']}; {data['machine']}; {data['date']}. "
        f"Options: {options}. Untrained, in brackets, is the whitened mixture."
    )
    heads = ("R@5 (untrained)", "gain", "among unseen articles", "gain", "epoch kept")
    changes = [(row["change"], *_cells(row)) for row in data["changes"]]
    curve = [(f"{row['windows']:,}", *_cells(row)) for row in data["curve"]]
    tables = (section("One change at a time", ("", *heads), changes), section("Windows", ("windows", *heads), curve))
    return "\n\n".join([about, *tables]) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    found = []
    for which in ("r5", "unseen_r5"):
        value, start = row[which], row[f"start_{which}"]
        found += [f"{value:.4f} ({start:.4f})", f"{100 * (value / start - 1):+.1f} %" if start else "–"]
    return [*found, str(row["best_epoch"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="sotu", help="a folder of FASTLVM_DATA")
    parser.add_argument("--model", default="mlp", choices=names())
    parser.add_argument("--keep", action="store_true", help="write the tables to bench/results/")
    given = parser.parse_args()
    data = kept(given.corpus, given.model)
    print(markdown(data))
    if given.keep:
        keep(f"recipe-{given.corpus}", data, markdown(data))


if __name__ == "__main__":
    main()
