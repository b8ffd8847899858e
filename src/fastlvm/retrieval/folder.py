"""The folder of an index: what is in it beside the searcher's files, written, read and verified."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastlvm.data import Space
from fastlvm.data.npz import map_array
from fastlvm.errors import IntegrityError
from fastlvm.files import atomic_folder, check_files
from fastlvm.retrieval import record
from fastlvm.retrieval.faiss_file import REMEDY
from fastlvm.retrieval.growth import decoded
from fastlvm.retrieval.journal import Journal
from fastlvm.retrieval.record import Meta
from fastlvm.retrieval.rows import Rows
from fastlvm.retrieval.searcher import Searcher

_KEYS, _GROUPS = "keys.npy", "groups.npy"


@dataclass(frozen=True)
class Verified:
    """What `Index.verify` found to be whole: rows that are there, and how many were added and removed in all.

    records: changes in the journal. unfinished: bytes of one after them that was never acknowledged.
    """

    rows: int
    added: int
    removed: int
    records: int
    unfinished: int


def write(
    folder: str | os.PathLike[str], searcher: Searcher, rows: Rows, meta: Meta, space: Space | None
) -> tuple[Path, str]:
    """A new folder, whole or not at all; its path, and the checksum of its index.json. space: None = the identity."""
    with atomic_folder(folder) as path:
        searcher.save(path)
        np.save(path / _KEYS, rows.keys, allow_pickle=False)
        np.save(path / _GROUPS, rows.groups, allow_pickle=False)
        if rows.removed:
            np.save(path / record.REMOVED, rows.gone, allow_pickle=False)
        if space is not None:
            space.save(path / record.SPACE)
        checksum = record.write(path, replace(meta, added=rows.total - rows.base, removed=rows.removed))
    return Path(folder).absolute(), checksum


def journal(path: Path, checksum: str) -> Journal:
    """The journal of a folder whose index.json has this checksum."""
    return Journal(path.absolute() / record.JOURNAL, bytes.fromhex(checksum))


def read_rows(path: Path, meta: Meta) -> tuple[Rows, np.ndarray]:
    """Rows as they were saved, and the searcher's ids, int64, that stand for none any more. Raises IntegrityError."""
    total = meta.rows + meta.added
    keys = np.array(map_array(path / _KEYS, "int32", (total, 2), REMEDY))
    groups = np.array(map_array(path / _GROUPS, "int64", (meta.rows,), REMEDY))
    _check_groups(path / _GROUPS, groups)
    rows = Rows(keys, groups)
    if not meta.removed:
        return rows, np.empty(0, np.int64)
    gone = np.array(map_array(path / record.REMOVED, "int64", (meta.removed,), REMEDY))
    if not rows.has(gone):
        raise IntegrityError(
            f"{path / record.REMOVED} holds ids that are not 0 to {total - 1}, each once: {record.REMEDY}"
        )
    return rows, rows.remove(gone)


def verify(folder: str | os.PathLike[str]) -> Verified:
    """See `Index.verify`."""
    path = Path(folder)
    found = record.read(path)
    check_files(path, found.files, record.REMEDY)
    rows, _ = read_rows(path, found.meta)
    changes = journal(path, found.checksum)
    records = 0
    for change in changes.read():
        keys, _, gone = decoded(changes, change, rows, found.meta.dim)
        if gone is not None:
            rows.remove(gone)
        elif keys is not None:
            rows.extend(keys)
        records += 1
    return Verified(len(rows), rows.total - rows.base, rows.removed, records, changes.unfinished)


def _check_groups(file: Path, groups: np.ndarray) -> None:
    """Raises IntegrityError unless every row's group is the smallest row of one."""
    rows = np.arange(len(groups))
    good = (groups >= 0) & (groups <= rows)
    good &= groups[np.where(good, groups, 0)] == groups
    if not good.all():
        row = int(np.argmin(good))
        raise IntegrityError(
            f"{file} has row {row} in group {groups[row]}, and the smallest row of one is wanted: {record.REMEDY}"
        )
