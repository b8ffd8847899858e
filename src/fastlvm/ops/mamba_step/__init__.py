"""One token of a whole Mamba block."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _checks, _step, dispatch
from fastlvm.ops.mamba_step import cpu, reference

_OP = "mamba_step"
_OPTIONAL = ("D", "in_proj_bias", "conv1d_bias", "dt_bias", "out_proj_bias", "dt_norm", "B_norm", "C_norm")


def mamba_step(
    x: Any,
    conv_state: Any,
    ssm_state: Any,
    in_proj: Any,
    conv1d: Any,
    x_proj: Any,
    dt_proj: Any,
    A_log: Any,
    out_proj: Any,
    D: Any = None,
    in_proj_bias: Any = None,
    conv1d_bias: Any = None,
    dt_bias: Any = None,
    out_proj_bias: Any = None,
    dt_norm: Any = None,
    B_norm: Any = None,
    C_norm: Any = None,
    norm_eps: float = 1e-6,
    *,
    backend: str = "auto",
) -> Any:
    """Advance a Mamba block by one token in place: `in_proj`, convolution and SiLU, `x_proj`, scan, gate, `out_proj`.

    What a block does between its norm and its residual, in one call: `fastlvm.causal_conv1d_step` and
    `fastlvm.ssm_step` with the four products around them, which read the weights where they lie. It is meant for few
    rows: from some tens on, products of matrices are quicker. numpy arrays in, numpy array out; torch tensors in, torch
    tensor out, without gradients. Any strides are read, and those of the states written, as they are. Dtypes are
    float32, float16 and bfloat16 (torch), each array its own, computed in float32 and rounded at the end and in the
    states alone; or float64 throughout. The weights are the parameters of mamba_ssm's `Mamba` under their own names.

    Args:
        x: input [b, M].
        conv_state: the last inputs of the convolution, oldest first [b, D, W-1 or more], written.
        ssm_state: [b, D, N], written; neither state may share memory with another argument.
        in_proj: [2 D, M]; its first D rows give the convolution's input, the others the gate.
        conv1d: filters [D, W].
        x_proj: [R + 2 N, D]; its rows give the step sizes' R inputs, then B, then C.
        dt_proj: [D, R].
        A_log: [D, N]; A is -exp(A_log).
        out_proj: [M, D].
        D: skip weights [D].
        in_proj_bias, conv1d_bias, dt_bias, out_proj_bias: [2 D], [D], [D], [M]. Step sizes are a softplus, linear
            above 20, with `dt_bias` in it.
        dt_norm, B_norm, C_norm: [R], [N], [N]. Where one is given, that part of `x_proj`'s result is divided by its
            root mean square and multiplied by it, as in FalconMamba and Jamba.
        norm_eps: what is added to the mean square.
        backend: "auto", or a name that `fastlvm.explain("mamba_step", ...)` lists.

    Returns:
        Output [b, M] in x's dtype.

    Raises:
        TypeError: an argument is no array, of another kind than x, or of a dtype that is not taken.
        ValueError: a rank, a shape or a device does not fit, a state is read-only or its elements overlap, an argument
            requires grad in grad mode, or the backend named cannot run the call. No state has changed then.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.4.
    """
    weights = (in_proj, conv1d, x_proj, dt_proj, A_log, out_proj, D)
    biases = (in_proj_bias, conv1d_bias, dt_bias, out_proj_bias)
    args = (x, conv_state, ssm_state, *weights, *biases, dt_norm, B_norm, C_norm, norm_eps)
    _check(*args)
    return dispatch.choose(_OP, backend, args).run(*args)


def _check(
    x: Any,
    conv_state: Any,
    ssm_state: Any,
    in_proj: Any,
    conv1d: Any,
    x_proj: Any,
    dt_proj: Any,
    A_log: Any,
    out_proj: Any,
    D: Any,
    in_proj_bias: Any,
    conv1d_bias: Any,
    dt_bias: Any,
    out_proj_bias: Any,
    dt_norm: Any,
    B_norm: Any,
    C_norm: Any,
    norm_eps: float,
) -> None:
    named = {"x": x, "conv_state": conv_state, "ssm_state": ssm_state, "in_proj": in_proj, "conv1d": conv1d}
    named |= {"x_proj": x_proj, "dt_proj": dt_proj, "A_log": A_log, "out_proj": out_proj, "D": D}
    named |= {"in_proj_bias": in_proj_bias, "conv1d_bias": conv1d_bias, "dt_bias": dt_bias}
    named |= {"out_proj_bias": out_proj_bias, "dt_norm": dt_norm, "B_norm": B_norm, "C_norm": C_norm}
    _step.check_arrays(_OP, "ssm_scan", _OPTIONAL, named, None, states=("conv_state", "ssm_state"))
    if isinstance(norm_eps, bool) or not isinstance(norm_eps, float | int):
        raise TypeError(f"{_OP}: norm_eps is {norm_eps!r}; wants a number")

    for name, letters, rank in (
        ("x", "(b, M)", 2),
        ("conv_state", "(b, D, W-1 or more)", 3),
        ("conv1d", "(D, W)", 2),
        ("dt_proj", "(D, R)", 2),
        ("A_log", "(D, N)", 2),
    ):
        _checks.check_rank(_OP, name, named[name], letters, rank)
    (batch, model), (channels, size), rank = x.shape, A_log.shape, dt_proj.shape[1]
    width, held = conv1d.shape[1], conv_state.shape[2]
    if width < 1:
        raise ValueError(f"{_OP}: conv1d has shape {tuple(conv1d.shape)}; wants (D, W) with W at least 1")
    for name, letters, shape in (
        ("conv_state", "(b, D, W-1 or more)", (batch, channels, max(held, width - 1))),
        ("ssm_state", "(b, D, N)", (batch, channels, size)),
        ("in_proj", "(2 D, M)", (2 * channels, model)),
        ("conv1d", "(D, W)", (channels, width)),
        ("x_proj", "(R + 2 N, D)", (rank + 2 * size, channels)),
        ("dt_proj", "(D, R)", (channels, rank)),
        ("out_proj", "(M, D)", (model, channels)),
        ("D", "(D,)", (channels,)),
        ("in_proj_bias", "(2 D,)", (2 * channels,)),
        ("conv1d_bias", "(D,)", (channels,)),
        ("dt_bias", "(D,)", (channels,)),
        ("out_proj_bias", "(M,)", (model,)),
        ("dt_norm", "(R,)", (rank,)),
        ("B_norm", "(N,)", (size,)),
        ("C_norm", "(N,)", (size,)),
    ):
        _checks.check_shape(_OP, name, named[name], letters, shape)


dispatch.register(_OP, mamba_step, _check, cpu, reference)
