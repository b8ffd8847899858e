"""Adding to an index and removing from it: one change at a time, in the journal before it is in memory.

What a record of the journal holds, `first` being the rows that there were before it: an added one keys int32 [m, 2] and
then vectors float32 [m, dim] in the space, a removal ids int64 [m].
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastlvm.data import Space
from fastlvm.data import rows as table
from fastlvm.errors import InputError
from fastlvm.retrieval.journal import Journal, Record
from fastlvm.retrieval.rows import Rows
from fastlvm.retrieval.searcher import Searcher

_ADD, _REMOVE = b"ADD ", b"GONE"
_WARNED = threading.Event()  # of vectors that have not length 1


class Change(NamedTuple):
    """What a record says: rows that are added (keys [m, 2], vectors [m, dim]), or else ids int64 [m] that go."""

    keys: np.ndarray | None
    vectors: np.ndarray | None
    gone: np.ndarray | None


def decoded(journal: Journal, record: Record, rows: Rows, dim: int) -> Change:
    """What a record does to these rows. Raises IntegrityError where it cannot be what follows on them."""
    if record.first != rows.total:
        raise journal.wrong(record.number, f"follows on {record.first} rows, and there are {rows.total}")
    width = {_ADD: 8 + 4 * dim, _REMOVE: 8}.get(record.kind)
    if width is None or not record.rows or width * record.rows != len(record.body):
        raise journal.wrong(record.number, f"has {len(record.body)} bytes for {record.rows} rows of {record.kind!r}")
    if record.kind == _REMOVE:
        gone = np.frombuffer(record.body, "<i8").astype(np.int64)
        if not rows.has(gone):
            raise journal.wrong(record.number, "removes rows that are not there")
        return Change(None, None, gone)
    cut = 8 * record.rows
    keys = np.frombuffer(record.body[:cut], "<i4").reshape(-1, 2).astype(np.int32)
    vectors = np.frombuffer(record.body[cut:], "<f4").reshape(-1, dim).astype(np.float32)
    if keys.min() < 0 or _repeated(keys) is not None or (rows.find(keys) >= 0).any():
        raise journal.wrong(record.number, "adds keys that are there already")
    if not np.isfinite(vectors).all():
        raise journal.wrong(record.number, "adds vectors that are not finite")
    return Change(keys, vectors, None)


class Growth:
    """Changes of one index: its searcher, its rows, and the journal of its folder, where it has one.

    is_ours: whether the folder is still the one that was opened.
    """

    def __init__(self, searcher: Searcher, rows: Rows, space: Space) -> None:
        self._searcher = searcher
        self._rows = rows
        self._space = space
        self._journal: Journal | None = None
        self._is_ours: Callable[[], bool] = lambda: True
        self._one = threading.Lock()
        self._process = os.getpid()
        self._broken = False

    def belongs(self, journal: Journal, is_ours: Callable[[], bool]) -> None:
        """From now on changes are written to this journal; what it holds already is done at once."""
        if self._journal is not None:
            self._journal.close()
        self._journal, self._is_ours = journal, is_ours
        self._replay()

    def close(self) -> None:
        """Let another process or object change the folder."""
        with self._one:
            if self._journal is not None:
                self._journal.close()

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Nothing changes in here. Raises InputError where it cannot be said what there is."""
        if os.getpid() != self._process:  # another thread may have been amid a change, and its lock be held for ever
            raise InputError("this index is of the process that this one was forked from: open it again to change it")
        with self._one:
            if self._broken:
                raise InputError("an earlier change of this index was broken off midway: open it again to go on")
            yield

    def add(self, vectors: Any, keys: Any) -> np.ndarray:
        """See `Index.add`."""
        if np.ndim(vectors) == 2 and len(vectors) == 0 and np.size(keys) == 0:
            return np.empty(0, np.int64)
        given = _checked_vectors(vectors, self._space.dim)
        keys = table.check_keys(keys, len(given))
        if (twice := _repeated(keys)) is not None:
            raise InputError(f"keys has {_named(keys[twice])} twice: give each row a key of its own")
        moved = np.ascontiguousarray(self._space.apply(given), dtype=np.float32)
        with self._changing():
            there = self._rows.find(keys)
            if (there >= 0).any():
                at = int(np.argmax(there >= 0))
                raise InputError(f"key {_named(keys[at])} is that of row {there[at]}: remove it first")
            first = self._rows.total
            self._change(_ADD, len(keys), (keys.astype("<i4"), moved.astype("<f4")), lambda: self._add(keys, moved))
        return np.arange(first, first + len(keys))

    def remove(self, keys: Any) -> int:
        """See `Index.remove`."""
        if np.size(keys) == 0:
            return 0
        keys = table.check_keys(keys, len(keys) if np.ndim(keys) else 1)
        if (twice := _repeated(keys)) is not None:
            raise InputError(f"keys has {_named(keys[twice])} twice: name each row once")
        with self._changing():
            gone = self._rows.find(keys)
            if (gone < 0).any():
                at = int(np.argmax(gone < 0))
                raise InputError(f"key {_named(keys[at])} is of no row that is there: name keys of this index")
            self._change(_REMOVE, len(gone), (gone.astype("<i8"),), lambda: self._remove(gone))
        return len(gone)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """For one change: nobody else does, here or in another process, and what others did before is known."""
        with self.still():
            if self._journal is not None and not self._journal.locked:
                if not self._is_ours():
                    folder = self._journal.file.parent
                    raise InputError(f"{folder} is not what it was when this index was opened: open it again")
                self._journal.lock()
                self._replay()
            yield

    def _change(self, kind: bytes, count: int, parts: Sequence[np.ndarray], apply: Callable[[], None]) -> None:
        """Journal, then memory. An error leaves neither, or an index that takes no more changes."""
        journal = self._journal
        mark = None if journal is None else journal.mark
        begun = False
        try:
            if journal is not None:
                journal.append(kind, self._rows.total, count, [part.data.cast("B") for part in parts])
            begun = True
            apply()
        except BaseException:
            self._broken = begun
            if begun and journal is not None and mark is not None:
                journal.cut(mark)
            raise

    def _replay(self) -> None:
        assert self._journal is not None
        try:
            for record in self._journal.read():
                keys, vectors, gone = decoded(self._journal, record, self._rows, self._space.dim)
                if gone is not None:
                    self._remove(gone)
                elif keys is not None and vectors is not None:
                    self._add(keys, vectors)
        except BaseException:
            self._broken = True
            raise

    def _add(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        self._rows.extend(keys)
        self._searcher.add(vectors)
        self._rows.publish()

    def _remove(self, rows: np.ndarray) -> None:
        dead = self._rows.remove(rows)
        if len(dead):
            self._searcher.remove(dead)


def _checked_vectors(vectors: Any, dim: int) -> np.ndarray:
    """Float [m, dim] of length 1."""
    given = table.check_vectors(vectors)
    if given.shape[1] != dim:
        raise InputError(f"vectors have shape {list(given.shape)}, and [m, {dim}] is wanted")
    lengths = table.norms(given)
    good = np.isfinite(lengths) & (lengths > 0)
    if not good.all():
        row = int(np.argmin(good))
        what = "is all zeros" if lengths[row] == 0 else "holds a value that is not finite or too large"
        raise InputError(f"vectors row {row} {what}: encode it again or leave it out")
    off = np.abs(lengths - 1) > table.TOLERANCE[given.dtype.name]
    if not off.any():
        return given
    if not _WARNED.is_set():
        _WARNED.set()
        warnings.warn(
            f"{np.count_nonzero(off)} of {len(off)} vectors have not length 1 and are divided by theirs, as building a "
            "payload does; this is said once",
            stacklevel=4,
        )
    return np.where(off[:, None], given / lengths[:, None], given).astype(np.float32)


def _repeated(keys: np.ndarray) -> int | None:
    """The place of a key that stands before it as well, or None."""
    order = np.argsort(table.codes(keys), kind="stable")
    same = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    return int(order[1:][same].min()) if same.any() else None


def _named(key: np.ndarray) -> str:
    return f"({key[0]}, {key[1]})"
