"""`fastlvm train` and `fastlvm sweep`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastlvm.console import GATES, TrainingBar, interrupted, note, parse_settings, print_sweep, training_verdict
from fastlvm.errors import GateError, InputError

NAMED = ("name", "model", "payload", "windows", "out", "objective", "resume", "progress", "framework")  # not for --set
FRAMEWORKS = {"torch": "fastlvm.training", "mlx": "fastlvm.training.mlx"}  # where each has its `train`
GATE = f"NAME@EPOCH, such as epoch-4@4: stop with exit code 1 unless validation meets the gate then; {GATES}"
SET = "another setting of model or trainer, such as d_model=256"


def train(
    payload: Annotated[Path, typer.Option(help="payload folder")],
    windows: Annotated[Path, typer.Option(help="windows .npz")],
    out: Annotated[Path, typer.Option(help="run folder to write")],
    model: Annotated[str, typer.Option(help="name of the model")] = "mamba-s",
    objective: Annotated[str, typer.Option(help="contrastive, infonce or ar")] = "contrastive",
    resume: Annotated[bool, typer.Option("--resume", help="go on where a run stopped, bit for bit")] = False,
    epochs: Annotated[int | None, typer.Option(help="passes over the training windows")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch", help="windows per step")] = None,
    lr: Annotated[float | None, typer.Option(help="peak learning rate")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of everything random")] = None,
    space: Annotated[str | None, typer.Option(help="whiten or none")] = None,
    precision: Annotated[str | None, typer.Option(help="of the products of model and loss: fp32 or bf16")] = None,
    hard_negatives: Annotated[str | None, typer.Option(help="same-article:K or index:K")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="read articles backwards, as a control")] = False,
    gate: Annotated[list[str] | None, typer.Option(help=GATE)] = None,
    framework: Annotated[
        str, typer.Option(help="torch, or mlx, which has fewer settings and needs no torch")
    ] = "torch",
    setting: Annotated[list[str] | None, typer.Option("--set", help=SET)] = None,
) -> None:
    """Train a model; a run starts at the whitened recency mixture and keeps what validation R@5 says helps.

    Several processes that share each batch: torchrun --nproc-per-node=2 -m fastlvm train ...

    Without torch: fastlvm train --framework mlx --payload payload --windows windows.npz --out run
    """
    from fastlvm import Payload, Windows

    if framework not in FRAMEWORKS:
        raise InputError(f"--framework: got {framework!r}, wants one of {', '.join(FRAMEWORKS)}")
    training = importlib.import_module(FRAMEWORKS[framework])

    given = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "space": space,
        "precision": precision,
        "hard_negatives": hard_negatives,
        "reverse": reverse or None,
        "gates": gate or None,
    }
    settings = {key: value for key, value in given.items() if value is not None}
    settings |= parse_settings(setting or [], taken={*NAMED, *settings})
    try:
        with TrainingBar() as bar:
            summary = training.train(
                model,
                Payload.open(payload),
                Windows.open(windows),
                out,
                objective=objective,
                resume=resume,
                progress=bar,
                **settings,
            )
    except KeyboardInterrupt:
        raise interrupted(out, "the same command with --resume") from None
    if summary.first_process:
        typer.echo(training_verdict(summary))
        typer.echo(f"run       {summary.path}")
        if summary.missed:
            raise GateError(summary.missed)


def sweep(
    payload: Annotated[Path, typer.Option(help="payload folder")],
    windows: Annotated[Path, typer.Option(help="windows .npz")],
    out: Annotated[Path, typer.Option(help="folder for the runs and sweep.json")],
    model: Annotated[list[str] | None, typer.Option(help="name of a model; give several")] = None,
    seeds: Annotated[str, typer.Option(help="seeds, with commas between")] = "0",
    vary: Annotated[list[str] | None, typer.Option(help="values to try each of, such as lr=1e-4,3e-4")] = None,
    jobs: Annotated[int, typer.Option(help="runs at a time")] = 1,
    setting: Annotated[list[str] | None, typer.Option("--set", help=SET)] = None,
) -> None:
    """Train a grid of models, seeds and settings, and print what each came to; one that was stopped goes on."""
    from fastlvm import Payload, Windows
    from fastlvm.training.sweep import Cell, sweep

    settings = parse_settings(setting or [], taken={*set(NAMED) - {"objective", "framework"}, "seed"})
    grid = _grid(vary or [], taken={*settings, "seed"})
    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds: got {seeds!r}, wants whole numbers such as 0,1,2") from None

    def started(cell: Cell) -> Callable[..., None] | None:
        note(cell.name)
        return bar

    try:
        with TrainingBar() as bar:
            results = sweep(
                model or ["mamba-s"],
                Payload.open(payload),
                Windows.open(windows),
                out,
                seeds=numbers,
                grid=grid,
                jobs=jobs,
                progress=started,
                **settings,
            )
    except KeyboardInterrupt:
        raise interrupted(out, "the same command") from None
    print_sweep(results)


def _grid(texts: list[str], taken: set[str]) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not key or not equals or not values:
            raise InputError(f"--vary: got {text!r}, wants values such as lr=1e-4,3e-4")
        if key in taken or key in grid:
            raise InputError(f"--vary: {key} is given elsewhere too: name it once")
        grid[key] = [parse_settings([f"{key}={value}"], taken=set())[key] for value in values.split(",")]
    return grid
