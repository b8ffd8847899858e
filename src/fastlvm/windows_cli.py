"""The commands of `fastlvm windows`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastlvm.console import command, keep_apart, parse_split
from fastlvm.errors import InputError

if TYPE_CHECKING:
    from fastlvm.data import Rekeyed, Windows

windows_app = typer.Typer(help="Windows of consecutive chunks, split by article.", no_args_is_help=True)

OLD = Annotated[Path, typer.Argument(help="the predecessor's window .npz")]
OUT = Annotated[Path, typer.Option(help=".npz to write")]
SPLIT = Annotated[str, typer.Option(help="fractions of the articles: train,validation,test")]
SEED = Annotated[int, typer.Option(help="seed of the split")]


def _print_windows(windows: Windows) -> None:
    by = "" if windows.group_by is None else f", split by {windows.group_by}"
    typer.echo(f"windows of {windows.context} + 1 chunks over payload {windows.payload_id}{by}")
    for name in windows.splits:
        groups = windows.groups(name)
        counted = "" if groups is None else f" {len(set(groups.tolist())):>7} groups"
        typer.echo(
            f"  {name:<11}{len(windows.rows(name)):>9} windows {len(windows.articles(name)):>7} articles{counted}"
        )


@command(windows_app, "build", "fastlvm windows build payload --out windows.npz --split 0.8,0.1,0.1 --seed 0")
def windows_build(
    payload: Annotated[Path, typer.Argument(help="payload folder")],
    out: OUT,
    context: Annotated[int, typer.Option(help="chunks before the target")] = 5,
    split: Annotated[str, typer.Option(help="fractions of the articles or groups: train,validation,test")] = (
        "0.8,0.1,0.1"
    ),
    seed: SEED = 0,
    group_by: Annotated[
        str | None, typer.Option(help="keep articles together by title-prefix, or by a column of --groups")
    ] = None,
    groups: Annotated[
        Path | None, typer.Option(help=".parquet, .jsonl or .jsonl.gz with article or row, and the column")
    ] = None,
) -> None:
    """Cut windows of consecutive chunks and split them by article, or by groups of articles."""
    from fastlvm import Payload, Windows
    from fastlvm.data import group_rows

    if groups is not None and group_by is None:
        raise InputError(f"--groups: {groups} is given, and no column of it: add --group-by COLUMN")
    fractions = parse_split(split)
    table = Payload.open(payload)
    found = None if group_by is None else group_rows(table, group_by, groups)
    windows = Windows.build(table, context=context, split=fractions, seed=seed, groups=found, group_by=group_by)
    windows.save(out)
    _print_windows(windows)
    typer.echo(str(windows.verify(table)))


@command(windows_app, "import", "fastlvm windows import eval_v2.npz --payload payload --out windows.npz")
def windows_import(
    old: OLD,
    payload: Annotated[Path, typer.Option(help="payload folder the windows are keyed to")],
    out: OUT,
    split: SPLIT = "0.8,0.1,0.1",
    seed: SEED = 0,
) -> None:
    """Match a predecessor's windows to payload rows; a set that does not come from the payload is refused."""
    from fastlvm import Payload, Windows

    keep_apart(old, out)
    table = Payload.open(payload)
    windows = Windows.import_predecessor(old, table, split=parse_split(split), seed=seed)
    windows.save(out)
    _print_windows(windows)
    typer.echo(str(windows.verify(table)))


@command(windows_app, "align", "fastlvm windows align eval.npz --payload payload --out windows.npz --split 0,0,1")
def windows_align(
    old: OLD,
    payload: Annotated[Path, typer.Option(help="payload folder the keys are of")],
    out: OUT,
    split: SPLIT = "0.8,0.1,0.1",
    seed: SEED = 0,
    allow_missing: Annotated[float, typer.Option(help="share of windows to drop whose contexts do not match")] = 0.0,
) -> None:
    """Keep a predecessor's keys and take the payload's targets; refused where the contexts are not those keys'."""
    from fastlvm import Payload
    from fastlvm.data import align_windows

    keep_apart(old, out)
    fractions = parse_split(split)
    _save(align_windows(old, Payload.open(payload), split=fractions, seed=seed, allow_missing=allow_missing), out)


@command(windows_app, "remap", "fastlvm windows remap eval.npz --payload payload --out windows.npz --split 0,0,1")
def windows_remap(
    old: OLD,
    payload: Annotated[Path, typer.Option(help="payload folder the vectors are of")],
    out: OUT,
    split: SPLIT = "0.8,0.1,0.1",
    seed: SEED = 0,
    min_coverage: Annotated[float, typer.Option(help="least share of windows whose vectors are in the payload")] = 0.9,
) -> None:
    """Keep a predecessor's vectors and find the keys they have in the payload; windows without any are dropped."""
    from fastlvm import Payload
    from fastlvm.data import remap_windows

    keep_apart(old, out)
    fractions = parse_split(split)
    _save(remap_windows(old, Payload.open(payload), split=fractions, seed=seed, min_coverage=min_coverage), out)


def _save(found: Rekeyed, out: Path) -> None:
    found.windows.save(out)
    _print_windows(found.windows)
    typer.echo(str(found))


@command(windows_app, "export", "fastlvm windows export windows.npz --payload payload --split test --out old.npz")
def windows_export(
    windows: Annotated[Path, typer.Argument(help="windows .npz")],
    payload: Annotated[Path, typer.Option(help="payload folder")],
    out: OUT,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
) -> None:
    """Write one split in the predecessor's layout: vectors instead of rows."""
    from fastlvm import Payload, Windows

    keep_apart(windows, out)
    table = Windows.open(windows)
    table.export_predecessor(out, Payload.open(payload), split)
    typer.echo(f"{len(table.rows(split))} windows written to {out}")


@command(windows_app, "verify", "fastlvm windows verify windows.npz --payload payload")
def windows_verify(
    windows: Annotated[Path, typer.Argument(help="windows .npz")],
    payload: Annotated[Path, typer.Option(help="payload folder")],
) -> None:
    """Check that contexts and targets are the payload's own rows."""
    from fastlvm import Payload, Windows

    typer.echo(str(Windows.open(windows).verify(Payload.open(payload))))
