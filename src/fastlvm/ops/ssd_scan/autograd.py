"""The scan of Mamba-2 as torch custom ops: `fastlvm::ssd_scan`, `fastlvm::ssd_scan_bwd`, their fakes and gradients.

Imported when the first tensor arrives. The second derivative goes through the reference formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlvm.ops import _autograd, _direct
from fastlvm.ops._extension import _C
from fastlvm.ops.ssd_scan import reference

_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? initial_state, Tensor? cu_seqlens"
)
_GRADS = "(" + ", ".join(["Tensor"] * 9) + ")"


def _scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, return_final_state):
    out, final_state = empty(x, B, cu_seqlens, return_final_state)
    *tensors, initial_state = _autograd.plain(x, dt, A, B, C, D, z, dt_bias, initial_state)
    outputs = _autograd.plain(out, final_state if return_final_state else None)
    _C.ssd_scan(*tensors, dt_softplus, initial_state, *outputs, _autograd.offsets(cu_seqlens))
    return out, final_state


def _fake(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, return_final_state):
    return empty(x, B, cu_seqlens, return_final_state)


def empty(x: Tensor, B: Tensor, cu_seqlens: Tensor | None, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """[B, L, H, P] laid out as x is, and [B or S, H, P, N]: an empty tensor stands for a state nobody wants."""
    shape = (_autograd.sequences(x, cu_seqlens), *x.shape[2:], B.shape[3]) if return_final_state else (0,)
    return torch.empty_like(x), x.new_empty(shape, dtype=_autograd.state_dtype(x))


def _scan_bwd(grad_out, grad_final_state, *args):
    inputs, dt_softplus, cu_seqlens, wanted = split(args)
    buffers = _autograd.gradient_buffers(inputs, wanted)
    *tensors, initial_state = _autograd.plain(grad_out, grad_final_state, *inputs)
    _C.ssd_scan_bwd(*tensors, dt_softplus, initial_state, *_autograd.plain(*buffers), _autograd.offsets(cu_seqlens))
    return _autograd.gradients(inputs, buffers)


def split(args: tuple[Any, ...]) -> tuple[list[Tensor | None], bool, Tensor | None, list[bool]]:
    """The nine tensors that have gradients, the flag between them, the offsets, and which gradients are wanted."""
    *tensors, dt_softplus, initial_state, cu_seqlens, wanted = args
    return [*tensors, initial_state], dt_softplus, cu_seqlens, wanted


def _save(ctx, inputs, output):
    *tensors, ctx.dt_softplus, initial_state, cu_seqlens, ctx.has_state = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _save_bwd(ctx, inputs, output):
    grad_out, grad_final_state, *args = inputs
    tensors, ctx.dt_softplus, cu_seqlens, ctx.wanted = split(tuple(args))
    ctx.save_for_backward(grad_out, grad_final_state, *tensors, cu_seqlens)
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *cotangents):
    grad_out, grad_final_state, *tensors, cu_seqlens = ctx.saved_tensors

    def forward(x, dt, A, B, C, D, z, dt_bias, initial_state):
        return reference.scan(x, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, initial_state, cu_seqlens)

    grads = _autograd.second_order(forward, tensors, (grad_out, grad_final_state), ctx.wanted, cotangents)
    return (*grads[:-1], None, grads[-1], None, None)


def define(name: str, scan: Any, scan_bwd: Any, device: str, alike: tuple[int, ...] = ()) -> Any:
    """Register the op `name` of one backend and its `_bwd`, and return what calls the op.

    `alike` are the inputs whose gradients have the inputs' layout, as in `_autograd.gradient_buffers`.
    """

    def fake_bwd(grad_out, grad_final_state, *args):
        inputs, _, _, wanted = split(args)
        return _autograd.fake_gradients(inputs, wanted, alike)

    bwd = _autograd.define(
        f"{name}_bwd",
        f"(Tensor? grad_out, Tensor? grad_final_state, {_INPUTS}, bool[] wanted) -> {_GRADS}",
        kernel=scan_bwd,
        fake=fake_bwd,
        setup_context=_save_bwd,
        backward=_double_backward,
        device=device,
    )

    def backward(ctx, grad_out, grad_final_state):
        *tensors, initial_state, cu_seqlens = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = [*needs[:8], needs[9]]
        grads: list[Tensor | None] = [None] * 9
        if not ctx.has_state:
            grad_final_state = None
        if grad_out is not None or grad_final_state is not None:
            args = (*tensors, ctx.dt_softplus, initial_state, cu_seqlens, wanted)
            grads = _autograd.or_none(bwd(grad_out, grad_final_state, *args), wanted)
        return (*grads[:8], None, grads[8], None, None)

    op = _autograd.define(
        name,
        f"({_INPUTS}, bool return_final_state) -> (Tensor, Tensor)",
        kernel=scan,
        fake=_fake,
        setup_context=_save,
        backward=backward,
        device=device,
    )
    return _direct.unless_watched(op, scan)


run = define("ssd_scan", _scan, _scan_bwd, "cpu")
