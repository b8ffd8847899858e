"""Logarithms of InfoNCE's sums in plain mlx, over tiles of logits: no array [B, M] is ever in memory.

Every tile is a product of matrices. The forward keeps the sums of each, the backward computes the tiles again. Over
tiles: Cheng et al., "Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss", 2024.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import mlx.core as mx

from fastlvm.ops import _plain_mlx

# Tiles of 4 MB: a product that fills a GPU and hides its launch. mlx has some of them in memory at a time, as far as
# its stream is behind: by measurement 8 on the CPU and 13 in a compiled function, however many there are.
_ROWS = _COLUMNS = 1024
_LOWEST = -3e38  # stands for -inf: derivatives of the sum of a tile with nothing else are not NaN


def log_sums(queries: Any, keys: Any, symmetric: bool, mask: Any, query_labels: Any, key_labels: Any) -> Any:
    """Logarithms of the sums of exp(q_i·k_j) over j and, where symmetric, of those over i: [1 or 2, B].

    Nothing is evaluated. All of mlx's transformations go through; mx.export_function takes what fits into one tile.

    Args:
        queries, keys: [B, D] and [M, D] of one dtype, float32 or float64; B and D at least 1.
        mask, query_labels, key_labels: as `reference.split` gives them.
    """
    if query_labels is not None:  # numbers that are no labels are made to differ
        query_labels, key_labels = (mx.where(x < 0, other, x) for x, other in ((query_labels, -1), (key_labels, -2)))
    masks = (mask, query_labels, key_labels)
    given = [x is not None for x in masks]
    axes = (1, 0) if symmetric else (1,)

    def tiles(arrays: Any) -> _Tiles:
        each = iter(arrays[2:])
        return _Tiles(*arrays[:2], *(next(each) if there else None for there in given))

    def backward(arrays: Any, cotangent: Any, sums: Any) -> tuple[Any, ...]:
        return (*tiles(arrays).gradients(axes, cotangent, sums), *map(mx.zeros_like, arrays[2:]))

    if len(queries) <= _ROWS and len(keys) <= _COLUMNS:  # nothing to save: mlx keeps the one tile for the backward
        return _Tiles(queries, keys, *masks).log_sums(axes)
    call: Any = mx.custom_function(lambda *arrays: tiles(arrays).log_sums(axes))
    call.vjp(backward)
    return call(queries, keys, *(x for x in masks if x is not None))


class _Tiles:
    """The logits of queries [B, D] and keys [M, D], a tile at a time; labels mask where they are the same."""

    def __init__(self, queries: Any, keys: Any, mask: Any, query_labels: Any, key_labels: Any):
        self.queries, self.keys, self.mask = queries, keys, mask
        self.query_labels, self.key_labels = query_labels, key_labels
        self.rows, self.columns = _spans(len(queries), _ROWS), _spans(len(keys), _COLUMNS)

    def log_sums(self, axes: tuple[int, ...]) -> Any:
        """[len(axes), B]: over the keys for axis 1, over the queries for axis 0."""
        parts: dict[int, list[list[Any]]] = {1: [[] for _ in self.rows], 0: [[] for _ in self.columns]}
        ready: list[Any] = []
        for r, rows in enumerate(self.rows):
            for c, columns in enumerate(self.columns):
                logits = self._logits(rows, columns, ready)
                ready = [mx.logsumexp(logits, axis=axis) for axis in axes]
                for axis, sums in zip(axes, ready, strict=True):
                    parts[axis][r if axis else c].append(sums)
        whole = [[mx.logsumexp(mx.stack(sums), axis=0) for sums in parts[axis]] for axis in axes]
        return mx.stack([mx.concatenate(sums) for sums in whole])

    def gradients(self, axes: tuple[int, ...], cotangent: Any, sums: Any) -> tuple[Any, Any]:
        """Of the queries and of the keys, for a cotangent [len(axes), B] of the `log_sums`."""
        dqueries: list[Any] = [None for _ in self.rows]
        dkeys: list[Any] = [None for _ in self.columns]
        ready: list[Any] = []
        for r, rows in enumerate(self.rows):
            for c, columns in enumerate(self.columns):
                logits = self._logits(rows, columns, ready)
                weighed = []
                for n, axis in enumerate(axes):  # one by one: compiled second derivatives fail over a split
                    each = rows if axis else columns
                    weights, log_sum = (mx.expand_dims(x[n, each], axis) for x in (cotangent, sums))
                    weighed.append(mx.exp(logits - log_sum) * weights)
                dlogits = sum(weighed[1:], weighed[0])
                dqueries[r] = _plus(dqueries[r], dlogits, self.keys[columns])
                dkeys[c] = _plus(dkeys[c], dlogits.T, self.queries[rows])
                ready = [dqueries[r], dkeys[c]]
        return mx.concatenate(dqueries), mx.concatenate(dkeys)

    def _logits(self, rows: slice, columns: slice, ready: list[Any]) -> Any:
        """A tile, computed after `ready`: mlx would have as many in memory as it can otherwise."""
        labels = [] if self.query_labels is None else [self.query_labels[rows]]
        queries, *labels = _plain_mlx.after([self.queries[rows], *labels], ready)
        logits = queries @ self.keys[columns].T
        left_out = None if self.mask is None else self.mask[rows, columns]
        if labels:
            left_out = _any_shared(labels[0], self.key_labels[columns])
        if left_out is None:
            return logits
        if rows.start < columns.stop and columns.start < rows.stop:
            positives = mx.arange(rows.start, rows.stop)[:, None] == mx.arange(columns.start, columns.stop)
            left_out = mx.logical_and(left_out, mx.logical_not(positives))  # mx.vmap gets `&` wrong with a constant
        return mx.where(left_out, _LOWEST, logits)


def _any_shared(ours: Any, theirs: Any) -> Any:
    """[rows, columns], whether any column of labels [rows, G] and [columns, G] is the same for both."""
    return reduce(mx.logical_or, (ours[:, g, None] == theirs[:, g] for g in range(ours.shape[1])))


def _spans(count: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]


def _plus(total: Any, a: Any, b: Any) -> Any:
    return a @ b if total is None else mx.addmm(total, a, b)
