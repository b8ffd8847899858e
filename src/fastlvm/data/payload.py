"""A payload: one folder of chunk vectors in reading order, with their keys, texts and provenance."""

from __future__ import annotations

import errno
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from fastlvm.data import rows as table
from fastlvm.data import texts as text_files
from fastlvm.data.npz import map_array
from fastlvm.data.provenance import Provenance, now, version
from fastlvm.errors import InputError, IntegrityError
from fastlvm.files import atomic_folder, read_json, sha256_file, write_json

VECTORS, KEYS, TEXTS, RECORD = "vectors.npy", "keys.npy", "texts.parquet", "payload.json"
_SAMPLE = Path(__file__).parent / "sample"


class Payload:
    """Chunk vectors [N, dim] with keys [N, 2] = (article, chunk), sorted by key, and the texts they stand for.

    Attributes: path; vectors, a read-only memory map of float16 or float32; keys, int32; provenance; id; dim.
    """

    def __init__(self, path: Path, vectors: np.memmap, keys: np.ndarray, provenance: Provenance) -> None:
        self.path = path
        self.vectors = vectors
        self.keys = keys
        self.provenance = provenance
        self.id = provenance.payload_id
        self.dim = provenance.dim

    @property
    def notices(self) -> list[str]:
        """What was changed or found when the payload was built, as sentences."""
        return list(self.provenance.notices)

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"Payload({str(self.path)!r}, id={self.id}, rows={len(self)}, dim={self.dim})"

    @classmethod
    def build(
        cls,
        dir: str | os.PathLike[str],
        vectors: Any,
        keys: Any,
        texts: Any = None,
        titles: Any = None,
        *,
        encoder: str,
        source: str = "",
        normalise: bool = True,
        tool: str = "fastlvm payload build",
        notices: tuple[str, ...] = (),
    ) -> Payload:
        """Check `vectors` [N, dim] and integer `keys` [N, 2], write them to the new folder `dir` and open it.

        vectors: float16 is stored as it is, float32 and float64 as float32; a memory map is read in blocks. Each row is
        scaled to length 1, except those that have it already within the dtype's rounding; normalise=False leaves
        all of them. texts: N strings, or a .parquet, .jsonl or .jsonl.gz file; titles: N strings, or {article: title}.
        encoder: name of what made the vectors. source: where the texts come from. tool, notices: for importers.

        Rows out of key order are sorted, texts with them; a row repeated whole is dropped; both leave a notice.
        Raises InputError, naming the row, for NaN, infinity, a zero vector, a key that stands for two vectors, keys
        out of int32 or texts that do not match; nothing is written then.
        """
        if not isinstance(encoder, str) or not encoder.strip():
            raise InputError(f"encoder is {encoder!r}, and wants the name of what made the vectors")
        vectors = table.check_vectors(vectors)
        keys = table.check_keys(keys, len(vectors))
        lengths = _check_lengths(table.norms(vectors), vectors)
        strings = text_files.collect(texts, titles, keys)
        said = list(notices)

        order = _key_order(keys, said)
        kept = _unrepeated(vectors, keys[order], order, strings, said)
        dropped = len(order) - len(kept)
        order, keys = kept, keys[kept]
        off = np.abs(lengths - 1) > table.TOLERANCE[vectors.dtype.name]
        scaled = int(np.count_nonzero(off[order])) if normalise else 0
        if scaled:
            said.append(f"{scaled} of {len(order)} vectors were scaled to length 1.")
        off &= normalise

        with atomic_folder(dir) as folder:
            duplicates = _write_vectors(folder / VECTORS, vectors, order, np.where(off, lengths, 1.0))
            np.save(folder / KEYS, keys, allow_pickle=False)
            if strings is not None:
                text_files.write(folder / TEXTS, *strings, keys, order)
            if duplicates:
                said.append(
                    f"{duplicates} vectors equal that of an earlier key: they are kept, and a search lists them once."
                )
            stored = _stored_dtype(vectors)
            record = Provenance(
                encoder=encoder,
                dim=vectors.shape[1],
                norm="l2_once" if normalise else "as_given",
                metric="ip",
                rows=len(order),
                dtype=stored.name,
                vectors_sha256=sha256_file(folder / VECTORS),
                keys_sha256=sha256_file(folder / KEYS),
                texts_sha256=None if strings is None else sha256_file(folder / TEXTS),
                source=source,
                tool=tool,
                version=version(),
                created_at=now(),
                normalised=scaled,
                dropped=dropped,
                duplicates=duplicates,
                notices=said,
            )
            write_json(folder / RECORD, record.to_dict())
        return cls.open(dir)

    @classmethod
    def open(cls, dir: str | os.PathLike[str]) -> Payload:
        """Open a payload folder, reading its record and keys but not its vectors.

        Raises InputError for a folder that is no payload, IntegrityError where files are missing, truncated or not
        those of the record. `verify` checks every byte.
        """
        path = Path(dir)
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise InputError(f"{path} {what}: name a payload folder, made by fastlvm payload build")
        if not (path / RECORD).is_file():
            raise InputError(f"{path} is not a payload, it has no {RECORD}: make one with fastlvm payload build")
        try:
            raw = read_json(path / RECORD)
        except InputError as error:
            raise IntegrityError(str(error)) from error
        record = Provenance.from_dict(raw, path / RECORD)
        if record.dtype not in ("float16", "float32"):
            raise IntegrityError(f"{path / RECORD} has dtype {record.dtype!r}, and wants float16 or float32")
        remedy = "restore it or build the payload again"
        vectors = map_array(path / VECTORS, record.dtype, (record.rows, record.dim), remedy)
        keys = np.array(map_array(path / KEYS, "int32", (record.rows, 2), remedy))
        if (bad := _unsorted(keys)) is not None:
            raise IntegrityError(
                f"{path / KEYS} row {bad} is not after row {bad - 1}: restore it or build the payload again"
            )
        if record.texts_sha256 is not None and not (path / TEXTS).is_file():
            raise IntegrityError(f"{path / TEXTS} is missing: restore it or build the payload again")
        keys.flags.writeable = False
        return cls(path, vectors, keys, record)

    @classmethod
    def sample(cls) -> Payload:
        """The payload that is installed with fastlvm: public-domain texts, 768 dimensions."""
        return cls.open(_SAMPLE)

    def text(self, row: int) -> str | None:
        """Text of a row; None where the payload has none."""
        return self._string(row, 0)

    def title(self, row: int) -> str | None:
        """Title of a row's article; None where the payload has none."""
        return self._string(row, 1)

    def _string(self, row: int, column: int) -> str | None:
        if not 0 <= row < len(self):
            raise InputError(f"row {row} is not in the payload: it has rows 0 to {len(self) - 1}")
        return None if self._texts is None else self._texts.row(int(row))[column]

    @functools.cached_property
    def _texts(self) -> text_files.Texts | None:
        if self.provenance.texts_sha256 is None:
            return None
        return text_files.Texts(self.path / TEXTS, len(self))

    @functools.cached_property
    def _codes(self) -> np.ndarray:
        return table.codes(self.keys)

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """int64 [N]: the smallest row that has the same vector, which for most rows is the row itself."""
        groups = table.duplicate_groups(self.vectors.view(np.ndarray))
        groups.flags.writeable = False
        return groups

    def rows_of(self, keys: Any) -> np.ndarray:
        """Rows of `keys` [..., 2] (article, chunk): int64 [...], -1 where the payload has no such key."""
        wanted = np.asarray(keys)
        if wanted.shape[-1:] != (2,) or wanted.dtype.kind not in "iu":
            raise InputError(f"keys have shape {wanted.shape} and dtype {wanted.dtype}, and want integers [..., 2]")
        inside = np.asarray(((wanted >= 0) & (wanted <= np.iinfo(np.int32).max)).all(axis=-1))
        codes = table.codes(np.where(inside[..., None], wanted, 0))
        rows = np.minimum(np.searchsorted(self._codes, codes), len(self) - 1)
        return np.where(inside & (self._codes[rows] == codes), rows, -1)

    def take(self, rows: Any) -> np.ndarray:
        """Vectors of `rows` (integers of any shape), read and converted: float32 [*rows.shape, dim]."""
        wanted = np.asarray(rows)
        if wanted.dtype.kind not in "iu":
            raise InputError(f"rows have dtype {wanted.dtype}, and want integers")
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise InputError(f"rows go from {wanted.min()} to {wanted.max()}, and the payload has 0 to {len(self) - 1}")
        return self.vectors.view(np.ndarray)[wanted].astype(np.float32, copy=False)

    def verify(self) -> None:
        """Read everything: every vector, every key, every text, every hash. Raises IntegrityError."""
        lengths = table.norms(self.vectors.view(np.ndarray))
        file = self.path / VECTORS
        bad = ~np.isfinite(lengths) | (lengths == 0)
        if self.provenance.norm == "l2_once":
            bad |= ~(np.abs(lengths - 1) <= 2 * table.TOLERANCE[self.provenance.dtype])
        if bad.any():
            row = int(np.argmax(bad))
            raise IntegrityError(
                f"{file} row {row} has norm {lengths[row]:.6g}, and wants 1 "
                f"({np.count_nonzero(bad)} such rows): restore it or build the payload again"
            )
        record = self.provenance
        for name, wanted in (
            (VECTORS, record.vectors_sha256),
            (KEYS, record.keys_sha256),
            (TEXTS, record.texts_sha256),
        ):
            if wanted is not None and sha256_file(self.path / name) != wanted:
                raise IntegrityError(
                    f"{self.path / name} is not the file that {RECORD} describes, its sha256 differs: "
                    "restore it or build the payload again"
                )
        if self._texts is not None:
            for first, found in self._texts.key_blocks():
                rows = np.arange(first, first + len(found))
                wrong = (found != np.column_stack([rows, self.keys[rows]])).any(axis=1)
                if wrong.any():
                    raise IntegrityError(
                        f"{self.path / TEXTS} row {first + int(np.argmax(wrong))} has another key than {KEYS}: "
                        "build the payload again"
                    )


