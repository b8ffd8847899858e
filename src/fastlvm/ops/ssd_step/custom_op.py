"""One token of Mamba-2 as a torch custom op, `fastlvm::ssd_step`. Imported when the first tensor arrives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlvm.ops import _autograd, _direct, _step
from fastlvm.ops._extension import _C

SCHEMA = (
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus, Tensor? state_indices) -> Tensor"
)


def _cpu(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_indices):
    out = output(state, x)
    *tensors, written = _autograd.plain(state, x, dt, A, B, C, D, z, dt_bias, out)
    _C.ssd_step(*tensors, dt_softplus, _step.plain_indices(state_indices), written)
    _step.tell_autograd(state)
    return out


def output(state: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)  # [b, h, p] laid out as x is


ssd_step = _step.define("ssd_step", SCHEMA, kernel=_cpu, fake=output)
run = _direct.unless_watched(ssd_step, _cpu)
