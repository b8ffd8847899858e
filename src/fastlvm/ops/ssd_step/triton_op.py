"""One token of Mamba-2 of the triton backend as a torch custom op, `fastlvm::ssd_step_triton`.

Imported when the first tensor on a GPU arrives.
"""

from __future__ import annotations

from fastlvm.kernels.triton import ssd_step as kernels
from fastlvm.ops import _direct, _step, _triton
from fastlvm.ops.ssd_step import custom_op


@_triton.on_device
def _run(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_indices):
    _step.check_apart("ssd_step", state)
    out = custom_op.output(state, x)
    kernels.step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_indices, out)
    _step.tell_autograd(state)
    return out


ssd_step = _step.define(
    f"ssd_step{_triton.SUFFIX}", custom_op.SCHEMA, kernel=_run, fake=custom_op.output, device="default"
)
run = _direct.unless_watched(ssd_step, _run)
