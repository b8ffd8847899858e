"""What graphs that hold the torch custom ops want: the ops to be there, or something that stands for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from fastlvm.ops import _triton, dispatch

_DECOMPOSED = {"ssm_scan": "scan", "ssd_scan": "scan", "causal_conv1d": "conv"}


def register() -> None:
    """Register the custom ops `torch.ops.fastlvm.*`, as else the first tensor does that an op meets.

    For a process that loads a graph before it calls an op: `torch.export.load` and
    `torch._inductor.aoti_load_package` want every op that the graph holds. Those of the triton backend are registered
    where triton is installed.

    Raises:
        ImportError: torch is not installed.
    """
    modules = ("autograd", "custom_op", *(("triton_op",) if _triton.INSTALLED else ()))
    for op in dispatch.known():
        for module in modules:
            name = f"fastlvm.ops.{op}.{module}"
            if find_spec(name) is not None:
                importlib.import_module(name)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The ops over sequences in torch's own operators, for `torch.export.ExportedProgram.run_decompositions`.

    What that returns holds no op of fastlvm, runs where fastlvm is not installed, and can be trained. Its results are
    those of the ops but for rounding, float32 states and dtypes included. Two things differ: offsets in `cu_seqlens`
    are not checked, and a state that grows (`delta * A` above 0) may become NaN where its factors overflow.

    Time is no loop: chunks of it go through their steps at once, and so do what they end with, and what that ends with.
    L may thus be a symbol, if it has an upper bound. All states are in memory: arrays [B, L, D, N] (ssm_scan) or
    [B, L, H, P, N] (ssd_scan).

    Returns:
        `{torch.ops.fastlvm.ssm_scan.default: function, ...}` for ssm_scan, ssd_scan and causal_conv1d, and for their
        ops of the triton backend where triton is installed. run_decompositions cannot replace an op that writes an
        argument, as those of one token do: export with `backend="reference"` instead.

    Raises:
        ImportError: torch is not installed.
        ValueError: from run_decompositions, for a length that is a symbol without an upper bound.
    """
    import torch

    register()
    table: dict[Any, Callable[..., Any]] = {}
    for op, name in _DECOMPOSED.items():
        function = getattr(importlib.import_module(f"fastlvm.ops.{op}.decomposed"), name)
        for suffix in ("", _triton.SUFFIX) if _triton.INSTALLED else ("",):
            table[getattr(torch.ops.fastlvm, op + suffix).default] = function
    return table
