"""Where the tests of the triton backend run: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def to_device(value):
    """Tensors, also in dicts, lists and tuples, on `DEVICE`, but for `cu_seqlens`, which lives in main memory."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {k: v if k == "cu_seqlens" else to_device(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(v) for v in value)
    return value


def every(k, cases):
    """Every k-th case interpreted, all of them on a GPU."""
    return list(cases) if ON_GPU else list(cases)[::k]
