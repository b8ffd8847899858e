"""One token of the selective scan as a torch custom op, `fastlvm::ssm_step`. Imported when the first tensor arrives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlvm.ops import _autograd, _direct, _step
from fastlvm.ops._extension import _C

SCHEMA = (
    "(Tensor(a!) state, Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, bool delta_softplus, Tensor? state_indices) -> Tensor"
)


def _cpu(state, x, delta, A, B, C, D, z, delta_bias, delta_softplus, state_indices):
    out = _output(state, x)
    *tensors, written = _autograd.plain(state, x, delta, A, B, C, D, z, delta_bias, out)
    _C.ssm_step(*tensors, delta_softplus, _step.plain_indices(state_indices), written)
    _step.tell_autograd(state)
    return out


def _output(state: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)  # [b, D] laid out as x is


ssm_step = _step.define("ssm_step", SCHEMA, kernel=_cpu, fake=_output)
run = _direct.unless_watched(ssm_step, _cpu)
