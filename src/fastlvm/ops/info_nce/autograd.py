"""InfoNCE as torch custom ops: `fastlvm::info_nce`, `fastlvm::info_nce_bwd`, their fakes and gradients.

Imported when the first tensor arrives. Where all losses weigh the same and a gradient will be wanted, the forward
computes it as well, up to the one factor that the backward brings. The second derivative goes through the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlvm.ops import _autograd, _direct
from fastlvm.ops._extension import _C
from fastlvm.ops.info_nce import reference

_INPUTS = (
    "Tensor queries, Tensor keys, float temperature, bool symmetric, "
    "Tensor? mask, Tensor? query_labels, Tensor? key_labels"
)


def define(
    name: str, kernel: Callable[..., None], bwd_kernel: Callable[..., None], *, both: bool, device: str = "cpu"
) -> Callable[..., Tensor]:
    """Register `fastlvm::<name>` and `fastlvm::<name>_bwd` for a backend's two kernels, and return the public call.

    Args:
        kernel: `kernel(*args, loss, log_sums, dqueries, dkeys)` writes the last four, the gradients of the sum of the
            losses None where they are not wanted; args are those of `reference.losses`.
        bwd_kernel: `bwd_kernel(weights, *args, log_sums, dqueries, dkeys)` writes the last two.
        both: whether the forward has gradients of the symmetric loss, too.
    """

    def outputs(queries, keys, temperature, symmetric, mask, query_labels, key_labels, summed, wanted):
        """Loss [] or [B], logarithms of the sums [1 or 2, B], gradients of the sum of the losses, or [0] for none."""
        dtype = _autograd.state_dtype(queries)
        batch = queries.shape[0]
        early = summed and (both or not symmetric)
        shapes: list[Any] = [() if summed else (batch,), (2 if symmetric else 1, batch)]
        shapes += [x.shape if want and early else (0,) for x, want in zip((queries, keys), wanted, strict=True)]
        return tuple(queries.new_empty(shape, dtype=dtype) for shape in shapes)

    def loss(*args):
        results = outputs(*args)
        kernel(*args[:-2], *results[:2], *map(_given, results[2:]))
        return results

    def loss_bwd(grad, *args):
        queries, keys, *_, log_sums, dqueries, dkeys, wanted = args
        inputs = (queries, keys)
        early = [_given(dqueries), _given(dkeys)]
        if grad.ndim == 0 and all(d is not None for d, want in zip(early, wanted, strict=True) if want):
            return _autograd.gradients(inputs, list(map(_scaled, inputs, early, wanted, [grad] * 2)))
        buffers = _autograd.gradient_buffers(inputs, wanted)
        bwd_kernel(grad.expand(queries.shape[0]), *args[:7], log_sums, *buffers)
        return _autograd.gradients(inputs, buffers)

    def backward(ctx, grad, *_):
        queries, keys, *rest = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:2])
        grads: list[Tensor | None] = [None, None]
        if grad is not None:
            results = bwd(grad, queries, keys, ctx.temperature, ctx.symmetric, *rest, wanted)
            grads = _autograd.or_none(results, wanted)
        return (*grads, *[None] * 7)

    op = _autograd.define(
        name,
        f"({_INPUTS}, bool summed, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
        kernel=loss,
        fake=outputs,
        setup_context=_save,
        backward=backward,
        device=device,
    )
    bwd = _autograd.define(
        f"{name}_bwd",
        f"(Tensor grad, {_INPUTS}, Tensor log_sums, Tensor dqueries, Tensor dkeys, bool[] wanted) -> (Tensor, Tensor)",
        kernel=loss_bwd,
        fake=_fake_bwd,
        setup_context=_save_bwd,
        backward=_double_backward,
        device=device,
    )
    call = _direct.unless_watched(op, loss)

    def run(queries: Tensor, keys: Tensor, *args: Any) -> Tensor:
        *rest, reduction = args
        recorded = torch.is_grad_enabled()
        wanted = [recorded and x.requires_grad for x in (queries, keys)]
        result = call(queries, keys, *rest, reduction != "none", wanted)[0]
        return result / queries.shape[0] if reduction == "mean" else result

    return run


def _given(gradient: Tensor) -> Tensor | None:
    return gradient if gradient.ndim == 2 else None


def _scaled(x: Tensor, gradient: Tensor | None, want: bool, factor: Tensor) -> Tensor | None:
    """The gradient times the factor, in x's dtype."""
    if not want or gradient is None:
        return None
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=x.dtype))


def _fake_bwd(grad, queries, keys, *args):
    return _autograd.fake_gradients((queries, keys), args[-1])


def _save(ctx, inputs, output):
    queries, keys, ctx.temperature, ctx.symmetric, *masks, ctx.summed, _ = inputs
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(queries, keys, *masks, *rest)
    ctx.set_materialize_grads(False)


def _save_bwd(ctx, inputs, output):
    grad, queries, keys, ctx.temperature, ctx.symmetric, *masks, _, _, _, ctx.wanted = inputs
    ctx.save_for_backward(grad, queries, keys, *masks)
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *cotangents):
    grad, queries, keys, *masks = ctx.saved_tensors

    def forward(queries, keys):
        each = reference.losses(queries, keys, ctx.temperature, ctx.symmetric, *masks)
        return (each if grad.ndim else each.sum(),)

    grads = _autograd.second_order(forward, (queries, keys), (grad,), ctx.wanted, cotangents)
    return (*grads, *[None] * 9)


def _loss(queries, keys, temperature, symmetric, mask, query_labels, key_labels, loss, *results):
    tensors = _autograd.plain(queries, keys)
    masks = _left_out(mask, query_labels, key_labels)
    outputs = _autograd.plain(*((loss, None) if loss.ndim else (None, loss)), *results)
    _C.info_nce(*tensors, temperature, symmetric, *masks, *outputs)


def _loss_bwd(weights, queries, keys, temperature, symmetric, mask, query_labels, key_labels, *results):
    tensors = _autograd.plain(weights, queries, keys)
    masks = _left_out(mask, query_labels, key_labels)
    _C.info_nce_bwd(*tensors, temperature, symmetric, *masks, *_autograd.plain(*results))


def _left_out(mask: Tensor | None, *labels: Tensor | None) -> list[Any]:
    """The mask and the labels as the extension reads them."""
    arrays = [x if x is None else x.contiguous().numpy(force=True) for x in labels]
    return [mask if mask is None else mask.numpy(force=True), *arrays]


run = define("info_nce", _loss, _loss_bwd, both=False)
