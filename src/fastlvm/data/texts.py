"""Texts and titles that go with a payload's rows: taken in, written as `texts.parquet`, read back row by row."""

from __future__ import annotations

import functools
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlvm.errors import InputError, IntegrityError

_GROUP = 4096
"""Rows in a row group: what one read of a text decodes."""

COLUMNS = ("row", "article", "chunk", "title", "text")

Strings = Sequence["str | None"]


def collect(texts: Any, titles: Any, keys: np.ndarray) -> tuple[Strings, Strings] | None:
    """Texts and titles in the order of `keys` [N, 2], or None where neither is given.

    texts: N strings, or the path of a .parquet, .jsonl or .jsonl.gz file with a column `text` and, where it has them,
    `title`, `row`, `article` and `chunk`; the last three have to agree with the rows of keys.
    titles: N strings, or a mapping from article to title. Raises InputError naming the row.
    """
    found_titles: Strings = [None] * len(keys)
    found: Strings
    if texts is None:
        if titles is None:
            return None
        found = [None] * len(keys)
    elif isinstance(texts, (str, os.PathLike)):
        found, found_titles = _from_file(Path(texts), keys)
    else:
        found = _strings(texts, "texts", len(keys))
    if isinstance(titles, Mapping):
        found_titles = _strings([titles.get(int(article)) for article in keys[:, 0]], "titles", len(keys))
    elif titles is not None:
        found_titles = _strings(titles, "titles", len(keys))
    return found, found_titles


def _strings(values: Any, name: str, rows: int) -> Strings:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise InputError(f"{name} is {type(values).__name__}, and wants one string a row")
    if len(values) != rows:
        raise InputError(f"{name} has {len(values)} entries for {rows} rows: one a row is wanted")
    listed = values.tolist() if isinstance(values, np.ndarray) else values
    for row, value in enumerate(listed):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{name} row {row} is {type(value).__name__}, and wants a string")
        if value is not None and not _encodes(value):
            raise InputError(f"{name} row {row} holds characters that UTF-8 cannot store: clean the text")
    return listed


