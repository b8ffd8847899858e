"""What the torch custom ops share: registration, gradient buffers for the extension, and the second derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlvm.ops import _transforms

_TOLD_IN_C = hasattr(Tensor, "__dlpack_c_exchange_api__")  # where a tensor's memory is; older versions of torch do not


def define(
    name: str,
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    device: str = "cpu",
) -> Callable[..., Any]:
    """Register the custom op `fastlvm::<name>` with its kernel, fake kernel and gradient, and return it.

    `device` is where the kernel runs, "default" for wherever its tensors are.

    Registered piece by piece because the decorator `torch.library.custom_op` loads all of torch._dynamo: seconds on the
    first call, where these take milliseconds.
    """
    full = f"fastlvm::{name}"
    torch.library.define(full, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(full, device, kernel)
    torch.library.register_fake(full, fake)
    return _transforms.differentiable(getattr(torch.ops.fastlvm, name).default, setup_context, backward)


def plain(*tensors: Tensor | None) -> Sequence[Any]:
    """What the extension reads and writes the memory of the tensors through, without their autograd history."""
    return tensors if _TOLD_IN_C else [None if x is None else _view(x.detach()) for x in tensors]


def _view(x: Tensor) -> Any:
    return x if x.dtype == torch.bfloat16 else x.numpy()  # quicker than DLPack's capsules, but numpy has no bfloat16


def offsets(cu_seqlens: Tensor | None) -> Any:
    """The offsets of packed sequences as the extension reads them."""
    return None if cu_seqlens is None else cu_seqlens.numpy(force=True)


def sequences(x: Tensor, cu_seqlens: Tensor | None) -> Any:
    """Number of sequences in x [B, D, L], as an int or, while tracing, a symbol for one."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype kernels compute in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def gradient_buffers(
    inputs: Sequence[Tensor | None], wanted: Sequence[bool], alike: Sequence[int] = ()
) -> list[Tensor | None]:
    """Buffers for the gradients that are wanted, None for the others.

    They are contiguous and in the compute dtype, but for those of inputs `alike`: they have the layout and the dtype of
    their input, so that what comes next in the backward finds them as the forward left them.
    """

    def buffer(i: int, x: Tensor) -> Tensor:
        return torch.empty_like(x) if i in alike else torch.empty(x.shape, dtype=state_dtype(x), device=x.device)

    pairs = enumerate(zip(inputs, wanted, strict=True))
    return [buffer(i, x) if want and x is not None else None for i, (x, want) in pairs]


def gradients(inputs: Sequence[Tensor | None], buffers: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The buffers in the dtype of their inputs; an empty tensor stands for a gradient nobody wants.

    A custom op returns tensors only, never None: `fake_gradients` and `or_none` know the same convention.
    """
    lead = inputs[0]
    assert lead is not None
    return tuple(
        lead.new_empty(0) if x is None or buffer is None else buffer.to(x.dtype)
        for x, buffer in zip(inputs, buffers, strict=True)
    )


def fake_gradients(
    inputs: Sequence[Tensor | None], wanted: Sequence[bool], alike: Sequence[int] = ()
) -> tuple[Tensor, ...]:
    """What `gradients` returns, without data."""
    buffers = gradient_buffers(inputs, wanted, alike)
    return gradients(inputs, buffers)


def or_none(grads: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients wanted, None in the place of the others."""
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]


def second_order(
    forward: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Backward of a backward, by differentiating the reference formula twice.

    Args:
        forward: maps `inputs` to the op's two outputs.
        inputs, grad_outputs, wanted: what the first backward was given.
        cotangents: gradients of the loss with respect to the first backward's results; None where there is none.

    Returns:
        Gradients for `[*grad_outputs, *inputs]`; None where an argument is None, or all of them.
    """
    held = [*grad_outputs, *inputs]
    if not torch.is_grad_enabled():  # without create_graph no third derivative follows
        held = [None if t is None else t.detach() for t in held]
    asked = [i for i, want in enumerate(wanted) if want and cotangents[i] is not None]
    if not asked:
        return [None] * len(held)

    def first(*leaves: Tensor) -> tuple[Tensor, ...]:
        each = iter(leaves)
        given = [None if t is None else next(each) for t in held]
        gs, xs = given[: len(grad_outputs)], given[len(grad_outputs) :]

        def outputs(*chosen: Tensor) -> tuple[Tensor, ...]:
            places = dict(zip(asked, chosen, strict=True))
            results = forward(*(places.get(i, x) for i, x in enumerate(xs)))
            return tuple(y for y, g in zip(results, gs, strict=True) if g is not None)

        pull = torch.func.vjp(outputs, *(xs[i] for i in asked))[1]
        return pull(tuple(g for g in gs if g is not None))

    pull = torch.func.vjp(first, *(t for t in held if t is not None))[1]
    second = iter(pull(tuple(cotangents[i] for i in asked)))
    return [None if t is None else next(second) for t in held]
