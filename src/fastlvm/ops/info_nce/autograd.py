"""InfoNCE as torch custom ops: `fastlvm::info_nce`, `fastlvm::info_nce_bwd`, their fakes and gradients.

Imported when the first tensor arrives. Where all losses weigh the same and a gradient will be wanted, the forward
computes it as well, up to the one factor that the backward brings. The second derivative goes through the reference.
"""

from __future__ import annotations

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


def _loss(queries, keys, temperature, symmetric, mask, query_labels, key_labels, summed, wanted):
    outputs = loss, log_sums, dqueries, dkeys = _outputs(queries, keys, symmetric, summed, wanted)
    tensors = _autograd.plain(queries, keys)
    results = _autograd.plain(*((None, loss) if summed else (loss, None)), log_sums, *map(_given, (dqueries, dkeys)))
    _C.info_nce(*tensors, temperature, symmetric, *_left_out(mask, query_labels, key_labels), *results)
    return outputs


def _fake(queries, keys, temperature, symmetric, mask, query_labels, key_labels, summed, wanted):
    return _outputs(queries, keys, symmetric, summed, wanted)


def _outputs(queries: Tensor, keys: Tensor, symmetric: bool, summed: bool, wanted: list[bool]) -> tuple[Tensor, ...]:
    """Loss [] or [B], logarithms of the sums [1 or 2, B], gradients of the sum of the losses, or [0] for none."""
    dtype = _autograd.state_dtype(queries)
    batch = queries.shape[0]
    early = summed and not symmetric
    shapes: list[Any] = [() if summed else (batch,), (2 if symmetric else 1, batch)]
    shapes += [x.shape if want and early else (0,) for x, want in zip((queries, keys), wanted, strict=True)]
    return tuple(queries.new_empty(shape, dtype=dtype) for shape in shapes)


def _given(gradient: Tensor) -> Tensor | None:
    return gradient if gradient.ndim == 2 else None


def _left_out(mask: Tensor | None, *labels: Tensor | None) -> list[Any]:
    """The mask and the labels as the extension reads them."""
    arrays = [x if x is None else x.contiguous().numpy(force=True) for x in labels]
    return [mask if mask is None else mask.numpy(force=True), *arrays]


def _bwd(grad, *args):
    queries, keys, temperature, symmetric, mask, query_labels, key_labels, log_sums, dqueries, dkeys, wanted = args
    inputs = (queries, keys)
    early = [_given(dqueries), _given(dkeys)]
    if grad.ndim == 0 and all(d is not None for d, want in zip(early, wanted, strict=True) if want):
        scaled = [d * grad if want and d is not None else None for d, want in zip(early, wanted, strict=True)]
        return _autograd.gradients(inputs, scaled)
    buffers = _autograd.gradient_buffers(inputs, wanted)
    weights, *tensors = _autograd.plain(grad.expand(queries.shape[0]), queries, keys)
    results = _autograd.plain(log_sums, *buffers)
    _C.info_nce_bwd(weights, *tensors, temperature, symmetric, *_left_out(mask, query_labels, key_labels), *results)
    return _autograd.gradients(inputs, buffers)


def _fake_bwd(grad, queries, keys, *args):
    return _autograd.fake_gradients((queries, keys), args[-1])


def _save(ctx, inputs, output):
    queries, keys, ctx.temperature, ctx.symmetric, *masks, ctx.summed, _ = inputs
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(queries, keys, *masks, *rest)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    queries, keys, *rest = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    grads: list[Tensor | None] = [None, None]
    if grad is not None:
        results = info_nce_bwd(grad, queries, keys, ctx.temperature, ctx.symmetric, *rest, wanted)
        grads = _autograd.or_none(results, wanted)
    return (*grads, *[None] * 7)


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


info_nce = _autograd.define(
    "info_nce",
    f"({_INPUTS}, bool summed, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_loss,
    fake=_fake,
    setup_context=_save,
    backward=_backward,
)
info_nce_bwd = _autograd.define(
    "info_nce_bwd",
    f"(Tensor grad, {_INPUTS}, Tensor log_sums, Tensor dqueries, Tensor dkeys, bool[] wanted) -> (Tensor, Tensor)",
    kernel=_bwd,
    fake=_fake_bwd,
    setup_context=_save_bwd,
    backward=_double_backward,
)
_call = _direct.unless_watched(info_nce, _loss)


def run(queries: Tensor, keys: Tensor, *args: Any) -> Tensor:
    *rest, reduction = args
    recorded = torch.is_grad_enabled()
    wanted = [recorded and x.requires_grad for x in (queries, keys)]
    loss = _call(queries, keys, *rest, reduction != "none", wanted)[0]
    return loss / queries.shape[0] if reduction == "mean" else loss
