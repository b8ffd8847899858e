"""Groups of articles that belong together, say the chapters of a novel: from titles, or from a column of a file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from fastlvm.data import texts
from fastlvm.data.payload import Payload
from fastlvm.errors import InputError, shown

TITLE_PREFIX = "title-prefix"

_AFTER_PREFIX = re.compile(r"(?<=\S)(?: \[| \(| ?: | [-–—] ).*")


def group_rows(payload: Payload, by: str, path: str | os.PathLike[str] | None = None) -> np.ndarray:
    """The group of each row of a payload: int32 [N], numbered from 0 in the order of their names.

    by: "title-prefix", the start of an article's title; or a column of `path`, a .parquet, .jsonl or .jsonl.gz file
    that has `article`, or `row`, beside it. Raises InputError where an article has no group, or two.
    """
    if path is not None:
        return _numbered(_column(Path(path), by, payload), payload)
    if by != TITLE_PREFIX:
        raise InputError(f"group_by is {by!r}, and wants {TITLE_PREFIX}, or a column and the file that has it (groups)")
    return _numbered(_title_prefixes(payload), payload)


def title_prefix(title: str) -> str:
    """A title up to the first " [", " (", ": " or dash between spaces: what the parts of one work share."""
    return _AFTER_PREFIX.sub("", " ".join(title.split()))


def check_groups(groups: Any, payload: Payload) -> np.ndarray:
    """`groups` as int32 [N], one a row of the payload and one an article. Raises InputError."""
    found = np.asarray(groups)
    if found.shape != (len(payload),) or found.dtype.kind not in "iu":
        raise InputError(f"groups is {found.dtype} {list(found.shape)}, and wants an integer per row, [{len(payload)}]")
    most = np.iinfo(np.int32).max
    if found.min() < 0 or found.max() > most:
        raise InputError(f"groups go from {found.min()} to {found.max()}, and want numbers from 0 to {most}")
    found = found.astype(np.int32)
    pairs = np.unique(np.column_stack([payload.keys[:, 0], found]), axis=0)
    twice = pairs[1:, 0][pairs[1:, 0] == pairs[:-1, 0]]
    if len(twice):
        raise InputError(f"groups puts article {twice[0]} into more than one group: give its rows the same number")
    return found


def _numbered(names: dict[int, str], payload: Payload) -> np.ndarray:
    articles, counts = np.unique(payload.keys[:, 0], return_counts=True)
    numbers = np.unique([names[int(article)] for article in articles], return_inverse=True)[1]
    return np.repeat(numbers.reshape(-1).astype(np.int32), counts)


def _title_prefixes(payload: Payload) -> dict[int, str]:
    articles, firsts = np.unique(payload.keys[:, 0], return_index=True)
    titles = {int(article): payload.title(int(row)) for article, row in zip(articles, firsts, strict=True)}
    without = [article for article, title in titles.items() if not (title or "").strip()]
    if without:
        which = "no titles" if len(without) == len(titles) else f"no title for article {without[0]}"
        raise InputError(
            f"payload {payload.path} has {which} ({len(without)} of {len(titles)} articles): build it with texts that "
            "have a title, or group by a column of a file"
        )
    return {article: title_prefix(title or "") for article, title in titles.items()}


def _column(path: Path, column: str, payload: Payload) -> dict[int, str]:
    """The name of each article's group, from a file with a line per article or per row."""
    columns = texts.read_columns(path, ("article", "row", column), column)
    number = next((name for name in ("article", "row") if columns.get(name)), None)
    if number is None:
        raise InputError(f"{path} has neither article nor row beside {column}: add the one that {column} belongs to")
    names: dict[int, str] = {}
    for line, (at, value) in enumerate(zip(columns[number], columns[column], strict=True)):
        where = f"{path} row {line}"
        if type(at) is not int or (number == "row" and not 0 <= at < len(payload)):
            wants = "a whole number" if number == "article" else f"a row of the payload, 0 to {len(payload) - 1}"
            raise InputError(f"{where} has {number} {shown(at)}, and wants {wants}")
        if type(value) not in (str, int):
            raise InputError(f"{where} has {column} {shown(value)}, and wants a string or a whole number")
        article = int(payload.keys[at, 0]) if number == "row" else at
        if names.setdefault(article, str(value)) != str(value):
            raise InputError(
                f"{where} puts article {article} into {column} {shown(value)}, and an earlier one into "
                f"{shown(names[article])}: give an article one group"
            )
    without = np.setdiff1d(payload.keys[:, 0], np.fromiter(names, np.int64, len(names)))
    if len(without):
        raise InputError(
            f"{path} has no {column} for article {without[0]} of payload {payload.path} "
            f"({len(without)} such articles): give every article one"
        )
    return names