def _encodes(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_file(path: Path, keys: np.ndarray) -> tuple[Strings, Strings]:
    columns = read_columns(path, COLUMNS, "text")
    count = len(columns["text"])
    if count != len(keys):
        raise InputError(f"{path} has {count} texts for {len(keys)} vectors: one text a vector is wanted")
    expected = {"row": range(len(keys)), "article": keys[:, 0], "chunk": keys[:, 1]}
    for name, wanted in expected.items():
        if not columns.get(name):
            continue
        for row, (got, want) in enumerate(zip(columns[name], wanted, strict=True)):
            if isinstance(got, bool) or got != want:
                raise InputError(
                    f"{path} row {row} has {name} {got!r}, and the vectors there have {name} {want}: "
                    "put texts and vectors in one order"
                )
    texts = _strings(columns["text"], f"{path} text", count)
    titles = _strings(columns["title"], f"{path} title", count) if columns.get("title") else [None] * count
    return texts, titles


def read_columns(path: Path, names: Sequence[str], required: str) -> dict[str, list[Any]]:
    """Those columns of `names` that a .parquet, .jsonl or .jsonl.gz file has, as Python values. Raises InputError.

    required: the one that it has to have. A column that a .jsonl lacks is empty.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: name a .parquet, .jsonl or .jsonl.gz file with a column {required}")
    if path.name.endswith(".parquet"):
        return _read_parquet(path, names, required)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl(path, names, required)
    raise InputError(f"{path} has an ending that is not known: .parquet, .jsonl or .jsonl.gz is wanted")


def _read_parquet(path: Path, names: Sequence[str], required: str) -> dict[str, list[Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        there = [name for name in dict.fromkeys(names) if name in file.schema_arrow.names]
        if required not in there:
            known = ", ".join(file.schema_arrow.names) or "none"
            raise InputError(f"{path} has no column {required}: it has {known}")
        return file.read(columns=there).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a parquet file that can be read ({_one_line(error)})") from error


def _read_jsonl(path: Path, names: Sequence[str], required: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in names}
    present: set[str] | None = None
    row = 0
    try:
        with _opener(path)(path, "rt", encoding="utf-8") as lines:
            for row, line in enumerate(lines):
                record = json.loads(line)
                if not isinstance(record, dict) or record.get(required) is None:
                    raise InputError(f"{path} row {row} has no `{required}`: one JSON object a line is wanted")
                here = record.keys() & columns.keys()
                present = here if present is None else present
                if here != present:
                    odd = ", ".join(sorted(here ^ present))
                    raise InputError(
                        f"{path} row {row} differs from row 0 in having {odd}: give every row the same fields"
                    )
                for name in here:
                    columns[name].append(record[name])
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} row {row} is not valid JSON ({_one_line(error)})") from error
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(f"{path} cannot be read past row {row} ({_one_line(error)})") from error
    return columns


def _opener(path: Path) -> Callable[..., Any]:
    return gzip.open if path.name.endswith(".gz") else open


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def write(path: Path, texts: Strings, titles: Strings, keys: np.ndarray, order: np.ndarray) -> None:
    """Write rows `order` of texts and titles as the rows of `keys` [N, 2]: parquet, zstd, columns as in COLUMNS."""
    import pyarrow
    import pyarrow.parquet

    kinds = (pyarrow.int32(), pyarrow.int32(), pyarrow.int32(), pyarrow.string(), pyarrow.string())
    schema = pyarrow.schema(list(zip(COLUMNS, kinds, strict=True)))
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for first in range(0, len(keys), _GROUP):
            part = slice(first, min(first + _GROUP, len(keys)))
            rows = order[part]
            values = (
                np.arange(part.start, part.stop, dtype=np.int32),
                keys[part, 0],
                keys[part, 1],
                [titles[row] for row in rows],
                [texts[row] for row in rows],
            )
            arrays = [pyarrow.array(value, kind) for value, kind in zip(values, kinds, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


class Texts:
    """The texts of a payload, read a row group at a time; the last few groups are kept."""

    def __init__(self, path: Path, rows: int) -> None:
        """Open `path` and check its columns and row count. Raises IntegrityError."""
        import pyarrow
        import pyarrow.parquet

        self._path = path
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        meta = self._file.metadata
        missing = [name for name in COLUMNS if name not in self._file.schema_arrow.names]
        if missing:
            raise IntegrityError(f"{path} has no column {missing[0]}: restore it or build the payload again")
        if meta.num_rows != rows:
            raise IntegrityError(
                f"{path} has {meta.num_rows} rows, and the payload {rows}: restore it or build the payload again"
            )
        sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._group = functools.lru_cache(maxsize=8)(self._read)

    def row(self, row: int) -> tuple[str | None, str | None]:
        """Text and title of a row."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        texts, titles = self._group(group)
        at = row - int(self._starts[group])
        return texts[at].as_py(), titles[at].as_py()

    def key_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, int [n, 3] of row, article, chunk), a row group at a time; decodes the texts as well."""
        import pyarrow

        for group, first in enumerate(self._starts[:-1]):
            try:
                table = self._file.read_row_group(group, columns=list(COLUMNS))
                table.validate(full=True)
                found = [table.column(name).to_numpy() for name in COLUMNS[:3]]
            except (pyarrow.ArrowException, OSError) as error:
                raise self._damaged(error) from error
            yield int(first), np.stack(found, axis=1)

    def _read(self, group: int) -> tuple[Any, Any]:
        import pyarrow

        try:
            table = self._file.read_row_group(group, columns=["text", "title"])
        except (pyarrow.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        return table.column("text"), table.column("title")

    def _damaged(self, error: BaseException) -> IntegrityError:
        return IntegrityError(f"{self._path} is damaged ({_one_line(error)}): restore it or build the payload again")
