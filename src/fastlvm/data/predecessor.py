"""File formats of the predecessor: pickled payload `.npy`, window `.npz` and ordered export `.npz`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from fastlvm.data import npz, pickles
from fastlvm.data.alignment import SAME, random_pair_cosine, window_keys
from fastlvm.data.held import BLOCK, CONTEXTS, HeldWindows, find
from fastlvm.data.matching import match, row_cosines
from fastlvm.data.payload import Payload
from fastlvm.data.provenance import now, version
from fastlvm.errors import InputError, IntegrityError
from fastlvm.files import atomic_file


def import_payload(path: str | os.PathLike[str], dir: str | os.PathLike[str], *, encoder: str = "unknown") -> Payload:
    """Build the payload `dir` from the predecessor's pickled dict `.npy`, or from its ordered export `.npz`.

    Which one it is, is read from the file's first bytes. The dict is {row id: (text, {"article_index", "chunk_index",
    ...}, float[dim])}; its pickle is read by an unpickler that runs nothing. Raises InputError naming what was
    refused, IntegrityError for a truncated file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: name the predecessor's payload .npy or ordered .npz")
    with path.open("rb") as file:
        start = file.read(6)
    if start[:2] == b"PK":
        return import_ordered(path, dir, encoder=encoder)
    if start != b"\x93NUMPY":
        raise InputError(f"{path} is neither .npy nor .npz: name the predecessor's payload .npy or ordered .npz")
    vectors, keys, texts = _read_dict(path)
    return Payload.build(
        dir, vectors, keys, texts, encoder=encoder, source=path.name, tool="fastlvm payload import",
        notices=("Row ids and cpe_id of the imported file were not kept.",),
    )  # fmt: skip


def _read_dict(path: Path) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
    with path.open("rb") as file:
        shape, _, dtype = npz.read_header(file, str(path))
        if not dtype.hasobject:
            raise InputError(
                f"{path} is a plain array {dtype} {list(shape)}, not the predecessor's payload: "
                "give it to fastlvm payload build --vectors, with its keys"
            )
        if int(np.prod(shape)) != 1:
            raise InputError(f"{path} holds {list(shape)} objects, and one dict is wanted")
        array = pickles.read(file, str(path), path.stat().st_size)
    content = array.reshape(-1)[0] if array.size == 1 else None
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds {type(content).__name__}, and a dict of rows that is not empty is wanted")

    keys = np.empty((len(content), 2), np.int64)
    texts: list[str | None] = []
    vectors: np.ndarray | None = None
    for at, (row_id, entry) in enumerate(content.items()):
        where = f"{path} row {_short(row_id)}"
        if not isinstance(entry, (tuple, list)) or len(entry) != 3 or not isinstance(entry[1], dict):
            raise InputError(f"{where} is no (text, record, vector): this is not the predecessor's payload")
        text, record, vector = entry
        if text is not None and not isinstance(text, str):
            raise InputError(f"{where} has a {type(text).__name__} for its text, and wants a string")
        texts.append(text)
        keys[at] = [_index(record, name, where) for name in ("article_index", "chunk_index")]
        values = _vector(vector, where)
        if vectors is None:
            vectors = np.empty((len(content), len(values)), values.dtype)
        if values.shape != vectors.shape[1:]:
            raise InputError(f"{where} has {len(values)} dimensions, and the first row {vectors.shape[1]}")
        vectors[at] = values
    assert vectors is not None
    return vectors, keys, texts


def _short(value: Any) -> str:
    return repr(value)[:40]


def _index(record: dict[Any, Any], name: str, where: str) -> int:
    value = record.get(name)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and abs(int(value)) < 2**62:
        return int(value)
    raise InputError(f"{where} has {name} {_short(value)}, and wants a whole number")


def _vector(vector: Any, where: str) -> np.ndarray:
    try:
        values = vector.value() if isinstance(vector, pickles.Array) else None
    except Exception as error:
        raise IntegrityError(f"{where} holds a damaged vector ({error}): restore the file") from error
    if values is None or values.ndim != 1 or values.dtype.name not in ("float16", "float32", "float64"):
        what = type(vector).__name__ if values is None else f"{values.dtype} {list(values.shape)}"
        raise InputError(f"{where} has {what} for its vector, and wants floats [dim]")
    return values


