"""Has Triton's interpreter refuse what a GPU may not: a read or a write outside of the tensors of a launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class OutOfBounds(AssertionError):
    """A kernel reached past its tensors."""


@contextmanager
def checked() -> Iterator[None]:
    """Inside, every address of every launch is looked at."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    begin = executor._init_args_hst
    load, store = builder.create_masked_load, builder.create_masked_store
    ranges: list[tuple[int, int]] = []

    def prepared(self, args, kwargs):
        host = begin(self, args, kwargs)
        ranges[:] = [_range(x) for x in host[0] if hasattr(x, "data_ptr")]
        return host

    def look(pointers, mask, what):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        places = np.asarray(pointers.data).reshape(-1).astype(np.uint64)
        places = places[np.broadcast_to(mask.data, pointers.data.shape).reshape(-1).astype(bool)]
        inside = np.zeros(places.shape, bool)
        for first, last in ranges:
            inside |= (places >= first) & (places + np.uint64(size) <= last)
        if not inside.all():
            near = [(int(places[~inside][0]) - first, last - first) for first, last in ranges]
            raise OutOfBounds(f"a {what} of {size} bytes, from the start of each tensor (and its bytes): {near}")

    def loaded(self, pointers, mask, *rest):
        look(pointers, mask, "load")
        return load(self, pointers, mask, *rest)

    def stored(self, pointers, value, mask, *rest):
        look(pointers, mask, "store")
        return store(self, pointers, value, mask, *rest)

    executor._init_args_hst, builder.create_masked_load, builder.create_masked_store = prepared, loaded, stored
    try:
        yield
    finally:
        executor._init_args_hst, builder.create_masked_load, builder.create_masked_store = begin, load, store


def _range(x) -> tuple[np.uint64, np.uint64]:
    tensor = x if isinstance(x, torch.Tensor) else x.base
    first = tensor.untyped_storage().data_ptr()
    return np.uint64(first), np.uint64(first + tensor.untyped_storage().nbytes())
