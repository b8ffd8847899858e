"""The selective scan as torch custom ops: `fastlvm::ssm_scan`, `fastlvm::ssm_scan_bwd`, their fakes and gradients.

Imported when the first tensor arrives. The second derivative goes through the reference formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlvm import _C
from fastlvm.ops import _autograd, _direct
from fastlvm.ops.ssm_scan import reference

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? initial_state, Tensor? cu_seqlens"
)
_ALIKE = (0, 1, 6)  # u, delta and z
_GRADS = "(" + ", ".join(["Tensor"] * 9) + ")"


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, return_final_state):
    out, final_state = _empty(u, A, cu_seqlens, return_final_state)
    *tensors, initial_state = _autograd.plain(u, delta, A, B, C, D, z, delta_bias, initial_state)
    outputs = _autograd.plain(out, final_state if return_final_state else None)
    _C.ssm_scan(*tensors, delta_softplus, initial_state, *outputs, _autograd.offsets(cu_seqlens))
    return out, final_state


def _fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, return_final_state):
    return _empty(u, A, cu_seqlens, return_final_state)


def _empty(u: Tensor, A: Tensor, cu_seqlens: Tensor | None, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """[B, D, L] laid out as u is, and [B or S, D, N]: an empty tensor stands for a state nobody wants."""
    shape = (_autograd.sequences(u, cu_seqlens), *A.shape) if return_final_state else (0,)
    return torch.empty_like(u), u.new_empty(shape, dtype=_autograd.state_dtype(u))


def _scan_bwd(grad_out, grad_final_state, *args):
    inputs, delta_softplus, cu_seqlens, wanted = _split(args)
    buffers = _autograd.gradient_buffers(inputs, wanted, _ALIKE)
    *tensors, initial_state = _autograd.plain(grad_out, grad_final_state, *inputs)
    _C.ssm_scan_bwd(*tensors, delta_softplus, initial_state, *_autograd.plain(*buffers), _autograd.offsets(cu_seqlens))
    return _autograd.gradients(inputs, buffers)


def _fake_bwd(grad_out, grad_final_state, *args):
    inputs, _, _, wanted = _split(args)
    return _autograd.fake_gradients(inputs, wanted, _ALIKE)


def _split(args: tuple[Any, ...]) -> tuple[list[Tensor | None], bool, Tensor | None, list[bool]]:
    """The nine tensors that have gradients, the flag between them, the offsets, and which gradients are wanted."""
    *tensors, delta_softplus, initial_state, cu_seqlens, wanted = args
    return [*tensors, initial_state], delta_softplus, cu_seqlens, wanted


def _save(ctx, inputs, output):
    *tensors, ctx.delta_softplus, initial_state, cu_seqlens, ctx.return_final_state = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_final_state):
    *tensors, initial_state, cu_seqlens = ctx.saved_tensors
    if not ctx.return_final_state:
        grad_final_state = None
    needs = ctx.needs_input_grad
    wanted = [*needs[:8], needs[9]]
    grads: list[Tensor | None] = [None] * 9
    if grad_out is not None or grad_final_state is not None:
        args = (*tensors, ctx.delta_softplus, initial_state, cu_seqlens, wanted)
        grads = _autograd.or_none(ssm_scan_bwd(grad_out, grad_final_state, *args), wanted)
    return (*grads[:8], None, grads[8], None, None)


def _save_bwd(ctx, inputs, output):
    grad_out, grad_final_state, *args = inputs
    tensors, ctx.delta_softplus, cu_seqlens, ctx.wanted = _split(tuple(args))
    ctx.save_for_backward(grad_out, grad_final_state, *tensors, cu_seqlens)
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *cotangents):
    grad_out, grad_final_state, *tensors, cu_seqlens = ctx.saved_tensors

    def forward(u, delta, A, B, C, D, z, delta_bias, initial_state):
        return reference.scan(u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus, initial_state, cu_seqlens)

    grads = _autograd.second_order(forward, tensors, (grad_out, grad_final_state), ctx.wanted, cotangents)
    return (*grads[:-1], None, grads[-1], None, None)


ssm_scan = _autograd.define(
    "ssm_scan",
    f"({_INPUTS}, bool return_final_state) -> (Tensor, Tensor)",
    cpu=_scan,
    fake=_fake,
    setup_context=_save,
    backward=_backward,
)
ssm_scan_bwd = _autograd.define(
    "ssm_scan_bwd",
    f"(Tensor? grad_out, Tensor? grad_final_state, {_INPUTS}, bool[] wanted) -> {_GRADS}",
    cpu=_scan_bwd,
    fake=_fake_bwd,
    setup_context=_save_bwd,
    backward=_double_backward,
)
run = _direct.unless_watched(ssm_scan, _scan)
