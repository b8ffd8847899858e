"""What the cpu backends of all ops share: whether the extension can run a call, and its threads."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from fastlvm.ops import _arrays


def supports(x: Any) -> tuple[bool, str]:
    """Whether the compiled extension can take arrays like `x`, and why not."""
    if _arrays.kind(x) == "mlx":
        return False, "arrays are mlx's, wants numpy arrays or torch tensors"
    where = _arrays.device(x)
    if where != "cpu":
        return False, f"arrays are on {where}, wants main memory"
    return extension()


def extension() -> tuple[bool, str]:
    """Whether the compiled extension can be loaded, and why not."""
    try:
        from fastlvm import _C  # noqa: F401
    except ImportError as error:
        return False, f"the extension cannot be loaded: {error}"
    return True, "compiled kernels"


def describe() -> str:
    """What would run: the instruction set in use and the number of threads."""
    from fastlvm import _C

    return f"compiled kernels, {_C.isa()}, threads: {_C.get_num_threads()}"


def aligned(x: Any) -> Any:
    """The array itself; a copy where numpy's own memory layout is not a whole number of elements apart."""
    return x if not isinstance(x, np.ndarray) or x.flags.aligned else np.require(x, requirements="A")


def set_num_threads(n: int) -> None:
    """Let the compiled kernels use `n` threads, the caller's among them. Results do not depend on it, bit for bit.

    Raises:
        TypeError: `n` is not an integer.
        ValueError: `n` is below 1.
    """
    from fastlvm import _C

    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"set_num_threads: n is a {type(n).__name__}; wants an integer of at least 1") from None
    if isinstance(n, bool) or count < 1:
        raise ValueError(f"set_num_threads: n is {n!r}; wants an integer of at least 1")
    _C.set_num_threads(count)


def get_num_threads() -> int:
    """How many threads the compiled kernels use: `FASTLVM_NUM_THREADS`, else the cores this process may run on."""
    from fastlvm import _C

    return int(_C.get_num_threads())
