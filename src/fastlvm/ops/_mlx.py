"""What the mlx backends of all ops share: where a call on mlx arrays runs, and why not there.

An mlx array is nowhere in particular; its ops run on the default device. On the CPU that is the compiled kernels, which
read and write the arrays' memory (`_mlx_call`). The GPU has no kernels yet: "auto" goes on to plain mlx there, as it
does while mlx traces a function.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from fastlvm.ops import _arrays, _native

TRACED = "mlx traces this call (mx.compile, mx.vmap), where arrays have no values to compute from"


def supports(*args: Any) -> tuple[bool, str]:
    """Whether the kernels can take a call with these arguments, and why not. Evaluates the arrays among them."""
    if _arrays.kind(args[0]) != "mlx":
        return False, "wants mlx arrays"
    if _arrays.device(args[0]) != "cpu":
        return False, "mlx's default device is the gpu, which has no kernels yet; use `with mx.stream(mx.cpu)`"
    from fastlvm.ops import _mlx_call

    arrays = [x for arg in args for x in (arg if isinstance(arg, (tuple, list)) else [arg])]
    arrays = [x for x in arrays if _arrays.kind(x) == "mlx"]
    if not _mlx_call.evaluated(arrays):
        return False, TRACED
    if any(_arrays.dtype_name(x) == "bfloat16" for x in arrays) and not _mlx_call.shows_bfloat16():
        return False, "this version of mlx does not show the memory of bfloat16; wants a newer one, or float16"
    return _native.extension()


def describe() -> str:
    """What would run."""
    return f"{_native.describe()}, on the memory of mlx arrays"


def runner(op: str) -> Callable[..., Any]:
    """What runs calls of `op` that `supports` took: mlx_op of its folder, imported with the first of them."""

    def run(*args: Any) -> Any:
        return import_module(f"fastlvm.ops.{op}.mlx_op").run(*args)

    return run
