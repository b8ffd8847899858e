"""The compiled kernels on the memory of mlx arrays, and what mlx's transformations find behind such a call.

Imported when the first mlx array arrives. Nothing is copied on the way in or out: the extension reads an array through
the buffer protocol, bfloat16 through DLPack, and writes its results into new arrays of mlx's in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

Arrays = Sequence[Any]  # of mx.array, or None for an argument not given

_QUICK = {mx.float32: np.float32, mx.float16: np.float16}  # what mlx takes from numpy as it is
_WORDS = {2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
_CPU = (1, 0)  # as DLPack calls main memory


class _Halves:
    """A bfloat16 array as the extension takes it: by DLPack alone, as the buffer protocol has no name for the dtype."""

    __slots__ = ("array",)

    def __init__(self, array: Any):
        self.array = array

    def __dlpack__(self) -> Any:
        return self.array.__dlpack__(dl_device=_CPU)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CPU


@cache
def shows_bfloat16() -> bool:
    """Whether mlx says where a bfloat16 array is in main memory; older versions do not."""
    try:
        mx.zeros(1, mx.bfloat16, stream=mx.cpu).__dlpack__(dl_device=_CPU)
    except (TypeError, ValueError, RuntimeError, BufferError):
        return False
    return True


def evaluated(arrays: Arrays) -> bool:
    """Evaluate the arrays; False where mlx traces a function and they have no values."""
    try:
        mx.eval([x for x in arrays if x is not None])
    except ValueError as error:
        if "transformations" not in str(error):
            raise
        return False
    return True


def memory(x: Any) -> Any:
    """What the extension reads an array through, or writes one that `empty` made."""
    return _Halves(x) if x is not None and x.dtype == mx.bfloat16 else x


def empty(shape: Sequence[int], dtype: Any) -> Any:
    """A new array of any contents, in memory of its own."""
    if dtype in _QUICK:  # without a trip to the stream's thread
        return mx.array(np.empty(tuple(shape), _QUICK[dtype]))
    out = mx.zeros(shape, dtype)
    mx.eval(out)
    return out


def empty_like(x: Any) -> tuple[Any, Any]:
    """A new array of x's shape, dtype and order of axes in memory, and what the extension writes it through."""
    strides = memoryview(x).strides or ()
    order = sorted(range(x.ndim), key=lambda axis: -abs(strides[axis]))
    if x.size == 0 or order == list(range(x.ndim)):
        out = empty(x.shape, x.dtype)
        return out, memory(out)
    back = [order.index(axis) for axis in range(x.ndim)]
    base = empty([x.shape[axis] for axis in order], x.dtype)
    out = mx.transpose(base, back)
    if x.dtype == mx.bfloat16:
        mx.eval(out)
        return out, memory(out)
    return out, np.asarray(memoryview(base)).transpose(back)


def state_dtype(x: Any) -> Any:
    """The dtype kernels compute in: float64 for float64, else float32."""
    return mx.float64 if x.dtype == mx.float64 else mx.float32


def sequences(x: Any, cu_seqlens: Any) -> int:
    """Number of sequences in x [B, ...]."""
    return int(x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)


def gradient_buffers(inputs: Arrays, alike: Sequence[int] = ()) -> list[Any]:
    """A pair for every input, None for None: a buffer for its gradient, and what the extension writes that through.

    They are contiguous and in the compute dtype, but for those of inputs `alike`, which are as their input is.
    """

    def buffer(i: int, x: Any) -> tuple[Any, Any]:
        if i in alike:
            return empty_like(x)
        out = empty(x.shape, state_dtype(x))
        return out, out

    return [None if x is None else buffer(i, x) for i, x in enumerate(inputs)]


def written(buffers: Arrays) -> list[Any]:
    """What the extension writes buffers of gradients through."""
    return [None if pair is None else pair[1] for pair in buffers]


def gradients(inputs: Arrays, buffers: Arrays) -> list[Any]:
    """The buffers in the dtypes of their inputs."""
    pairs = zip(inputs, buffers, strict=True)
    return [None if pair is None else pair[0].astype(x.dtype) for x, pair in pairs]


