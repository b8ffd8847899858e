"""Windows: runs of consecutive chunks of one article, as rows of a payload, split by article or groups of them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlvm.data import npz
from fastlvm.data.alignment import Alignment, check_alignment
from fastlvm.data.groups import check_groups
from fastlvm.data.payload import Payload
from fastlvm.data.provenance import now, version
from fastlvm.data.split import ALIASES, SPLITS, check_fractions, check_split, split_articles, split_numbers
from fastlvm.errors import InputError, IntegrityError, shown
from fastlvm.files import atomic_file, sha256_json

_FORMAT = "fastlvm-windows-1"


class Windows:
    """Rows [n, context + 1] of a payload (context first, target last), each window in one of three splits.

    Attributes: payload_id, context, splits, seed, fractions (of the articles or groups; None where a split was given),
    group_by (what the groups of articles are by, None where there are none), source, created_at, id (16 hex digits over
    everything that names a window, its group or its split), path (where it was read or saved).
    """

    splits = SPLITS

    def __init__(
        self,
        payload_id: str,
        rows: np.ndarray,
        keys: np.ndarray,
        split: np.ndarray,
        *,
        groups: np.ndarray | None = None,
        group_by: str | None = None,
        seed: int = 0,
        fractions: tuple[float, float, float] | None = None,
        source: str = "",
        created_at: str | None = None,
        path: Path | None = None,
    ) -> None:
        self.payload_id = payload_id
        self._rows = np.ascontiguousarray(rows, dtype=np.int64)  # [n, context + 1]
        self._keys = np.ascontiguousarray(keys, dtype=np.int32)  # [n, 2] of the target
        self._split = np.ascontiguousarray(split, dtype=np.uint8)  # [n] index into splits
        self._groups = None if groups is None else np.ascontiguousarray(groups, dtype=np.int32)  # [n]
        for array in (self._rows, self._keys, self._split, self._groups):
            if array is not None:
                array.flags.writeable = False
        self.context = self._rows.shape[1] - 1
        self.group_by = None if groups is None else group_by or "groups"
        self.seed = seed
        self.fractions = fractions
        self.source = source
        self.created_at = created_at or now()
        self.path = path

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}={len(self.rows(name))}" for name in SPLITS)
        return f"Windows(id={self.id}, payload_id={self.payload_id}, context={self.context}, {counts})"

    @functools.cached_property
    def id(self) -> str:
        """16 hex digits over the payload's id, the rows, the truth keys, the split and, if any, the groups."""
        arrays = {
            name: hashlib.sha256(array.astype(kind).tobytes()).hexdigest()
            for name, array, kind in (
                ("rows", self._rows, "<i8"),
                ("keys", self._keys, "<i4"),
                ("split", self._split, "u1"),
                ("groups", self._groups, "<i4"),
            )
            if array is not None
        }
        return sha256_json({"payload_id": self.payload_id, "context": self.context, **arrays})[:16]

    @classmethod
    def build(
        cls,
        payload: Payload,
        context: int = 5,
        split: Sequence[float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        *,
        groups: np.ndarray | None = None,
        group_by: str | None = None,
    ) -> Windows:
        """Every run of context + 1 consecutive chunks of one article, in key order.

        split: fractions of the *articles* that have a window, for train, validation and test. The articles are ordered
        by a hash of seed and number; a split whose fraction is above 0 gets at least one where there are enough.
        groups: int [N], the group that each row of the payload belongs to, say the novel of a chapter, as
        `fastlvm.data.group_rows` finds them: all articles of a group are then in one split, and the fractions are of
        groups. group_by: what they are by, in words.
        Raises InputError for bad arguments, or a payload without a single window.
        """
        if isinstance(context, bool) or not isinstance(context, (int, np.integer)) or context < 1:
            raise InputError(f"context is {context!r}, and wants a whole number of chunks from 1")
        fractions = check_fractions(split)
        keys = payload.keys.astype(np.int64)
        # Keys rise strictly, so a window is whole exactly when its ends are `context` chunks apart in one article.
        first, last = keys[: max(len(keys) - context, 0)], keys[context:]
        whole = (first[:, 0] == last[:, 0]) & (last[:, 1] - first[:, 1] == context)
        starts = np.flatnonzero(whole)
        if not len(starts):
            raise InputError(
                f"payload {payload.path} has no {context + 1} consecutive chunks in any article: lower the context"
            )
        rows = starts[:, None] + np.arange(context + 1)
        truth = payload.keys[rows[:, -1]]
        own = None if groups is None else check_groups(groups, payload)[rows[:, -1]]
        codes = split_articles(truth[:, 0] if own is None else own, fractions, seed)
        return cls(
            payload.id, rows, truth, codes, groups=own, group_by=group_by, seed=int(seed), fractions=fractions,
            source="fastlvm windows build",
        )  # fmt: skip

    def _of(self, split: str) -> np.ndarray:
        name = ALIASES.get(split, split)
        if name not in SPLITS:
            raise InputError(f"split is {split!r}, and wants one of {', '.join(SPLITS)}")
        return self._split == SPLITS.index(name)

    def rows(self, split: str) -> np.ndarray:
        """Payload rows of a split's windows, context first and target last: int64 [n, context + 1]."""
        return self._rows[self._of(split)]

    def keys(self, split: str) -> np.ndarray:
        """Keys (article, chunk) of a split's targets: int32 [n, 2]."""
        return self._keys[self._of(split)]

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All windows in the file's order: rows int64 [n, context + 1], keys int32 [n, 2], split uint8 [n] (its place
        in splits)."""
        return self._rows, self._keys, self._split

    def articles(self, split: str) -> np.ndarray:
        """The articles of a split, sorted: int32 [m]."""
        return np.unique(self.keys(split)[:, 0])

    def article_overlap(self) -> int:
        """How many articles are in more than one split; 0, or the evaluation sees what training saw."""
        return self._overlap(self._keys[:, 0])

    def groups(self, split: str) -> np.ndarray | None:
        """The group of each window of a split: int32 [n], or None where the windows have no groups."""
        chosen = self._of(split)
        return None if self._groups is None else self._groups[chosen]

    def group_overlap(self) -> int | None:
        """How many groups are in more than one split, or None where the windows have no groups."""
        return None if self._groups is None else self._overlap(self._groups)

    def _overlap(self, numbers: np.ndarray) -> int:
        pairs = np.unique(np.column_stack([numbers, self._split]), axis=0)
        return int(np.count_nonzero(np.unique(pairs[:, 0], return_counts=True)[1] > 1))

    def verify(self, payload: Payload, sample: int | None = 1000, seed: int = 0) -> Alignment:
        """The integrity gate: are these windows the payload's own chunks, under the keys they carry?

        Rows are checked against keys for every window; vectors are looked up *by key* and compared for `sample`
        windows (None: all), and have to reach cosine 0.999. Raises IntegrityError with the figures.
        """
        return check_alignment(self, payload, self._rows, self._keys, sample=sample, seed=seed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the windows as .npz, atomically."""
        meta = {
            "format": _FORMAT,
            "id": self.id,
            "payload_id": self.payload_id,
            "context": self.context,
            "windows": len(self),
            "splits": list(SPLITS),
            "seed": self.seed,
            "fractions": None if self.fractions is None else list(self.fractions),
            "group_by": self.group_by,
            "source": self.source,
            "version": version(),
            "created_at": self.created_at,
        }
        with atomic_file(path) as temporary, npz.Writer(temporary, compress=True) as writer:
            writer.array("rows", self._rows.astype("<i4"))
            writer.array("truth_keys", self._keys.astype("<i4"))
            writer.array("split", self._split)
            if self._groups is not None:
                writer.array("groups", self._groups.astype("<i4"))
            writer.array("meta", np.array([json.dumps(meta)]))
        self.path = Path(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Windows:
        """Read and check a window file. Raises InputError for one of another kind, IntegrityError for a damaged one."""
        with npz.Archive(path) as archive:
            where = archive.path
            if "meta" not in archive:
                hint = "import it with fastlvm windows import" if _looks_old(archive) else "name one fastlvm wrote"
                raise InputError(f"{where} is not a window file of fastlvm: {hint}")
            meta = _read_meta(archive)
            rows, keys, split = (archive.array(name) for name in ("rows", "truth_keys", "split"))
            groups = archive.array("groups") if "groups" in archive else None
        remedy = "restore it or build the windows again"
        shapes = rows.ndim == 2 and rows.shape[1] >= 2 and keys.shape == (len(rows), 2) and split.shape == (len(rows),)
        kinds = rows.dtype == np.int32 and keys.dtype == np.int32 and split.dtype == np.uint8
        if not (shapes and kinds):
            raise IntegrityError(
                f"{where} holds rows {rows.dtype} {list(rows.shape)}, truth_keys {keys.dtype} {list(keys.shape)} and "
                f"split {split.dtype} {list(split.shape)}, which do not go together: {remedy}"
            )
        if rows.shape[1] != meta["context"] + 1 or len(rows) != meta["windows"]:
            raise IntegrityError(f"{where} holds {list(rows.shape)} rows, and its record says otherwise: {remedy}")
        if split.size and split.max() >= len(SPLITS):
            raise IntegrityError(
                f"{where} has split {split.max()} in a window, and wants 0 to {len(SPLITS) - 1}: {remedy}"
            )
        if rows.size and (rows.min() < 0 or keys.min() < 0):
            raise IntegrityError(f"{where} has a negative row or key: {remedy}")
        _check_groups(where, groups, len(rows), meta.get("group_by"), remedy)
        fractions = meta["fractions"]
        windows = cls(
            meta["payload_id"],
            rows,
            keys,
            split,
            groups=groups,
            group_by=meta.get("group_by"),
            seed=meta["seed"],
            fractions=None if fractions is None else check_fractions(fractions),
            source=meta["source"],
            created_at=meta["created_at"],
            path=where,
        )
        if windows.id != meta["id"]:
            raise IntegrityError(f"{where} carries id {meta['id']}, and its content gives {windows.id}: {remedy}")
        return windows

    @classmethod
    def import_predecessor(
        cls,
        path: str | os.PathLike[str],
        payload: Payload,
        *,
        split: str | Sequence[float] = (0.8, 0.1, 0.1),
        seed: int = 0,
    ) -> Windows:
        """Windows of the predecessor's .npz, matched to payload rows by key, or by vector where it has no keys.

        split: fractions as in `build`, or the name of the split that takes all. Raises IntegrityError, with the
        figures, unless every vector of every window is the payload's at cosine 0.999.
        """
        from fastlvm.data import predecessor

        wanted = check_split(split)
        found = predecessor.import_windows(path, payload)
        fractions = None if isinstance(wanted, str) else wanted
        codes = split_numbers(found.keys[:, 0], wanted, seed)
        return cls(payload.id, found.rows, found.keys, codes, seed=int(seed), fractions=fractions, source=found.source)

    def export_predecessor(self, path: str | os.PathLike[str], payload: Payload, split: str) -> None:
        """Write a split with its vectors in the predecessor's layout, after `verify`."""
        from fastlvm.data import predecessor

        self.verify(payload)
        predecessor.export_windows(path, payload, self.rows(split), self.keys(split))


def _looks_old(archive: npz.Archive) -> bool:
    return any("context" in name or "sequences" in name for name in archive.names)


def _read_meta(archive: npz.Archive) -> dict[str, Any]:
    where = archive.path
    raw = archive.array("meta")
    try:
        meta = json.loads(str(raw.reshape(-1)[0])) if raw.dtype.kind == "U" and raw.size == 1 else None
    except json.JSONDecodeError:
        meta = None
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise IntegrityError(f"{where} has no record of the layout {_FORMAT}: build the windows again")
    kinds = {
        "id": str,
        "payload_id": str,
        "context": int,
        "windows": int,
        "seed": int,
        "source": str,
        "created_at": str,
    }
    for name, kind in kinds.items():
        if not isinstance(meta.get(name), kind) or isinstance(meta[name], bool):
            raise IntegrityError(f"{where} has {name} = {meta.get(name)!r} in its record: build the windows again")
    if meta.get("splits") != list(SPLITS) or not isinstance(meta.get("fractions"), (list, type(None))):
        raise IntegrityError(f"{where} names other splits than {', '.join(SPLITS)}: build the windows again")
    return meta


def _check_groups(where: Path, groups: np.ndarray | None, count: int, by: Any, remedy: str) -> None:
    """Raises IntegrityError unless there are no groups and no word of them, or one a window and what they are by."""
    if groups is None and by is None:
        return
    if groups is None or not isinstance(by, str) or groups.dtype != np.int32 or groups.shape != (count,):
        held = "none" if groups is None else f"{groups.dtype} {list(groups.shape)}"
        raise IntegrityError(
            f"{where} has groups {held} by {shown(by)}, and wants int32 [{count}] and a string, or neither: {remedy}"
        )
