"""What torch.func and forward-mode AD find behind a custom op: a rule that they can follow, or one sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlvm.ops import _triton

# Private to torch, which has no public name for it. Without it torch.func fails at the ops with torch's own words.
_transforming: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_libraries: list[torch.library.Library] = []  # an op loses what was registered by a library that is gone


class _Guarded(torch.library.Library):
    """Registers autograd kernels that refuse what they cannot do: a tangent, which they would drop, and torch.func."""

    def __init__(self, op: Any, remedy: str):
        super().__init__("fastlvm", "FRAGMENT")
        self.op, self.remedy = op, remedy
        _libraries.append(self)

    def impl(self, op_name: Any, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        def kernel(keyset: Any, *inputs: Any) -> Any:
            if getattr(forward_ad, "_current_level", 0) >= 0:
                self.refuse([forward_ad.unpack_dual(x).tangent if isinstance(x, Tensor) else None for x in inputs])
            if _transforming() and torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
                raise ValueError(
                    f"{_public(self.op)}: torch.func cannot differentiate what torch.compile or torch.export holds; "
                    "use torch.autograd.grad there, or torch.func on the function itself"
                )
            return fn(keyset, *inputs)

        super().impl(op_name, kernel, *args, **kwargs)

    def refuse(self, tangents: Sequence[Tensor | None]) -> None:
        """Raise ValueError unless every argument's tangent is None."""
        for argument, tangent in zip(self.op._schema.arguments, tangents, strict=False):
            if tangent is not None:
                raise ValueError(
                    f"{_public(self.op)}: {argument.name} carries a tangent of forward-mode AD, for which the compiled "
                    f'kernels have no derivative; {self.remedy}backend="reference"'
                )


def differentiable(op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Register the gradient of a custom op, and return a way to call it that torch.func differentiates, too.

    At the op itself it fails: it asks for an autograd.Function with rules that torch.library has no place for.
    """
    guarded = _Guarded(op, "use reverse mode (torch.func.vjp, jacrev), or ")
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=guarded)

    class Rules(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            guarded.refuse(tangents)

    for name, rule in (("forward", op), ("setup_context", setup_context), ("backward", backward)):
        setattr(Rules, name, staticmethod(rule))

    def call(*args: Any) -> Any:
        return Rules.apply(*args) if not torch.compiler.is_compiling() and _transforming() else op(*args)

    return call


def in_place(op: Any) -> Callable[..., Any]:
    """Have a custom op that writes an argument and has no gradient refuse tangents and vmap."""

    def below_autograd(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def refuse_vmap(*args: Any) -> NoReturn:
        raise ValueError(
            f"{_public(op)}: vmap cannot repeat a step that writes its state in place; "
            "pass the axis of vmap as the batch axis of every array"
        )

    guarded = _Guarded(op, "use ")
    guarded.impl(op, below_autograd, "Autograd", with_keyset=True)
    torch.library.Library.impl(guarded, op, refuse_vmap, "FuncTorchBatched")
    return op


def _public(op: Any) -> str:
    return op._opname.removesuffix("_bwd").removesuffix(_triton.SUFFIX)
