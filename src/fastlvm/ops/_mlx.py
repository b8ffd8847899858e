"""What the mlx backends of all ops share: where a call on mlx arrays runs, and why not there.

An mlx array is nowhere in particular; its ops run on the default device. On the CPU that is the compiled kernels, which
read and write the arrays' memory (`_mlx_call`): arguments are evaluated first, and while mlx traces a function, "auto"
goes on to plain mlx. On the GPU it is Metal kernels (`_metal`), operations of mlx's graph as others are, for an op that

- has `run` in a module `metal_op` of its folder, which `runner` finds, and
- takes `supports_with_metal` and `describe_with_metal` as its own in `mlx`;

"auto" goes on to plain mlx for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

from fastlvm.ops import _arrays, _native

TRACED = "mlx traces this call (mx.compile, mx.vmap), where arrays have no values to compute from"


def supports(*args: Any) -> tuple[bool, str]:
    """Whether the compiled kernels can take a call with these arguments, which are evaluated, and why not."""
    if _arrays.kind(args[0]) != "mlx":
        return False, "wants mlx arrays"
    if on_gpu(args[0]):
        return False, "mlx's default device is the gpu, where this op has no kernels; use `with mx.stream(mx.cpu)`"
    from fastlvm.ops import _mlx_call

    arrays = _arrays_of(args)
    if not _mlx_call.evaluated(arrays):
        return False, TRACED
    if any(_arrays.dtype_name(x) == "bfloat16" for x in arrays) and not _mlx_call.shows_bfloat16():
        return False, "this version of mlx does not show the memory of bfloat16; wants a newer one, or float16"
    return _native.extension()


def supports_with_metal(*args: Any, offsets: Any = None) -> tuple[bool, str]:
    """Whether the compiled kernels on the CPU or the Metal kernels on the GPU can take a call, and why not.

    On the GPU nothing is evaluated but `offsets`, those of packed sequences among the arguments.
    """
    if not on_gpu(args[0]):
        return supports(*args)
    import mlx.core as mx

    from fastlvm.ops import _mlx_call

    if not mx.metal.is_available():
        return False, "mlx's default device is a gpu without Metal; use `with mx.stream(mx.cpu)`"
    if any(_arrays.dtype_name(x) == "float64" for x in _arrays_of(args)):
        return False, "float64 has no Metal kernel; wants float32, float16 or bfloat16, or `with mx.stream(mx.cpu)`"
    if not _mlx_call.evaluated([offsets]):
        return False, f"cu_seqlens: {TRACED}"
    return True, "Metal kernels"


def describe() -> str:
    """What would run on the CPU."""
    return f"{_native.describe()}, on the memory of mlx arrays"


def describe_with_metal() -> str:
    """What would run on the default device."""
    if _arrays.mlx_device() == "cpu":
        return describe()
    return f"Metal kernels, mlx {version('mlx')}"


def on_gpu(x: Any) -> bool:
    """Whether `x` is an mlx array, and mlx's default device the GPU."""
    return _arrays.kind(x) == "mlx" and _arrays.device(x) != "cpu"


def runner(op: str) -> Callable[..., Any]:
    """What runs calls of `op` that were taken: mlx_op of its folder, or metal_op, imported with the first of them."""

    def run(*args: Any) -> Any:
        module = "metal_op" if on_gpu(args[0]) else "mlx_op"
        return import_module(f"fastlvm.ops.{op}.{module}").run(*args)

    return run


def _arrays_of(args: tuple[Any, ...]) -> list[Any]:
    each = [x for arg in args for x in (arg if isinstance(arg, (tuple, list)) else [arg])]
    return [x for x in each if _arrays.kind(x) == "mlx"]
