"""Windows with the vectors that a file holds, whatever they are keyed to: to find out what they are."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastlvm.data import npz, pickles
from fastlvm.data.payload import Payload
from fastlvm.data.windows import Windows
from fastlvm.errors import InputError, IntegrityError

CONTEXTS = ("context_sequences", "contexts", "sequences", "train_context_sequences")
TARGETS = ("target_vectors", "targets", "train_target_vectors")
"""Names that the predecessor's window files have for their two arrays."""

BLOCK = 2048
"""Windows in a block."""

_FLOATS = ("float16", "float32", "float64")


@dataclasses.dataclass(frozen=True, eq=False)
class HeldWindows:
    """Windows of a file, the predecessor's or ours, and a way to their vectors.

    kind: "predecessor", with vectors inside, or "windows", with rows of a payload. count, context (chunks before the
    target) and dim say how large they are. keys: int64 [count, 2], (article, chunk) of the targets as the file says,
    None where it does not. split: uint8 [count], an index into SPLITS, None in the predecessor's. payload_id: what the
    file says it belongs to, or None. source: where it says it comes from, in words.
    """

    path: Path
    kind: Literal["windows", "predecessor"]
    count: int
    context: int
    dim: int
    keys: np.ndarray | None
    split: np.ndarray | None
    payload_id: str | None
    source: str
    _payload: Payload = dataclasses.field(repr=False)
    _rows: np.ndarray | None = dataclasses.field(default=None, repr=False)  # [count, context + 1], of ours
    _names: tuple[str, str] = dataclasses.field(default=("", ""), repr=False)  # of contexts and targets, in the other

    @classmethod
    def open(cls, path: str | os.PathLike[str], payload: Payload) -> HeldWindows:
        """Open a window file of either kind; its vectors are read later, from it or from `payload`.

        Windows that are another payload's, or whose keys are wrong, are opened like any. Raises InputError for a file
        of neither kind or of another dimension, IntegrityError for a damaged one or rows that the payload has not.
        """
        with npz.Archive(path) as archive:
            if "meta" not in archive:
                return cls._theirs(archive, payload)
        return cls._ours(Windows.open(path), Path(path), payload)

    @classmethod
    def predecessor(cls, path: str | os.PathLike[str], payload: Payload) -> HeldWindows:
        """`open`, for what needs the file's own vectors: InputError for a window file of ours."""
        held = cls.open(path, payload)
        if held.kind == "windows":
            raise InputError(
                f"{path} is a window file of fastlvm, with rows of a payload in place of contexts and targets: "
                "one of the predecessor's is wanted, or what fastlvm windows export makes of it"
            )
        return held

    @classmethod
    def _ours(cls, windows: Windows, path: Path, payload: Payload) -> HeldWindows:
        rows, keys, split = windows.arrays()
        if rows.size and rows.max() >= len(payload):
            raise IntegrityError(
                f"{path} names row {rows.max()}, and payload {payload.path} has {len(payload)} rows: "
                f"take the payload with id {windows.payload_id}"
            )
        return cls(
            path, "windows", len(rows), windows.context, payload.dim, keys.astype(np.int64), split,
            windows.payload_id, windows.source, payload, rows,
        )  # fmt: skip

    @classmethod
    def _theirs(cls, archive: npz.Archive, payload: Payload) -> HeldWindows:
        names = _name(archive, "contexts", CONTEXTS), _name(archive, "targets", TARGETS)
        count, context = _check_shapes(archive, *names, payload)
        record = _provenance(archive)
        build = None if record is None else record.get("payload_build_id")
        return cls(
            archive.path, "predecessor", count, context, payload.dim, _truth_keys(archive, count), None,
            None if build is None else str(build), _source(archive, record), payload, None, names,
        )  # fmt: skip

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[slice, np.ndarray]]:
        """Which windows, and their vectors as stored, context first: float32 [b, context + 1, dim], b ≤ `size`."""
        first = 0
        for piece in self._pieces(size):
            yield slice(first, first + len(piece)), piece
            first += len(piece)

    def _pieces(self, size: int) -> Iterator[np.ndarray]:
        if self._rows is not None:
            for first in range(0, self.count, size):
                yield self._payload.take(self._rows[first : first + size])
            return
        with npz.Archive(self.path) as archive:
            contexts, targets = (archive.blocks(name, size) for name in self._names)
            for head, last in zip(contexts, targets, strict=True):
                yield np.concatenate([head, last[:, None]], axis=1, dtype=np.float32)

    def take(self, indices: Any) -> np.ndarray:
        """Vectors of windows, by their place in the file: float32 [m, context + 1, dim].

        indices: whole numbers [m] that do not fall; a predecessor's file is read up to the last. Raises InputError.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        rising = wanted.ndim == 1 and (np.diff(wanted) >= 0).all()
        if not rising or (wanted.size and (wanted[0] < 0 or wanted[-1] >= self.count)):
            raise InputError(f"indices of windows of {self.path} want to be sorted and from 0 to {self.count - 1}")
        if self._rows is not None:
            return self._payload.take(self._rows[wanted])
        found = np.empty((len(wanted), self.context + 1, self.dim), np.float32)
        done = 0
        for part, piece in self.blocks():
            here = slice(done, int(np.searchsorted(wanted, part.stop)))
            found[here] = piece[wanted[here] - part.start]
            done = here.stop
            if done == len(wanted):
                break
        return found


def find(archive: npz.Archive, aliases: tuple[str, ...]) -> str | None:
    """The first of `aliases` that the archive has."""
    return next((name for name in aliases if name in archive), None)


def _name(archive: npz.Archive, what: str, aliases: tuple[str, ...]) -> str:
    name = find(archive, aliases)
    if name is None:
        raise InputError(
            f"{archive.path} has no {what}: it has {', '.join(sorted(archive.names))}, "
            f"and wants one of {', '.join(aliases)}"
        )
    return name


def _check_shapes(archive: npz.Archive, contexts: str, targets: str, payload: Payload) -> tuple[int, int]:
    (shape, dtype), (target_shape, target_dtype) = archive.header(contexts), archive.header(targets)
    floats = dtype.name in _FLOATS and target_dtype.name in _FLOATS
    if len(shape) != 3 or 0 in shape or not floats or target_shape != (shape[0], shape[2]):
        raise InputError(
            f"{archive.path} has {contexts} {dtype} {list(shape)} and {targets} {target_dtype} {list(target_shape)}, "
            "and wants floats [n, context, dim] and [n, dim]"
        )
    if shape[2] != payload.dim:
        raise InputError(
            f"{archive.path} has vectors of {shape[2]} dimensions, and payload {payload.path} {payload.dim}"
        )
    return shape[0], shape[1]


def _truth_keys(archive: npz.Archive, count: int) -> np.ndarray | None:
    if "truth_keys" not in archive:
        return None
    keys = archive.array("truth_keys")
    if keys.shape != (count, 2) or keys.dtype.kind not in "iu":
        raise InputError(
            f"{archive.path} has truth_keys {keys.dtype} {list(keys.shape)}, and wants whole numbers [{count}, 2]"
        )
    return keys.astype(np.int64)


def _provenance(archive: npz.Archive) -> dict[str, Any] | None:
    """The record of a file that has one; {} where it has none, None where it is not JSON text."""
    if "provenance" not in archive:
        return {}
    raw = archive.array("provenance", objects=pickles.read)
    text = raw.reshape(-1)[0] if raw.size else ""
    try:
        record = json.loads(text) if isinstance(text, str) else None
    except json.JSONDecodeError:
        record = None
    return record if isinstance(record, dict) else None


def _source(archive: npz.Archive, record: dict[str, Any] | None) -> str:
    """What the file says of its own origin, shortened; anything that is not JSON text is named, not kept."""
    if record is None:
        said = "provenance not readable"
    else:
        names = ("embedder_id", "payload_build_id", "data_source")
        said = "; ".join(f"{name} {record[name]}"[:200] for name in names if record.get(name))
    return f"imported from {archive.path.name}" + (f" ({said})" if said else "")
