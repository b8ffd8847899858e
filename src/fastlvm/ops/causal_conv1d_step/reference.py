"""One token of the causal depthwise convolution in plain PyTorch: the definition of correct.

For every row and channel, with the W-1 inputs before x, oldest first, at the end of its state:

    out = act(bias + Σ_k weight_k line_k)        line: those inputs, then x; k = 0 … W-1

and the state, in place, loses its oldest input and takes x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlvm.ops import _arrays, _step
from fastlvm.ops._plain import describe, supports

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["describe", "run", "step", "supports"]


def run(x: Any, state: Any, *args: Any) -> Any:
    _step.check_values("causal_conv1d_step", state, args[-1])
    if _arrays.kind(x) == "mlx":
        from fastlvm.ops.causal_conv1d_step import reference_mlx

        return reference_mlx.run(x, state, *args)
    if _arrays.kind(x) == "numpy":
        return _step.through_torch(lambda state, x, *rest: step(x, state, *rest), state, x, *args)
    return step(x, state, *args)


def step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state_indices: Tensor | None,
) -> Tensor:
    """Output [b, D] in x's dtype; computes in float32, in float64 for float64."""
    import torch
    import torch.nn.functional as F

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    past = _step.take(state, state_indices).to(dtype)  # [b, D, W-1 or more]
    line = torch.cat([past, x.to(dtype)[..., None]], dim=-1)
    y = (line[..., line.shape[-1] - weight.shape[1] :] * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation is not None:
        y = F.silu(y)
    _step.put(state, state_indices, line[..., 1:])
    return _step.blank(y, state_indices).to(x.dtype)
