"""One token of the causal convolution as a torch custom op, `fastlvm::causal_conv1d_step`.

Imported when the first tensor arrives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlvm.ops import _autograd, _direct, _step
from fastlvm.ops._extension import _C

_SCHEMA = "(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu, Tensor? state_indices) -> Tensor"


def _cpu(x, state, weight, bias, silu, state_indices):
    out = _output(x)
    *tensors, written = _autograd.plain(x, state, weight, bias, out)
    _C.causal_conv1d_step(*tensors, silu, _step.plain_indices(state_indices), written)
    _step.tell_autograd(state)
    return out


def _output(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)  # [b, D] laid out as x is


causal_conv1d_step = _step.define("causal_conv1d_step", _SCHEMA, kernel=_cpu, fake=_output)
run = _direct.unless_watched(causal_conv1d_step, _cpu)
