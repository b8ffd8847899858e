"""Cases made with torch, as mlx arrays and back, and gradients as mlx takes them."""

from __future__ import annotations

import pytest
import torch

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
mx.set_default_device(mx.cpu)  # it is the GPU on a Mac, where bench/apple.py checks the ops

from fastlvm.ops import _mlx_call as calls  # noqa: E402

__all__ = ["BACKENDS", "all_mlx", "calls", "floats", "gradients", "mx", "to_mlx", "to_torch"]

BACKENDS = ("mlx", "reference")


def to_mlx(x):
    """The array of a tensor; a tuple of them for a tuple; anything else as it is."""
    if isinstance(x, tuple):
        return tuple(map(to_mlx, x))
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach()
    if x.dtype == torch.bfloat16:
        return mx.array(x.view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(x.numpy(), dtype=getattr(mx, str(x.dtype).removeprefix("torch.").replace("bool", "bool_")))


def to_torch(x):
    if x.dtype == mx.bfloat16:
        return torch.tensor(x.view(mx.int16).tolist(), dtype=torch.int16).reshape(x.shape).view(torch.bfloat16)
    dtype = getattr(torch, str(x.dtype).removeprefix("mlx.core."))
    return torch.tensor(x.tolist(), dtype=dtype).reshape(x.shape)


def all_mlx(inputs):
    return {key: to_mlx(value) for key, value in inputs.items()}


def floats(inputs):
    kinds = (mx.float32, mx.float16, mx.bfloat16, mx.float64)
    return {key: x for key, x in inputs.items() if isinstance(x, mx.array) and x.dtype in kinds}


def gradients(op, inputs, cotangents):
    """Outputs of `op` and the gradient of every array of floats by name, as torch tensors; inputs are mlx's."""
    leaves = floats(inputs)

    def function(*arrays):
        outputs = op(**{**inputs, **dict(zip(leaves, arrays, strict=True))})
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    outputs, grads = mx.vjp(function, list(leaves.values()), cotangents)
    return [to_torch(o) for o in outputs], {key: to_torch(g) for key, g in zip(leaves, grads, strict=True)}
