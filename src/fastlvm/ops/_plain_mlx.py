"""What the references in plain mlx share. They are written for a graph: a few operations on all of time at once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mlx.core as mx

from fastlvm.ops import _mlx, _mlx_call, _plain

_CHUNK = 16


def softplus(x: Any) -> Any:
    """Linear above 20."""
    return mx.where(x > 20, x, mx.logaddexp(mx.minimum(x, 20), 0))


def silu(x: Any) -> Any:
    return x * mx.sigmoid(x)


def after(arrays: _mlx_call.Arrays, ready: _mlx_call.Arrays) -> list[Any]:
    """The arrays, no earlier than `ready`, which have elements: for a graph in parts that share memory one by one.

    It is what mx.depends does, which mlx can neither map nor take to forward mode. To mx.compile, parts after other
    things are not the same part, so that what is computed again is not kept instead.
    """
    if not ready:
        return list(arrays)
    elements = [mx.stop_gradient(y[(0,) * y.ndim]) for y in ready]
    last = sum(elements[1:], elements[0])
    return [mx.where(True, x, last.astype(x.dtype)) for x in arrays]


def recurrence(decay: Any, inputs: Any, initial: Any) -> Any:
    """All states `h_t = decay_t h_{t-1} + inputs_t` along axis 0 [L, ...], L at least 1, from `initial` [...].

    In chunks, all of them at once, and then their ends by the same rule: 32 steps for every power of 16 in L. The sums
    are those of a loop over time with brackets around each chunk.
    """
    length = inputs.shape[0]
    decay = mx.broadcast_to(decay, (length, *decay.shape[1:]))
    if length <= _CHUNK:
        states, h = [], initial
        for t in range(length):
            h = decay[t] * h + inputs[t]
            states.append(h)
        return mx.stack(states)
    chunks = -(-length // _CHUNK)
    decay, inputs = (_in_chunks(x, chunks, fill) for x, fill in ((decay, 1), (inputs, 0)))  # [K, 16, ...]
    h, through = inputs[:, 0], decay[:, 0]
    states, decays = [h], [through]
    for t in range(1, _CHUNK):
        h, through = decay[:, t] * h + inputs[:, t], through * decay[:, t]
        states.append(h)
        decays.append(through)
    ends = recurrence(through, h, initial)  # [K, ...]
    before = mx.concatenate([mx.broadcast_to(initial[None], (1, *ends.shape[1:])), ends[:-1]])
    found = mx.stack(states, axis=1) + mx.stack(decays, axis=1) * before[:, None]
    return found.reshape(chunks * _CHUNK, *found.shape[2:])[:length]


def _in_chunks(x: Any, chunks: int, fill: int) -> Any:
    lacking = chunks * _CHUNK - x.shape[0]
    if lacking:
        x = mx.concatenate([x, mx.full((lacking, *x.shape[1:]), fill, dtype=x.dtype)])
    return x.reshape(chunks, _CHUNK, *x.shape[1:])


def each_sequence(
    op: str, cu_seqlens: Any, length: int, axis: int, run: Callable[[slice, slice | None], tuple[Any, Any]]
) -> tuple[Any, Any]:
    """Packed sequences one by one, as `_plain.each_sequence`: outputs with time at `axis`, and final states [S, ...].

    Raises:
        ValueError: the offsets do not fit, or mlx traces them.
    """
    if not _mlx_call.evaluated([cu_seqlens]):
        raise ValueError(f"{op}: cu_seqlens: {_mlx.TRACED}; wants a constant of the function, made outside it")
    offsets = _plain.checked_offsets(op, cu_seqlens, length)
    if len(offsets) == 1:  # no sequence at all
        out, state = run(slice(0, 0), None)
        return out, state[:0]
    pairs = enumerate(pairwise(offsets))
    outs, states = zip(*(run(slice(begin, end), slice(s, s + 1)) for s, (begin, end) in pairs), strict=True)
    return mx.concatenate(list(outs), axis=axis), mx.concatenate(list(states))


def per_channel(M: Any, channels: int, axis: int) -> Any:
    """Groups at `axis` repeated for the channels of each."""
    return mx.repeat(M, channels // max(M.shape[axis], 1), axis=axis)


def take(state: Any, indices: Any) -> Any:
    """The state of every row [b, ...]; zero for padding."""
    return state if indices is None else _padded(state)[mx.maximum(indices, -1) + 1]


def put(state: Any, indices: Any, rows: Any) -> Any:
    """The states [S, ...] with those of the rows, in the state's dtype; padding goes nowhere."""
    rows = rows.astype(state.dtype)
    if indices is None:
        return rows
    padded = _padded(state)
    padded[mx.maximum(indices, -1) + 1] = rows
    return padded[1:]


def blank(out: Any, indices: Any) -> Any:
    """`out` [b, ...] with zeros in the rows that are padding."""
    return out if indices is None else mx.where((indices < 0).reshape(-1, *[1] * (out.ndim - 1)), 0, out)


def _padded(state: Any) -> Any:
    return mx.concatenate([mx.zeros((1, *state.shape[1:]), state.dtype), state])
