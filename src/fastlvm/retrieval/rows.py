"""The rows of an index: which row a searcher's id stands for, what keys they have, and which of them are there."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from fastlvm.data.rows import codes
from fastlvm.retrieval.vectors import representatives


class Growing:
    """An array that grows at its end, at a constant cost a row. `view` is all of it; one taken before stays whole."""

    def __init__(self, values: np.ndarray) -> None:
        self._room = values
        self.view = values

    def extend(self, values: np.ndarray) -> None:
        used, wanted = len(self.view), len(self.view) + len(values)
        if wanted > len(self._room):
            room = np.empty((max(wanted, 2 * used), *self.view.shape[1:]), self.view.dtype)
            room[:used] = self.view
            self._room = room
        self._room[used:wanted] = values
        self.view = self._room[:wanted]


class Rows:
    """A payload's rows, those added after them, and what was removed. One thread changes it; others may search.

    A row's id is its place among all that there ever were. The searcher has one id for each duplicate group of the
    payload, in the order of their smallest rows, and then one for each row that was added.

    base: rows of the payload. firsts: the smallest row of each of its groups, int64. count: ids that the searcher has.
    """

    def __init__(self, keys: np.ndarray, groups: np.ndarray) -> None:
        """keys: int32 [n, 2], n at least the payload's rows; groups: int64, of the payload's rows alone."""
        self.base = len(groups)
        self.firsts = representatives(groups)
        self.groups = groups
        self.removed = 0
        self._keys = Growing(keys)
        self._of = Growing(np.concatenate([self.firsts, np.arange(self.base, len(keys))]))
        self._gone = Growing(np.zeros(len(keys), bool))
        self.count = len(self._of.view)

    def __len__(self) -> int:
        """Rows that are there."""
        return self.total - self.removed

    @property
    def total(self) -> int:
        """Rows that there ever were."""
        return len(self._gone.view)

    @property
    def keys(self) -> np.ndarray:
        """int32 [total, 2]"""
        return self._keys.view

    @property
    def of(self) -> np.ndarray:
        """The row that a searcher's id stands for, int64. Take it after the search, and `keys` after it."""
        return self._of.view

    @property
    def gone(self) -> np.ndarray:
        """Ids of the rows that were removed, int64, ascending."""
        return np.flatnonzero(self._gone.view)

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """The searcher's ids of rows 0 to total - 1, or of their groups."""
        if self.total == self.base:
            return np.searchsorted(self.firsts, self.groups[rows])
        ours = rows < self.base
        groups = np.searchsorted(self.firsts, self.groups[np.where(ours, rows, 0)])
        return np.where(ours, groups, rows - self.base + len(self.firsts))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Rows that are there and have these keys [m, 2]: int64 [m], -1 where there is none."""
        order, known = self._by_key
        wanted = codes(keys)
        at = np.minimum(np.searchsorted(known, wanted), self.base - 1)
        rows = np.where((known[at] == wanted) & ~self._gone.view[order[at]], order[at], -1)
        for i, code in enumerate(wanted.tolist()) if self._added else ():
            rows[i] = self._added.get(code, rows[i])
        return rows

    def there(self, ids: np.ndarray) -> np.ndarray:
        """Whether each of ids int64 from -1 to total - 1 is a row that is there: bool of their shape."""
        return (ids >= 0) & ~self._gone.view[ids]

    def has(self, ids: np.ndarray) -> bool:
        """Whether each of ids int64 [m] is a row that is there, and none comes twice."""
        inside = len(ids) == 0 or (ids.min() >= 0 and ids.max() < self.total)
        return bool(inside and not self._gone.view[ids].any() and len(np.unique(ids)) == len(ids))

    def extend(self, keys: np.ndarray) -> None:
        """New rows of these keys [m, 2], which no row that is there has. `publish` follows when they can be found."""
        first = self.total
        rows = np.arange(first, first + len(keys))
        self._added.update(zip(codes(keys).tolist(), rows.tolist(), strict=True))
        self._keys.extend(keys)  # before ids that stand for them
        self._of.extend(rows)
        self._gone.extend(np.zeros(len(keys), bool))

    def publish(self) -> None:
        self.count = len(self._of.view)

    def remove(self, rows: np.ndarray) -> np.ndarray:
        """Take rows [m] away that are there; the searcher's ids that stand for none any more, int64."""
        self._gone.view[rows] = True
        self.removed += len(rows)
        dead: list[int] = []
        for row, number in zip(rows.tolist(), self.numbers(rows).tolist(), strict=True):
            if row >= self.base:
                code = int(codes(self.keys[row]))
                if self._added.get(code) == row:
                    del self._added[code]
            rest = [other for other in self._members.get(number, ()) if not self._gone.view[other]]
            if rest:
                self._of.view[number] = rest[0]
            else:
                dead.append(number)
        return np.unique(np.array(dead, np.int64))

    @functools.cached_property
    def _by_key(self) -> tuple[np.ndarray, np.ndarray]:
        """The payload's rows in the order of their keys, and those as numbers."""
        known = codes(self.keys[: self.base])
        order = np.argsort(known, kind="stable")
        return order, known[order]

    @functools.cached_property
    def _added(self) -> dict[int, int]:
        """By its key, each row that was added and is there."""
        rows = np.flatnonzero(~self._gone.view[self.base :]) + self.base
        return dict(zip(codes(self.keys[rows]).tolist(), rows.tolist(), strict=True))

    @functools.cached_property
    def _members(self) -> dict[int, list[int]]:
        """By the searcher's id, the rows of each group of several, ascending."""
        several = np.bincount(self.groups, minlength=self.base)[self.groups] > 1
        members: dict[int, list[int]] = {}
        rows: Any = np.flatnonzero(several)
        for row, number in zip(rows.tolist(), np.searchsorted(self.firsts, self.groups[rows]).tolist(), strict=True):
            members.setdefault(number, []).append(row)
        return members
