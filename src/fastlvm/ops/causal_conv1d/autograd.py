"""The causal convolution as torch custom ops: `fastlvm::causal_conv1d`, its backward, their fakes and gradients.

Imported when the first tensor arrives. The second derivative goes through the reference formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlvm.ops import _autograd, _direct
from fastlvm.ops._extension import _C
from fastlvm.ops.causal_conv1d import reference

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? cu_seqlens"
_ALIKE = (0,)  # x
_GRADS = "(" + ", ".join(["Tensor"] * 4) + ")"


def define(
    name: str, kernel: Callable[..., Any], bwd_kernel: Callable[..., Any], device: str = "cpu"
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Register `fastlvm::<name>` and `fastlvm::<name>_bwd` for a backend's two kernels, and return both.

    `kernel(*args, out, final_state)` and `bwd_kernel(grad_out, grad_final_state, *args, *gradients)` write what comes
    last, where args are x, weight, bias, silu, initial_state, cu_seqlens and a gradient nobody wants is None. The
    first op comes with its kernel for `_direct.unless_watched`.
    """

    def conv(*args):
        results = _outputs(*args)
        kernel(*args, *results)
        return results

    def conv_bwd(grad_out, grad_final_state, x, weight, bias, silu, initial_state, cu_seqlens, wanted):
        inputs = (x, weight, bias, initial_state)
        buffers = _autograd.gradient_buffers(inputs, wanted, _ALIKE)
        args = (x, weight, bias, silu, initial_state, cu_seqlens)
        bwd_kernel(grad_out, grad_final_state, *args, *buffers)
        return _autograd.gradients(inputs, buffers)

    def backward(ctx, grad_out, grad_final_state):
        x, weight, bias, *states = ctx.saved_tensors  # initial_state, cu_seqlens
        needs = ctx.needs_input_grad
        wanted = [*needs[:3], needs[4]]
        grads: list[Tensor | None] = [None] * 4
        if grad_out is not None or grad_final_state is not None:
            results = bwd(grad_out, grad_final_state, x, weight, bias, ctx.silu, *states, wanted)
            grads = _autograd.or_none(results, wanted)
        return (*grads[:3], None, grads[3], None)

    op = _autograd.define(
        name,
        f"({_INPUTS}) -> (Tensor, Tensor)",
        kernel=conv,
        fake=_outputs,
        setup_context=_save,
        backward=backward,
        device=device,
    )
    bwd = _autograd.define(
        f"{name}_bwd",
        f"(Tensor? grad_out, Tensor? grad_final_state, {_INPUTS}, bool[] wanted) -> {_GRADS}",
        kernel=conv_bwd,
        fake=_fake_bwd,
        setup_context=_save_bwd,
        backward=_double_backward,
        device=device,
    )
    return _direct.unless_watched(op, conv), bwd


def _outputs(x: Tensor, weight: Tensor, bias: Any, silu: Any, initial_state: Any, cu_seqlens: Tensor | None) -> Any:
    sequences = _autograd.sequences(x, cu_seqlens)
    # [B, D, L] laid out as x is, [B or S, D, W-1]
    return torch.empty_like(x), x.new_empty((sequences, x.shape[1], weight.shape[1] - 1))


def _fake_bwd(grad_out, grad_final_state, x, weight, bias, silu, initial_state, cu_seqlens, wanted):
    return _autograd.fake_gradients((x, weight, bias, initial_state), wanted, _ALIKE)


def _save(ctx, inputs, output):
    x, weight, bias, ctx.silu, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _save_bwd(ctx, inputs, output):
    grad_out, grad_final_state, x, weight, bias, ctx.silu, initial_state, cu_seqlens, ctx.wanted = inputs
    ctx.save_for_backward(grad_out, grad_final_state, x, weight, bias, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *cotangents):
    grad_out, grad_final_state, *tensors, cu_seqlens = ctx.saved_tensors

    def forward(x, weight, bias, initial_state):
        return reference.conv(x, weight, bias, "silu" if ctx.silu else None, initial_state, cu_seqlens)

    grads = _autograd.second_order(forward, tensors, (grad_out, grad_final_state), ctx.wanted, cotangents)
    return (*grads[:-1], None, grads[-1], None, None)


def _conv(x, weight, bias, silu, initial_state, cu_seqlens, out, final_state):
    *tensors, initial_state = _autograd.plain(x, weight, bias, initial_state)
    outputs = _autograd.plain(out, final_state)
    _C.causal_conv1d(*tensors, silu, initial_state, *outputs, _autograd.offsets(cu_seqlens))


def _conv_bwd(grad_out, grad_final_state, x, weight, bias, silu, initial_state, cu_seqlens, *buffers):
    *tensors, initial_state = _autograd.plain(grad_out, grad_final_state, x, weight, bias, initial_state)
    offsets = _autograd.offsets(cu_seqlens)
    _C.causal_conv1d_bwd(*tensors, silu, initial_state, *_autograd.plain(*buffers), offsets)


run, _ = define("causal_conv1d", _conv, _conv_bwd)
