"""One token of the causal depthwise convolution of Mamba."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _checks, _step, dispatch
from fastlvm.ops.causal_conv1d_step import cpu, mlx, reference, triton

_OP = "causal_conv1d_step"
_OPTIONAL = ("bias",)
_ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d_step(
    x: Any,
    state: Any,
    weight: Any,
    bias: Any = None,
    activation: str | None = None,
    state_indices: Any = None,
    *,
    backend: str = "auto",
) -> Any:
    """Convolve one token, `out = act(bias + Σ_k weight_k x_{k-W+1})`, and push it into the states in place.

    What `fastlvm.causal_conv1d` does to a sequence of length 1, without a copy of the state. numpy arrays in, numpy
    array out; torch tensors or mlx arrays in, the same out, without gradients. Any strides are read, and those of the
    state written, as they are; an mlx state gets other memory, and what shares the old one keeps its values. Dtypes are
    float32, float16 and bfloat16 (not numpy's), each array its own, with float32 sums; or float64 throughout.
    torch.autocast changes none of them.

    Args:
        x: input [b, D]. Any size may be 0.
        state: the inputs before x, oldest first, [S, D, W-1] or more of them, of which the last W-1 count; written: all
            move by one place and x, in the state's dtype, comes last. No other argument may share its memory. S is b
            unless there are `state_indices`.
        weight: filters [D, W], W at least 1, the newest input last.
        bias: [D].
        activation: None, "silu" or its other name "swish".
        state_indices: [b], int32 or int64: row i advances state[state_indices[i]], no state twice. A negative index is
            padding: the row's output is zero and no state is touched. On a GPU their values are not checked: an index
            of S or more touches no state either, and its row is NaN.
        backend: "auto", or a name that `fastlvm.explain("causal_conv1d_step", ...)` lists.

    Returns:
        Output [b, D] in x's dtype.

    Raises:
        TypeError: an argument is no array, of another kind than x, or of a dtype that is not taken.
        ValueError: a rank, a shape, a device, the activation or an index does not fit, the state is read-only or its
            elements overlap, an argument requires grad in grad mode, or the backend named cannot run the call. No state
            has changed then.
    """
    args = (x, state, weight, bias, activation, state_indices)
    _check(*args)
    return dispatch.choose(_OP, backend, args).run(*args)


def _check(x: Any, state: Any, weight: Any, bias: Any, activation: str | None, state_indices: Any) -> None:
    named = {"x": x, "state": state, "weight": weight, "bias": bias}
    _step.check_arrays(_OP, "causal_conv1d", _OPTIONAL, named, state_indices)
    if activation is not None and activation not in _ACTIVATIONS:
        raise ValueError(f'{_OP}: activation is {activation!r}; wants None, "silu" or "swish"')

    _checks.check_rank(_OP, "x", x, "(b, D)", 2)
    _checks.check_rank(_OP, "weight", weight, "(D, W)", 2)
    _checks.check_rank(_OP, "state", state, "(b, D, W-1 or more)", 3)
    batch, channels = x.shape
    width, held = weight.shape[1], state.shape[2]
    if width < 1:
        raise ValueError(f"{_OP}: weight has shape {tuple(weight.shape)}; wants (D, W) with W at least 1")
    _checks.check_shape(_OP, "weight", weight, "(D, W)", (channels, width))
    _step.check_states(_OP, state, state_indices, batch, "D, W-1 or more", (channels, max(held, width - 1)))
    _checks.check_shape(_OP, "bias", bias, "(D,)", (channels,))


dispatch.register(_OP, causal_conv1d_step, _check, cpu, triton, mlx, reference)
