"""The causal depthwise convolution of Mamba."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _checks, dispatch
from fastlvm.ops.causal_conv1d import cpu, mlx, reference, triton

_OP = "causal_conv1d"
_OPTIONAL = ("bias", "initial_state")
_ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d(
    x: Any,
    weight: Any,
    bias: Any = None,
    activation: str | None = None,
    initial_state: Any = None,
    return_final_state: bool = False,
    cu_seqlens: Any = None,
    *,
    backend: str = "auto",
) -> Any:
    """Convolve every channel with its own filter over the past: `out_t = act(bias + Σ_k weight_k x_{t-W+1+k})`.

    numpy arrays in, numpy arrays out; torch tensors or mlx arrays in, the same out, with gradients for every array,
    through the final state too. Any strides are read as they are. Dtypes are float32, float16 and bfloat16 (not
    numpy's), each array its own, with float32 sums; or float64 throughout. torch.autocast changes none of them.

    Args:
        x: input [B, D, L]. Any size may be 0.
        weight: filters [D, W], W at least 1, the newest input last; kernels for GPUs take up to 16.
        bias: [D].
        activation: None, "silu" or its other name "swish".
        initial_state: the W-1 inputs before x, oldest first, [B, D, W-1]; zero when None.
        return_final_state: also return the last W-1 inputs, those of `initial_state` included where L < W-1.
        cu_seqlens: offsets [S + 1] of S packed sequences, int32 or int64 on the CPU: 0 first, never falling, L last.
            B is 1 then, sequence s is times [cu_seqlens[s], cu_seqlens[s + 1]) of x, maybe none, and the states are
            [S, D, W-1]; the results are those of every sequence alone.
        backend: "auto", or a name that `fastlvm.explain("causal_conv1d", ...)` lists.

    Returns:
        Output [B, D, L] in x's dtype; with `return_final_state` a pair of it and the state [B, D, W-1] in x's dtype,
        which a next call takes as `initial_state`.

    Raises:
        TypeError: an argument is no array, of another kind than x, or of a dtype that is not taken.
        ValueError: a rank, a shape, a device, the activation or an offset does not fit, or the backend named cannot
            run the call.
    """
    args = (x, weight, bias, activation, initial_state, cu_seqlens)
    _check(*args)
    _checks.check_flag(_OP, "return_final_state", return_final_state)
    out, final_state = dispatch.choose(_OP, backend, args).run(*args)
    return (out, final_state) if return_final_state else out


def _check(x: Any, weight: Any, bias: Any, activation: str | None, initial_state: Any, cu_seqlens: Any) -> None:
    named = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
    _checks.check_arrays(_OP, _OPTIONAL, named)
    if activation is not None and activation not in _ACTIVATIONS:
        raise ValueError(f'{_OP}: activation is {activation!r}; wants None, "silu" or "swish"')

    _checks.check_rank(_OP, "x", x, "(B, D, L)", 3)
    _checks.check_rank(_OP, "weight", weight, "(D, W)", 2)
    sequences = _checks.check_sequences(_OP, "x", x, cu_seqlens)
    channels = x.shape[1]
    width = weight.shape[1]
    if width < 1:
        raise ValueError(f"{_OP}: weight has shape {tuple(weight.shape)}; wants (D, W) with W at least 1")
    _checks.check_shape(_OP, "weight", weight, "(D, W)", (channels, width))
    _checks.check_shape(_OP, "bias", bias, "(D,)", (channels,))
    letters = "(B, D, W-1)" if cu_seqlens is None else "(S, D, W-1)"
    _checks.check_shape(_OP, "initial_state", initial_state, letters, (sequences, channels, width - 1))


dispatch.register(_OP, causal_conv1d, _check, cpu, triton, mlx, reference)
