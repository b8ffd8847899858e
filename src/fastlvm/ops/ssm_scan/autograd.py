"""The selective scan as torch custom ops: `fastlvm::ssm_scan`, `fastlvm::ssm_scan_bwd`, their fakes and gradients.

Imported when the first tensor arrives. The second derivative goes through the reference formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlvm.ops import _autograd, _direct
from fastlvm.ops._extension import _C
from fastlvm.ops.ssm_scan import reference

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? initial_state, Tensor? cu_seqlens"
)
ALIKE = (0, 1, 6)  # u, delta and z
_GRADS = "(" + ", ".join(["Tensor"] * 9) + ")"


def _scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, return_final_state, keep=False
):
    out, final_state, checkpoints = _empty(u, A, cu_seqlens, return_final_state, keep)
    *tensors, initial_state = _autograd.plain(u, delta, A, B, C, D, z, delta_bias, initial_state)
    outputs = _autograd.plain(out, final_state if return_final_state else None)
    kept = _autograd.plain(checkpoints if keep else None)
    _C.ssm_scan(*tensors, delta_softplus, initial_state, *outputs, _autograd.offsets(cu_seqlens), *kept)
    return out, final_state, checkpoints


def _fake(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, return_final_state, keep=False
):
    return _empty(u, A, cu_seqlens, return_final_state, keep)


def _empty(
    u: Tensor, A: Tensor, cu_seqlens: Tensor | None, return_final_state: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and final state, and the checkpoints [·, N, D], or an empty tensor where they are not kept."""
    checkpoints = _empty_checkpoints(u, A, cu_seqlens) if keep else u.new_empty(0, dtype=_autograd.state_dtype(u))
    return *outputs(u, A, cu_seqlens, return_final_state), checkpoints


def outputs(u: Tensor, A: Tensor, cu_seqlens: Tensor | None, return_final_state: bool) -> tuple[Tensor, Tensor]:
    """[B, D, L] laid out as u is, [B or S, D, N]: an empty tensor stands for a state nobody wants."""
    shape = (_autograd.sequences(u, cu_seqlens), *A.shape) if return_final_state else (0,)
    return torch.empty_like(u), u.new_empty(shape, dtype=_autograd.state_dtype(u))


def _empty_checkpoints(u: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    steps, shape = _C.checkpoint_steps, (A.shape[1], u.shape[1])
    if cu_seqlens is None:
        rows = u.shape[0] * ((u.shape[2] + steps - 1) // steps)
        return u.new_empty((rows, *shape), dtype=_autograd.state_dtype(u))
    rows = u.shape[2] // steps + _autograd.sequences(u, cu_seqlens)
    return u.new_zeros((rows, *shape), dtype=_autograd.state_dtype(u))  # not all of them are written


def _scan_bwd(grad_out, grad_final_state, *args):
    inputs, delta_softplus, cu_seqlens, checkpoints, wanted = split(args)
    buffers = _autograd.gradient_buffers(inputs, wanted, ALIKE)
    *tensors, initial_state, checkpoints = _autograd.plain(grad_out, grad_final_state, *inputs, checkpoints)
    offsets = _autograd.offsets(cu_seqlens)
    _C.ssm_scan_bwd(*tensors, delta_softplus, initial_state, *_autograd.plain(*buffers), offsets, checkpoints)
    return _autograd.gradients(inputs, buffers)


def _fake_bwd(grad_out, grad_final_state, *args):
    inputs, *_, wanted = split(args)
    return _autograd.fake_gradients(inputs, wanted, ALIKE)


def split(args: tuple[Any, ...]) -> tuple[list[Tensor | None], bool, Tensor | None, Tensor | None, list[bool]]:
    """The nine tensors that have gradients, the flag between them, offsets, checkpoints, which gradients are wanted."""
    *tensors, delta_softplus, initial_state, cu_seqlens, checkpoints, wanted = args
    return [*tensors, initial_state], delta_softplus, cu_seqlens, checkpoints, wanted


def _save(ctx, inputs, output):
    *tensors, ctx.delta_softplus, initial_state, cu_seqlens, ctx.return_final_state, keep = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, output[2] if keep else None)
    ctx.set_materialize_grads(False)


def _save_bwd(ctx, inputs, output):
    grad_out, grad_final_state, *args = inputs
    tensors, ctx.delta_softplus, cu_seqlens, _, ctx.wanted = split(tuple(args))
    ctx.save_for_backward(grad_out, grad_final_state, *tensors, cu_seqlens)
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *cotangents):
    grad_out, grad_final_state, *tensors, cu_seqlens = ctx.saved_tensors

    def forward(u, delta, A, B, C, D, z, delta_bias, initial_state):
        return reference.scan(u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus, initial_state, cu_seqlens)

    grads = _autograd.second_order(forward, tensors, (grad_out, grad_final_state), ctx.wanted, cotangents)
    return (*grads[:-1], None, grads[-1], None, None, None)


def recorded(tensors: tuple[Any, ...]) -> bool:
    """Whether a gradient of any of these will be wanted."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


def _keeps_checkpoints(u: Tensor, A: Tensor, tensors: tuple[Any, ...]) -> bool:
    """Whether the forward keeps states for its backward, which else computes all of them again.

    It does where they take no more room than u.
    """
    if not recorded(tensors):
        return False
    # A compiler would take the question for the length as a promise that it stays on one side.
    more_than_one = torch.compiler.is_compiling() or u.shape[2] > _C.checkpoint_steps
    return more_than_one and A.shape[1] <= _C.checkpoint_steps


def define(name: str, scan: Any, scan_bwd: Any, fake: Any, device: str) -> Any:
    """Register the op `name` of one backend and its `_bwd`, which differ in their kernels and in the checkpoints."""
    bwd = _autograd.define(
        f"{name}_bwd",
        f"(Tensor? grad_out, Tensor? grad_final_state, {_INPUTS}, Tensor? checkpoints, bool[] wanted) -> {_GRADS}",
        kernel=scan_bwd,
        fake=_fake_bwd,
        setup_context=_save_bwd,
        backward=_double_backward,
        device=device,
    )

    def backward(ctx, grad_out, grad_final_state, _):
        *tensors, initial_state, cu_seqlens, checkpoints = ctx.saved_tensors
        if not ctx.return_final_state:
            grad_final_state = None
        needs = ctx.needs_input_grad
        wanted = [*needs[:8], needs[9]]
        grads: list[Tensor | None] = [None] * 9
        if grad_out is not None or grad_final_state is not None:
            args = (*tensors, ctx.delta_softplus, initial_state, cu_seqlens, checkpoints, wanted)
            grads = _autograd.or_none(bwd(grad_out, grad_final_state, *args), wanted)
        return (*grads[:8], None, grads[8], None, None, None)

    return _autograd.define(
        name,
        f"({_INPUTS}, bool return_final_state, bool keep_checkpoints=False) -> (Tensor, Tensor, Tensor)",
        kernel=scan,
        fake=fake,
        setup_context=_save,
        backward=backward,
        device=device,
    )


_call = _direct.unless_watched(define("ssm_scan", _scan, _scan_bwd, _fake, "cpu"), _scan)


def run(*args: Any) -> tuple[Tensor, Tensor]:
    out, final_state, _ = _call(*args, _keeps_checkpoints(args[0], args[2], args))
    return out, final_state
