"""One token of a Mamba block as a torch custom op, `fastlvm::mamba_step`. Imported when the first tensor arrives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlvm.ops import _autograd, _direct, _step
from fastlvm.ops._extension import _C

SCHEMA = (
    "(Tensor x, Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor in_proj, Tensor conv1d, Tensor x_proj, "
    "Tensor dt_proj, Tensor A_log, Tensor out_proj, Tensor? D, Tensor? in_proj_bias, Tensor? conv1d_bias, "
    "Tensor? dt_bias, Tensor? out_proj_bias, Tensor? dt_norm, Tensor? B_norm, Tensor? C_norm, float norm_eps) -> Tensor"
)


def _cpu(x, conv_state, ssm_state, *args):
    *weights, norm_eps = args
    out = _output(x)
    *tensors, written = _autograd.plain(x, conv_state, ssm_state, *weights, out)
    _C.mamba_step(*tensors, norm_eps, written)
    _step.tell_autograd(conv_state)
    _step.tell_autograd(ssm_state)
    return out


def _output(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)  # [b, M] laid out as x is


mamba_step = _step.define("mamba_step", SCHEMA, kernel=_cpu, fake=_output)
run = _direct.unless_watched(mamba_step, _cpu)
