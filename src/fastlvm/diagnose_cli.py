"""`fastlvm diagnose`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastlvm.console import note
from fastlvm.errors import InputError, IntegrityError
from fastlvm.files import check_folder

if TYPE_CHECKING:
    from fastlvm.data import Payload
    from fastlvm.data.held import HeldWindows
    from fastlvm.evaluation import Ranker
    from fastlvm.evaluation.diagnose import Diagnosis


def diagnose(
    payload: Annotated[Path, typer.Option(help="payload folder")],
    windows: Annotated[Path, typer.Option(help="windows .npz, fastlvm's or the predecessor's")],
    models: Annotated[list[Path] | None, typer.Argument(help="runs or artifacts; the mixture when absent")] = None,
    index: Annotated[Path | None, typer.Option(help="index folder to check against the payload")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    sample: Annotated[int, typer.Option(help="most windows to look at, a seeded draw")] = 2000,
    seed: Annotated[int, typer.Option(help="seed of everything random")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder for diagnose.json")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Say in one line what is wrong with windows, payload, index or models, and then all figures; exit 2 on a fault."""
    from fastlvm import Payload
    from fastlvm.data.held import HeldWindows
    from fastlvm.evaluation.diagnose import diagnose as look

    if seed < 0:
        raise InputError(f"--seed: got {seed}, wants a whole number of at least 0")
    if out is not None:
        check_folder(out)
    table = Payload.open(payload)
    held = HeldWindows.open(windows, table)
    rankers = _open_models(models or [], table, held)
    found = look(table, held, rankers, index, split=split, sample=sample, seed=seed, say=note)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _print(found)
    if out is not None:
        found.write(out / "diagnose.json")
        note(f"{out / 'diagnose.json'} written")
    if found.faults:
        raise typer.Exit(InputError.exit_code)


def _open_models(paths: list[Path], payload: Payload, held: HeldWindows) -> list[Ranker]:
    from fastlvm.opening import model_name, open_model

    opened = [open_model(path, model_name(path, paths)) for path in paths]
    for model in opened:
        if model.payload_id != payload.id:
            raise IntegrityError(
                f"{model.path} belongs to payload {model.payload_id}, and {payload.path} is {payload.id}: name its own"
            )
        if model.context != held.context:
            raise InputError(
                f"{model.path} takes contexts of {model.context} chunks, and {held.path} has {held.context}: "
                "diagnose it on windows that it takes"
            )
    return [model.ranker for model in opened]


def _print(found: Diagnosis) -> None:
    typer.echo(found.verdict)
    for name, findings in found.sections.items():
        if findings:
            typer.echo(f"\n{name}")
        for finding in findings:
            typer.echo(f"  {finding.level:<9}{finding.sentence}")
