"""One token of the causal convolution as a torch custom op, `fastlvm::causal_conv1d_step`.

Imported when the first tensor arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlvm.ops import _autograd, _direct, _step
from fastlvm.ops._extension import _C

_SCHEMA = "(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu, Tensor? state_indices) -> Tensor"


def define(
    name: str, kernel: Callable[..., Any], device: str = "cpu"
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Register `fastlvm::<name>` for a backend's `kernel(*args, out)`; gives it, and what calls either."""

    def step(x, state, *rest):
        out = _output(x)
        kernel(x, state, *rest, out)
        _step.tell_autograd(state)
        return out

    op = _step.define(name, _SCHEMA, kernel=step, fake=_output, device=device)
    return op, _direct.unless_watched(op, step)


def _output(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)  # [b, D] laid out as x is


def _cpu(x, state, weight, bias, silu, state_indices, out):
    *tensors, written = _autograd.plain(x, state, weight, bias, out)
    _C.causal_conv1d_step(*tensors, silu, _step.plain_indices(state_indices), written)


causal_conv1d_step, run = define("causal_conv1d_step", _cpu)
