"""A grid of runs, one after the other or a few at a time, and what each came to."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastlvm.errors import FastlvmError, InputError
from fastlvm.files import write_json
from fastlvm.training import runs
from fastlvm.training.loop import RunSummary
from fastlvm.training.trainer import size, train

if TYPE_CHECKING:
    from fastlvm.data import Payload, Windows

TABLE = "sweep.json"


class Cell(NamedTuple):
    """One run of a grid."""

    model: str
    seed: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        varied = [f"{key}={value}" for key, value in sorted(self.settings.items())]
        return "-".join([self.model, *varied, f"seed{self.seed}"]).replace(os.sep, "_")


class Result(NamedTuple):
    """What a run came to; r5 is validation R@5 of the best epoch, start_r5 that of the untrained model.

    unseen_r5 and start_unseen_r5: the same over the rows of articles that are not trained on alone.
    """

    cell: Cell
    path: Path
    parameters: int
    best_epoch: int
    r5: float
    start_r5: float
    unseen_r5: float
    start_unseen_r5: float
    windows_per_s: float

    def to_dict(self) -> dict[str, Any]:
        return {**self.cell._asdict(), **self._asdict(), "cell": self.cell.name, "path": str(self.path)}


def sweep(
    models: Sequence[str],
    payload: Payload,
    windows: Windows,
    out: str | os.PathLike[str],
    *,
    seeds: Sequence[int] = (0,),
    grid: Mapping[str, Sequence[Any]] | None = None,
    jobs: int = 1,
    progress: Callable[[Cell], Callable[..., None] | None] = lambda cell: None,
    **settings: Any,
) -> list[Result]:
    """Train every model with every seed and every combination of `grid`; a folder in `out` for each, and sweep.json.

    A run that is there is gone on with, or taken as it is where it is done: a sweep that was stopped goes on. jobs:
    runs at a time, each in a process of its own with its share of the threads. progress: called with each run that is
    started in this process, for what `train` is to report to. Raises InputError as `train` does, before any run where
    a setting is wrong.
    """
    cells = [
        Cell(model, seed, dict(zip(grid or {}, values, strict=True)))
        for model in models
        for values in itertools.product(*(grid or {}).values())
        for seed in seeds
    ]
    if not cells:
        raise InputError("models or seeds is empty, and one of each is wanted at least")
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise InputError(f"jobs is {jobs!r}, and a whole number from 1 on is wanted")
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name} is asked for twice: name every model, seed and value once")
    for cell in cells:
        runs.request(cell.model, payload, windows, _settings(cell, settings), size)
    folder = Path(out)
    if jobs > 1:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda cell: _apart(cell, payload, windows, folder / cell.name, settings, jobs), cells))
    results = []
    for cell in cells:
        summary = train(
            cell.model,
            payload,
            windows,
            folder / cell.name,
            resume=True,
            progress=progress(cell),
            **_settings(cell, settings),
        )
        results.append(_result(cell, summary))
        write_json(folder / TABLE, [result.to_dict() for result in results])
    return results


def averages(results: Sequence[Result]) -> list[tuple[str, int, float, float]]:
    """Of each model with its settings: name, runs, and mean and standard deviation of R@5 over its seeds."""
    found: dict[str, list[float]] = {}
    for result in results:
        found.setdefault(result.cell._replace(seed=0).name.removesuffix("-seed0"), []).append(result.r5)
    return [
        (name, len(values), float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
        for name, values in found.items()
    ]


def _settings(cell: Cell, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, **cell.settings, "seed": cell.seed}


def _result(cell: Cell, summary: RunSummary) -> Result:
    best, start = summary.history[summary.best_epoch], summary.history[0]
    return Result(
        cell=cell,
        path=summary.path,
        parameters=summary.parameters,
        best_epoch=summary.best_epoch,
        r5=best["val_r@5"],
        start_r5=start["val_r@5"],
        unseen_r5=best["val_r@5_unseen"],
        start_unseen_r5=start["val_r@5_unseen"],
        windows_per_s=summary.windows_per_s,
    )


def _apart(cell: Cell, payload: Payload, windows: Windows, out: Path, settings: Mapping[str, Any], jobs: int) -> None:
    """`train` in a process of its own."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    given = {"model": cell.model, "payload": str(payload.path), "out": str(out), "settings": _settings(cell, settings)}
    saved = out.parent / f".{out.name}.windows.npz"
    out.parent.mkdir(parents=True, exist_ok=True)
    windows.save(saved)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fastlvm.training.sweep", json.dumps({**given, "windows": str(saved)})],
            env={**os.environ, "FASTLVM_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        saved.unlink(missing_ok=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise FastlvmError(f"run {out} ended with exit code {done.returncode}: {said[-1] if said else 'nothing said'}")


def _child(given: dict[str, Any]) -> None:
    from fastlvm.data import Payload, Windows

    payload, windows = Payload.open(given["payload"]), Windows.open(given["windows"])
    train(given["model"], payload, windows, given["out"], resume=True, **given["settings"])


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