def import_ordered(path: str | os.PathLike[str], dir: str | os.PathLike[str], *, encoder: str = "unknown") -> Payload:
    """Build the payload `dir` from the predecessor's ordered export: vectors, article_indices, chunk_indices, texts."""
    notices = ["cpe_ids of the imported file were not kept."]
    with npz.Archive(path) as archive:
        if "vectors" not in archive and find(archive, CONTEXTS):
            raise InputError(f"{archive.path} holds windows, not a payload: import it with fastlvm windows import")
        vectors, articles, chunks = (archive.array(name) for name in ("vectors", "article_indices", "chunk_indices"))
        texts = _strings(archive, "concept_texts", len(vectors))
        titles = _strings(archive, "article_titles", None)
    if articles.ndim != 1 or articles.shape != chunks.shape or {articles.dtype.kind, chunks.dtype.kind} - set("iu"):
        raise InputError(
            f"{path} has article_indices {articles.dtype} {list(articles.shape)} and chunk_indices {chunks.dtype} "
            f"{list(chunks.shape)}, and wants whole numbers [rows]"
        )
    if titles is not None and len(titles) != len(vectors):
        notices.append(f"{len(titles)} article_titles for {len(vectors)} rows were not kept: one a row is wanted.")
        titles = None
    return Payload.build(
        dir, vectors, np.column_stack([articles, chunks]), texts, titles, encoder=encoder, source=Path(path).name,
        tool="fastlvm payload import", notices=tuple(notices),
    )  # fmt: skip


def _strings(archive: npz.Archive, name: str, rows: int | None) -> list[str | None] | None:
    if name not in archive:
        return None
    values = archive.array(name, objects=pickles.read)
    if values.ndim != 1 or values.dtype.kind not in "UO":
        raise InputError(f"{archive.path} has {name} {values.dtype} {list(values.shape)}, and wants strings [rows]")
    if rows is not None and len(values) != rows:
        raise InputError(f"{archive.path} has {len(values)} {name} for {rows} vectors: one a vector is wanted")
    return values.tolist()


@dataclasses.dataclass(frozen=True)
class ImportedWindows:
    """Windows matched to a payload: rows int64 [n, context + 1], keys int32 [n, 2], source in words."""

    rows: np.ndarray
    keys: np.ndarray
    source: str


def import_windows(path: str | os.PathLike[str], payload: Payload) -> ImportedWindows:
    """Match a window .npz to payload rows; see `Windows.import_predecessor`."""
    held = HeldWindows.predecessor(path, payload)
    if held.keys is None:
        rows = match(held, payload)
        return ImportedWindows(rows, payload.keys[rows[:, -1]], held.source)
    rows = payload.rows_of(window_keys(held.keys, held.context))
    _check_by_key(held, rows, payload)
    return ImportedWindows(rows, held.keys.astype(np.int32), held.source)


def _check_by_key(held: HeldWindows, rows: np.ndarray, payload: Payload) -> None:
    cosines = row_cosines(held, rows, payload)
    good = (cosines >= SAME).all(axis=1)  # NaN is not
    if good.all():
        return
    unknown = int(np.count_nonzero((rows < 0).any(axis=1)))
    raise IntegrityError(
        f"{held.path} does not come from payload {payload.path}: {np.count_nonzero(~good)} of {len(rows)} windows hold "
        f"other vectors than their truth keys stand for (first: window {int(np.argmin(good))}; {unknown} with keys "
        f"that the payload has not); target cosine {np.nan_to_num(cosines[:, -1]).mean():.4f}, context cosine "
        f"{np.nan_to_num(cosines[:, :-1]).mean():.4f} (random pairs {random_pair_cosine(payload):.4f}), wants ≥ "
        f"{SAME}: the keys are wrong, or the payload is another one"
    )


def export_windows(path: str | os.PathLike[str], payload: Payload, rows: np.ndarray, keys: np.ndarray) -> None:
    """Write rows int64 [n, context + 1] with keys [n, 2] as vectors in the predecessor's layout, atomically."""
    if not len(rows):
        raise InputError("the split holds no windows: name another one")
    count, context = len(rows), rows.shape[1] - 1
    record = payload.provenance
    provenance = {
        "embedder_id": record.encoder,
        "payload_build_id": f"fastlvm-{payload.id}@sha256:{record.vectors_sha256}",
        "norm": record.norm,
        "metric": record.metric,
        "created_at": now(),
        "creation_tool": f"fastlvm windows export {version()}",
        "data_source": record.source,
    }
    parts = [slice(first, first + BLOCK) for first in range(0, count, BLOCK)]
    with atomic_file(path) as temporary, npz.Writer(temporary) as writer:
        heads = (payload.take(rows[part, :-1]) for part in parts)
        writer.blocks("context_sequences", (count, context, payload.dim), "<f4", heads)
        writer.blocks("target_vectors", (count, payload.dim), "<f4", (payload.take(rows[part, -1]) for part in parts))
        writer.array("truth_keys", keys.astype("<i4"))
        writer.array("context_length", np.int64(context))
        writer.array("num_sequences", np.int64(count))
        writer.array("vector_dim", np.int64(payload.dim))
        writer.array("provenance", np.array([json.dumps(provenance)]))
