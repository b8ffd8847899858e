"""The whole way in one call: sample payload, windows, training, index, artifact, evaluation, one retrieved chunk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlvm.errors import InputError
from fastlvm.files import check_folder, read_json

if TYPE_CHECKING:
    from fastlvm.data import Payload, Windows
    from fastlvm.evaluation import Report
    from fastlvm.predictor import Predictor
    from fastlvm.training import RunSummary

SPLIT = (0.6, 0.1, 0.3)
SEED = 0
DERIVED = {"index": "index.json", "artifact": "config.json"}  # made from the run, anew every time; and their records
# A Mamba small enough for a demo; everything else is the default.
MODELS: dict[str, dict[str, Any]] = {"mlp": {}, "mamba-s": {"d_model": 256, "n_layers": 4, "d_state": 16}}


@dataclass(frozen=True)
class Demo:
    """What the demo made and found; the predictor is that of the model with the best validation R@5."""

    payload: Payload
    windows: Windows
    summaries: list[RunSummary]
    predictor: Predictor
    report: Report


def run(out: Path, *, progress: Callable[..., None] | None = None, say: Callable[[str], None] = print) -> Demo:
    """Run every step into folder `out`; a step that an earlier, interrupted call finished is not done again."""
    from fastlvm import Index, Payload, Predictor, Windows, export, workflow
    from fastlvm.training import load_run, train

    payload = Payload.sample()
    check_folder(out)
    _check_own(out, payload)
    say(f"payload: {len(payload):,} chunks x {payload.dim}, {payload.provenance.encoder}, {payload.provenance.source}")

    windows = Windows.build(payload, split=SPLIT, seed=SEED)
    windows.save(out / "windows.npz")
    counts = [
        f"{name} {len(windows.rows(name)):,} of {len(windows.articles(name))} articles" for name in windows.splits
    ]
    say(f"windows: {', '.join(counts)}; articles in two splits: {windows.article_overlap()}")

    summaries = []
    for model, settings in MODELS.items():
        say(f"model: {model}")
        folder = out / "runs" / model
        summaries.append(train(model, payload, windows, folder, resume=True, progress=progress, **settings))
    best = max(summaries, key=lambda summary: summary.best_r5).path
    others = [summary.path for summary in summaries if summary.path != best]
    _, _, space = load_run(best)
    for name in DERIVED:
        if (out / name).exists():
            shutil.rmtree(out / name)
    Index.build(payload, space=space).save(out / "index")
    export(best, out / "artifact", "int8", out / "index", payload=payload, windows=windows)
    paths, names = [out / "artifact", *others], [path.name for path in (best, *others)]
    corpus = workflow.Corpus(payload, windows, "sample payload")
    [report] = workflow.evaluate_paths(paths, [corpus], names=names, say=say)
    workflow.write_report(report, out, say)
    return Demo(payload, windows, summaries, Predictor.load(out / "artifact"), report)


def example(demo: Demo, k: int = 3) -> list[tuple[str, str]]:
    """(what, text) of one test window that went well: the last chunk read and the k best retrieved."""
    rows = demo.windows.rows("test")
    found = demo.predictor.search(demo.payload.take(rows[:, :-1]), k=k, exclude=rows[:, :-1])
    hits = np.flatnonzero(found.ids[:, 0] == demo.payload.groups[rows[:, -1]])
    window = int(hits[len(hits) // 2]) if len(hits) else 0
    lines = [("example", f"one of the {len(hits):,} windows of {len(rows):,} whose next chunk came first")]
    lines.append(("last chunk read", demo.payload.text(int(rows[window, -2])) or ""))
    for rank, row in enumerate(found.ids[window], start=1):
        mark = ", the true next chunk" if row == demo.payload.groups[rows[window, -1]] else ""
        lines.append((f"retrieved {rank}{mark}", demo.payload.text(int(row)) or ""))
    return lines


def places(out: Path) -> list[tuple[Path, str]]:
    """What lies where."""
    return [
        (out / "windows.npz", "windows: rows of the sample payload, split by article"),
        (out / "runs", "of each model, checkpoints, the space and history.json"),
        (out / "index", "the FAISS index over the payload in that space"),
        (out / "artifact", "the better model: what fastlvm.Predictor.load takes; no torch needed"),
        (out / "report.html", "the report as a page, to be read in a browser"),
        (out / "report.json", "every figure above with its interval"),
        (out / "report.png", "the chart"),
    ]


def _check_own(out: Path, payload: Payload) -> None:
    """Refuse a folder that holds another's windows, index or artifact: the demo makes these anew every time."""
    from fastlvm import Windows

    def is_own(name: str) -> bool:
        if name not in DERIVED:
            return Windows.open(out / name).payload_id == payload.id
        record = read_json(out / name / DERIVED[name])
        written_by = record.get("format") if isinstance(record, dict) else None
        return written_by == f"fastlvm-{name}" and record.get("payload_id") == payload.id

    for name in ("windows.npz", *DERIVED):
        own = True
        if (out / name).exists():
            try:
                own = is_own(name)
            except InputError:
                own = False
        if not own:
            raise InputError(f"{out / name} is not the demo's own: remove it or name another --out")
