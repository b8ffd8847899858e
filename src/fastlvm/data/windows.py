"""Windows: runs of consecutive chunks of one article, as rows of a payload, split by article."""

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
from fastlvm.data.payload import Payload
from fastlvm.data.provenance import now, version
from fastlvm.data.split import ALIASES, SPLITS, check_fractions, split_articles
from fastlvm.errors import InputError, IntegrityError
from fastlvm.files import atomic_file, sha256_json

_FORMAT = "fastlvm-windows-1"


class Windows:
    """Rows [n, context + 1] of a payload (context first, target last), each window in one of three splits.

    Attributes: payload_id, context, splits, seed, fractions (of the articles; None where a split was given), source,
    created_at, id (16 hex digits over everything that names a window or its split), path (where it was read or saved).
    """

    splits = SPLITS

    def __init__(
        self,
        payload_id: str,
        rows: np.ndarray,
        keys: np.ndarray,
        split: np.ndarray,
        *,
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
        for array in (self._rows, self._keys, self._split):
            array.flags.writeable = False
        self.context = self._rows.shape[1] - 1
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
        """16 hex digits over the payload's id, the rows, the truth keys and the split."""
        arrays = {
            name: hashlib.sha256(array.astype(kind).tobytes()).hexdigest()
            for name, array, kind in (
                ("rows", self._rows, "<i8"),
                ("keys", self._keys, "<i4"),
                ("split", self._split, "u1"),
            )
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
        works: np.ndarray | None = None,
    ) -> Windows:
        """Every run of context + 1 consecutive chunks of one article, in key order.

        split: fractions of the *articles* that have a window, for train, validation and test. The articles are ordered
        by a hash of seed and number; a split whose fraction is above 0 gets at least one where there are enough.
        works: int [N], the work that each row of the payload belongs to, say the novel of a chapter: all articles of a
        work are then in one split, and the fractions are of works.
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
        codes = split_articles(truth[:, 0] if works is None else _works(works, payload)[rows[:, -1]], fractions, seed)
        return cls(payload.id, rows, truth, codes, seed=int(seed), fractions=fractions, source="fastlvm windows build")

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

    def articles(self, split: str) -> np.ndarray:
        """The articles of a split, sorted: int32 [m]."""
        return np.unique(self.keys(split)[:, 0])

    def article_overlap(self) -> int:
        """How many articles are in more than one split; 0, or the evaluation sees what training saw."""
        pairs = np.unique(np.column_stack([self._keys[:, 0], self._split]), axis=0)
        return int(len(pairs) - len(np.unique(pairs[:, 0])))

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
            "source": self.source,
            "version": version(),
            "created_at": self.created_at,
        }
        with atomic_file(path) as temporary, npz.Writer(temporary, compress=True) as writer:
            writer.array("rows", self._rows.astype("<i4"))
            writer.array("truth_keys", self._keys.astype("<i4"))
            writer.array("split", self._split)
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
        fractions = meta["fractions"]
        windows = cls(
            meta["payload_id"],
            rows,
            keys,
            split,
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

        found = predecessor.import_windows(path, payload)
        fractions = None if isinstance(split, str) else check_fractions(split)
        if isinstance(split, str):
            name = ALIASES.get(split, split)
            if name not in SPLITS:
                raise InputError(f"split is {split!r}, and wants fractions or one of {', '.join(SPLITS)}")
            codes = np.full(len(found.rows), SPLITS.index(name), np.uint8)
        else:
            codes = split_articles(found.keys[:, 0], check_fractions(split), seed)
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


def _works(works: np.ndarray, payload: Payload) -> np.ndarray:
    found = np.asarray(works)
    if found.shape != (len(payload),) or not np.issubdtype(found.dtype, np.integer):
        raise InputError(f"works is {found.dtype} {list(found.shape)}, and wants an integer per row, [{len(payload)}]")
    pairs = np.unique(np.column_stack([payload.keys[:, 0], found]), axis=0)
    twice = pairs[1:, 0][pairs[1:, 0] == pairs[:-1, 0]]
    if len(twice):
        raise InputError(f"works puts article {twice[0]} into more than one work: give all of its rows the same number")
    return found
