"""What kind of array was handed in, asked without importing a framework nobody uses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

_FLOATS = {np.dtype(name): name for name in ("float32", "float16", "float64")}  # dtype.name costs microseconds


def kind(x: Any) -> str | None:
    """Give "numpy", "torch", "mlx", or None for anything else. A framework is looked at only where it is loaded."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return "torch"
    if isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray):
        return "numpy"
    mx = sys.modules.get("mlx.core")
    return "mlx" if mx is not None and isinstance(x, mx.array) else None


def dtype_name(x: Any) -> str:
    """Give "float32" for that of numpy, torch and mlx; a foreign byte order is part of the name."""
    if isinstance(x, np.ndarray):
        return _FLOATS.get(x.dtype) or (x.dtype.name if x.dtype.isnative else x.dtype.str)
    return str(x.dtype).removeprefix("torch.").removeprefix("mlx.core.").rstrip("_")  # mlx's bool_


def device(x: Any) -> str:
    """Give "cpu" for numpy, for torch the device the tensor is on, such as "cuda:0".

    For mlx, whose arrays are nowhere in particular, it is the device of its default stream: "cpu" or "gpu".
    """
    if isinstance(x, np.ndarray):
        return "cpu"
    return mlx_device() if kind(x) == "mlx" else str(x.device)


def mlx_device() -> str:
    """Give "cpu" or "gpu": where mlx, which is loaded, runs what it is given no stream for."""
    mx = sys.modules["mlx.core"]
    return "cpu" if mx.default_device() == mx.cpu else "gpu"


def through_torch(function: Callable[..., tuple[Any, ...]], *args: Any) -> tuple[Any, ...]:
    """Call a torch function on numpy arguments; its tensors come back as numpy arrays."""
    import torch

    # np.array copies: torch takes neither negative strides nor read-only memory.
    tensors = [torch.from_numpy(np.array(a)) if isinstance(a, np.ndarray) else a for a in args]
    with torch.no_grad():
        return tuple(t.numpy() for t in function(*tensors))