def _check_lengths(lengths: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    bad = ~(np.isfinite(lengths) & (lengths > 0))
    if not bad.any():
        return lengths
    row = int(np.argmax(bad))
    values = vectors[row]
    if np.isnan(values).any():
        what = "holds NaN"
    elif np.isinf(values).any():
        what = "holds infinity"
    elif values.any():
        what = f"has values up to {np.abs(values).max():.3g}, whose norm cannot be computed"
    else:
        what = "is a zero vector"
    raise InputError(f"vectors row {row} {what} ({np.count_nonzero(bad)} such rows): encode it again or leave it out")


def _unsorted(keys: np.ndarray) -> int | None:
    """First row whose key is not after the one before, or None."""
    codes = table.codes(keys)
    wrong = codes[1:] <= codes[:-1]
    return int(np.argmax(wrong)) + 1 if wrong.any() else None


def _key_order(keys: np.ndarray, said: list[str]) -> np.ndarray:
    codes = table.codes(keys)
    if (codes[1:] >= codes[:-1]).all():
        return np.arange(len(keys))
    order = np.argsort(codes, kind="stable")
    said.append(f"{np.count_nonzero(order != np.arange(len(order)))} rows were out of key order and were sorted.")
    return order


def _unrepeated(vectors: np.ndarray, keys: np.ndarray, order: np.ndarray, strings: Any, said: list[str]) -> np.ndarray:
    """`order` without the rows whose key and vector an earlier one has; keys [N, 2] are in that order."""
    codes = table.codes(keys)
    repeats = np.flatnonzero(codes[1:] == codes[:-1]) + 1
    if not len(repeats):
        return order
    starts = np.searchsorted(codes, codes[repeats])
    other_text = 0
    for at, start in zip(repeats, starts, strict=True):
        row, first = int(order[at]), int(order[start])
        if not np.array_equal(vectors[row], vectors[first]):
            article, chunk = keys[at]
            raise InputError(
                f"vectors row {row} has key ({article}, {chunk}), which row {first} has with another vector: "
                "give each chunk its own key"
            )
        other_text += strings is not None and strings[0][row] != strings[0][first]
    said.append(f"{len(repeats)} rows repeated an earlier row's key and vector and were dropped.")
    if other_text:
        said.append(f"{other_text} of the dropped rows had another text than the row that was kept.")
    return np.delete(order, repeats)


def _stored_dtype(vectors: np.ndarray) -> np.dtype[Any]:
    return np.dtype("<f2" if vectors.dtype.name == "float16" else "<f4")


def _write_vectors(path: Path, vectors: np.ndarray, order: np.ndarray, lengths: np.ndarray) -> int:
    """Write rows `order` of vectors, divided by `lengths`; returns how many equal an earlier one."""
    shape = (len(order), vectors.shape[1])
    stored = _stored_dtype(vectors)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=stored, shape=shape)
    _reserve(path)
    for part in table.blocks(*shape):
        rows = order[part]
        block = np.asarray(vectors[rows])
        divisor = lengths[rows]
        if (divisor != 1).any():
            out[part] = np.where(divisor[:, None] == 1, block, block / divisor[:, None]).astype(stored)
        else:
            out[part] = block
    out.flush()
    groups = table.duplicate_groups(out)
    return int(np.count_nonzero(groups != np.arange(len(groups))))


def _reserve(path: Path) -> None:
    """Take the disk's room for a mapped file now: where it is missing, writing to the map would kill the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # file systems that cannot
                raise
