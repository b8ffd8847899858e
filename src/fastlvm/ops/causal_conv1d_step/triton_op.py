"""One token of the causal convolution in Triton as a torch custom op, `fastlvm::causal_conv1d_step_triton`."""

from __future__ import annotations

from fastlvm.kernels.triton import causal_conv1d_step as kernels
from fastlvm.ops import _step, _triton
from fastlvm.ops.causal_conv1d_step import custom_op


@_triton.on_device
def _kernel(x, state, *rest):
    _step.check_apart("causal_conv1d_step", state)
    kernels.step(x, state, *rest)


causal_conv1d_step, run = custom_op.define(f"causal_conv1d_step{_triton.SUFFIX}", _kernel, device="default")
