"""One token of the selective scan as a torch custom op of the triton backend, `fastlvm::ssm_step_triton`.

Imported when the first tensor on a GPU arrives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlvm.kernels.triton import ssm_step as kernels
from fastlvm.ops import _direct, _step, _triton
from fastlvm.ops.ssm_step.custom_op import SCHEMA


@_triton.on_device
def _run(state, x, *args):
    out = _output(state, x)
    kernels.ssm_step(state, x, *args, out)
    _step.tell_autograd(state)
    return out


def _output(state: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)  # [b, D] laid out as x is


ssm_step = _step.define(f"ssm_step{_triton.SUFFIX}", SCHEMA, kernel=_run, fake=_output, device="default")
run = _direct.unless_watched(ssm_step, _run)
