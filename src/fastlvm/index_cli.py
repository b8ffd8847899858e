"""The commands of `fastlvm index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlvm.console import command, print_index, read_array
from fastlvm.files import check_new_folder

index_app = typer.Typer(help="Search indexes over a payload.", no_args_is_help=True)


@command(index_app, "build", "fastlvm index build payload --kind auto --recall 0.95 --space run --out index")
def index_build(
    payload: Annotated[Path, typer.Argument(help="payload folder")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    kind: Annotated[str, typer.Option(help="auto, flat, ivf_flat, ivf_sq8, hnsw or ivf_rabitq")] = "auto",
    space: Annotated[Path | None, typer.Option(help="run folder or space file the vectors are moved by")] = None,
    recall: Annotated[float, typer.Option(help="recall@50 against exact search to reach")] = 0.95,
    nlist: Annotated[int | None, typer.Option(help="inverted lists, measured when absent")] = None,
    nprobe: Annotated[int | None, typer.Option(help="lists probed, measured when absent")] = None,
    seed: Annotated[int, typer.Option(help="seed of the training sample and of the queries")] = 0,
) -> None:
    """Build an index over every chunk of a payload, as quick as the wanted recall allows."""
    from fastlvm import Index, Payload, Space

    check_new_folder(out)
    moved = Space.load(space / "space.safetensors" if space.is_dir() else space) if space else None
    index = Index.build(
        Payload.open(payload), kind=kind, space=moved, nlist=nlist, nprobe=nprobe, recall=recall, seed=seed
    )
    index.save(out)
    print_index(index)
    typer.echo(f"{index.kind} index of {len(index)} rows ({index.options or 'exact'}) written to {out}")


@command(index_app, "add", "fastlvm index add index --vectors v.npy --keys k.npy")
def index_add(
    folder: Annotated[Path, typer.Argument(help="index folder")],
    vectors: Annotated[Path, typer.Option(help="float .npy of rows x dim, as the encoder makes them")],
    keys: Annotated[Path, typer.Option(help="integer .npy of rows x 2: article, chunk")],
) -> None:
    """Add rows to an index; they are on disk when this ends."""
    from fastlvm import Index

    index = Index.open(folder)
    ids = index.add(read_array(vectors, "--vectors"), read_array(keys, "--keys"))
    typer.echo(f"{len(ids)} rows added to {folder}, which has {len(index)}")


@command(index_app, "remove", "fastlvm index remove index --keys k.npy")
def index_remove(
    folder: Annotated[Path, typer.Argument(help="index folder")],
    keys: Annotated[Path, typer.Option(help="integer .npy of rows x 2: article, chunk")],
) -> None:
    """Remove rows from an index; that is on disk when this ends."""
    from fastlvm import Index

    index = Index.open(folder)
    count = index.remove(read_array(keys, "--keys"))
    typer.echo(f"{count} rows removed from {folder}, which has {len(index)}")


@command(index_app, "verify", "fastlvm index verify index")
def index_verify(folder: Annotated[Path, typer.Argument(help="index folder")]) -> None:
    """Check the SHA-256 of every file and every record of the journal."""
    from fastlvm import Index

    found = Index.verify(folder)
    typer.echo(
        f"ok: {found.rows} rows ({found.added} added, {found.removed} removed), hashes hold, "
        f"{found.records} records in the journal"
    )
    if found.unfinished:
        typer.echo(f"note: {found.unfinished} bytes of a change that was broken off before it was acknowledged")