def differentiable(
    inputs: Arrays,
    forward: Callable[..., tuple[Any, ...]],
    backward: Callable[..., list[Any]],
    formula: Callable[..., tuple[Any, ...]],
    *,
    metal: str = "",
    kept: int = 0,
) -> tuple[Any, ...]:
    """Call `forward(*inputs)`, which mlx cannot look into, so that mlx's transformations get it right.

    Reverse mode goes through `backward`; forward mode, higher derivatives, and reverse mode where `backward` wants
    values and mlx traces, through `formula`.

    Args:
        inputs: arrays, all of floats; None for those not given.
        forward: the op's results, by the kernels.
        backward: `backward(cotangents, results, *inputs)` gives a gradient for every input, None for None.
        formula: the same results as `forward`, in mlx's own ops.
        metal: name of the op where its kernels are Metal's: operations of mlx's graph, for which nothing is evaluated
            and which mx.vmap does not know.
        kept: how many results of `forward`, the last ones, are for `backward` alone; they have no cotangents.
    """
    given = [x is not None for x in inputs]
    count = sum(given)

    def whole(arrays: Arrays) -> list[Any]:
        each = iter(arrays)
        return [next(each) if there else None for there in given]

    def plain(*arrays: Any) -> list[Any]:
        return list(formula(*whole(arrays)))

    def pull(*arrays: Any) -> list[Any]:  # primals, then cotangents
        return mx.vjp(plain, list(arrays[:count]), list(arrays[count:]))[1]

    def first_order(results: Arrays) -> Callable[..., Any]:
        def kernels(*arrays: Any) -> tuple[Any, ...]:
            if metal:
                arrays = _unmapped(arrays, refuse_vmap)
            elif not evaluated([*arrays, *results]):
                return tuple(pull(*arrays))
            found = backward(arrays[count:], results, *whole(arrays[:count]))
            return tuple(gradient for gradient in found if gradient is not None)

        function: Any = mx.custom_function(kernels)
        function.vjp(lambda arrays, cotangents, _: tuple(mx.vjp(pull, list(arrays), list(cotangents))[1]))
        function.jvp(lambda arrays, tangents: tuple(_push(pull, arrays, tangents)))
        return function

    def refuse_vmap(*args: Any) -> Any:
        raise ValueError(
            f"{metal}: mx.vmap does not go through a Metal kernel; make its axis part of the batch, or use "
            "backend='reference'"
        )

    def run(*arrays: Any) -> tuple[Any, ...]:
        return tuple(forward(*whole(_unmapped(arrays, refuse_vmap) if metal else arrays)))

    call: Any = mx.custom_function(run)
    call.vjp(lambda arrays, cotangents, found: _reducible(first_order(found)(*arrays, *_without(cotangents, kept))))
    call.jvp(lambda arrays, tangents: tuple(_push(plain, arrays, tangents)))
    return _reducible(_without(call(*(x for x in inputs if x is not None)), kept))


def _without(results: Arrays, last: int) -> Arrays:
    return results[: len(results) - last]


def _unmapped(arrays: Arrays, refuse: Callable[..., Any]) -> tuple[Any, ...]:
    """The arrays, for a Metal kernel: mx.vmap, which asks the kernel before the function around it, asks this first."""
    first: Any = mx.custom_function(lambda *xs: xs[0])
    first.vmap(refuse)
    return first(*arrays), *arrays[1:]


def _reducible(results: Arrays) -> tuple[Any, ...]:
    """The results of a custom function, those of no element made anew: mlx may not come back from a sum over one."""
    return tuple(x if x.size else mx.zeros(x.shape, x.dtype) for x in results)


def _push(function: Callable[..., list[Any]], arrays: Arrays, tangents: Arrays) -> list[Any]:
    moved = [mx.zeros_like(x) if t is None else t for x, t in zip(arrays, tangents, strict=True)]
    return mx.jvp(function, list(arrays), moved)[1]


def step(
    op: str, scan: str, state: Any, inputs: Arrays, forward: Callable[..., tuple[Any, Any]], *, metal: bool = False
) -> Any:
    """The output of one token, and `state` with other values from now on.

    mlx's arrays are values: what was made of the state before, or shares its memory, keeps what it had.
    `forward(state, *inputs)` gives the output and a new array for the states. Gradients and mx.vmap are refused.
    With `metal` it is a Metal kernel.
    """
    given = [x is not None for x in inputs]

    def refuse(*args: Any) -> Any:
        raise ValueError(f"{op}: a step in place has no gradient; use fastlvm.{scan}")

    def refuse_vmap(*args: Any) -> Any:
        raise ValueError(f"{op}: a step in place has no mx.vmap; make its axis part of the batch")

    def whole(*arrays: Any) -> tuple[Any, Any]:
        state, *rest = _unmapped(arrays, refuse_vmap) if metal else arrays
        each = iter(rest)
        return forward(state, *(next(each) if there else None for there in given))

    call: Any = mx.custom_function(whole)
    call.vjp(refuse)
    call.jvp(refuse)
    call.vmap(refuse_vmap)
    out, after = _reducible(call(state, *(x for x in inputs if x is not None)))
    state[:] = after  # mlx 0.30 takes no ellipsis here
    return out


def copied(x: Any) -> Any:
    """A contiguous copy, which shares no memory."""
    if x.dtype in _QUICK:
        return mx.array(np.asarray(memoryview(x)))
    words = mx.array(np.asarray(memoryview(x.view(_WORDS[x.itemsize])))).view(x.dtype)
    mx.eval(words)
    return words
