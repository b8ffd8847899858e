"""Checks every op makes before a kernel runs. Each error names the argument, what it got and what it wants."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from fastlvm.ops import _arrays

_FLOATS = ("float32", "float16", "bfloat16", "float64")
_SINGLE, _HALF, _DOUBLE = (np.dtype(name) for name in ("float32", "float16", "float64"))
_WANTS = {"numpy": "numpy arrays", "torch": "torch tensors", "mlx": "mlx arrays"}


def check_arrays(op: str, optional: tuple[str, ...], named: dict[str, Any]) -> None:
    """Same kind, same device, real floating dtypes, dense; the first entry sets kind, device and precision.

    Raises:
        TypeError: not an array, another kind than the first, a dtype no kernel takes, float64 beside other floats.
        ValueError: another device than the first.
    """
    lead, first = next(iter(named.items()))
    plain = _plain_like(first)
    for name, x in named.items():
        if (x is None and name in optional) or plain(x):
            continue
        _check_kind(op, name, x, lead, first)
        _check_dtype(op, name, x, lead, first)
        here, there = _arrays.device(x), _arrays.device(first)
        if here != there:
            raise ValueError(f"{op}: {name} is on {here} but {lead} is on {there}; move them to one device")


def _plain_like(first: Any) -> Callable[[Any], bool]:
    """Whether an array is of native floats that go with those of `first`. The other checks cost microseconds each."""
    if type(first) is np.ndarray:
        natives = (_DOUBLE,) if first.dtype == _DOUBLE else (_SINGLE, _HALF)
        return lambda x: type(x) is np.ndarray and x.dtype in natives
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(first, torch.Tensor):
        return _plain_mlx_like(first) if _arrays.kind(first) == "mlx" else lambda x: False
    Tensor, strided, device = torch.Tensor, torch.strided, first.device
    double = first.dtype is torch.float64
    dtypes = (torch.float64,) if double else (torch.float32, torch.bfloat16, torch.float16)
    return lambda x: (
        isinstance(x, Tensor) and x.dtype in dtypes and x.layout is strided and not x.is_nested and x.device == device
    )


def _plain_mlx_like(first: Any) -> Callable[[Any], bool]:
    mx = sys.modules["mlx.core"]
    array, double = mx.array, first.dtype == mx.float64
    dtypes = (mx.float64,) if double else (mx.float32, mx.bfloat16, mx.float16)
    return lambda x: isinstance(x, array) and x.dtype in dtypes


def _check_kind(op: str, name: str, x: Any, lead: str, first: Any) -> None:
    kind = _arrays.kind(x)
    if kind is None:
        raise TypeError(f"{op}: {name} is a {type(x).__name__}; wants a numpy array, a torch tensor or an mlx array")
    if kind != _arrays.kind(first):
        other = _WANTS[_arrays.kind(first) or "numpy"]
        raise TypeError(f"{op}: {name} is a {type(x).__name__} but {lead} is a {type(first).__name__}; wants {other}")
    if kind == "torch" and (x.is_nested or str(x.layout) != "torch.strided"):
        raise TypeError(f"{op}: {name} has layout {x.layout}; wants a dense (strided) tensor")


def _check_dtype(op: str, name: str, x: Any, lead: str, first: Any) -> None:
    dtype, wanted = _arrays.dtype_name(x), _arrays.dtype_name(first)
    if dtype not in _FLOATS or (isinstance(x, np.ndarray) and dtype == "bfloat16"):
        wants = "real floats" if "complex" in dtype else "floats"
        raise TypeError(f"{op}: {name} is {dtype}; wants {wants}: float32, float16, bfloat16 (torch, mlx) or float64")
    if (dtype == "float64") != (wanted == "float64"):
        raise TypeError(f"{op}: {name} is {dtype} but {lead} is {wanted}; float64 goes with float64 only, convert one")


def check_shape(op: str, name: str, x: Any, letters: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `x` (None is skipped) has exactly `shape`; `letters` name the axes, as "(B, D, L)"."""
    if x is None or x.shape == shape:
        return
    if x.ndim != len(shape):
        raise ValueError(f"{op}: {name} has {x.ndim} dimensions {_show(x)}; wants {len(shape)}: {letters}")
    raise ValueError(f"{op}: {name} has shape {_show(x)}; wants {letters} = {tuple(int(n) for n in shape)}")


def check_rank(op: str, name: str, x: Any, letters: str, *ranks: int) -> None:
    """Raise ValueError unless `x` has one of the given numbers of dimensions."""
    if x.ndim not in ranks:
        wants = " or ".join(str(rank) for rank in ranks)
        raise ValueError(f"{op}: {name} has {x.ndim} dimensions {_show(x)}; wants {wants}: {letters}")


def check_sequences(op: str, lead: str, x: Any, cu_seqlens: Any) -> int:
    """Number of sequences in `x` [B, D, L], the argument `lead`: B, or what `cu_seqlens` [S + 1] packs into one entry.

    Looks at what is known while tracing, never at the offsets themselves: those are checked where they are read.

    Raises:
        TypeError: `cu_seqlens` is of another kind than `x`, or its dtype is neither int32 nor int64.
        ValueError: `cu_seqlens` is not a vector in main memory, it has no element, or B is not 1.
    """
    if cu_seqlens is None:
        return x.shape[0]
    name = "cu_seqlens"
    _check_kind(op, name, cu_seqlens, lead, x)
    dtype, where = _arrays.dtype_name(cu_seqlens), _arrays.device(cu_seqlens)
    if dtype not in ("int32", "int64"):
        raise TypeError(f"{op}: {name} is {dtype}; wants int32 or int64")
    if where != "cpu" and _arrays.kind(cu_seqlens) != "mlx":  # whose memory the cpu reads, wherever mlx computes
        raise ValueError(f"{op}: {name} is on {where}; wants it on the cpu, where its values are read")
    check_rank(op, name, cu_seqlens, "(S + 1,)", 1)
    if cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: {name} has shape (0,); wants (S + 1,), the offsets of S sequences, 0 first")
    if x.shape[0] != 1:
        raise ValueError(f"{op}: {lead} has batch size {x.shape[0]}; wants 1 with {name}, the sequences along L")
    return cu_seqlens.shape[0] - 1


def check_flag(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a bool: a string such as "no" would silently mean yes."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{op}: {name} is {value!r}; wants True or False")


def _show(x: Any) -> str:
    return str(tuple(int(n) for n in x.shape))
