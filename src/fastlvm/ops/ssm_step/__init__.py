"""One token of the selective scan of Mamba."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _checks, _step, dispatch
from fastlvm.ops.ssm_step import cpu, mlx, reference, triton

_OP = "ssm_step"
_OPTIONAL = ("D", "z", "delta_bias")


def ssm_step(
    state: Any,
    x: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    state_indices: Any = None,
    *,
    backend: str = "auto",
) -> Any:
    """Advance the states by one token in place: `h = exp(Δ A) h + Δ B x`, `out = (<C, h> + D x) · silu(z)`.

    What `fastlvm.ssm_scan` does to a sequence of length 1, without a copy of the state. numpy arrays in, numpy array
    out; torch tensors or mlx arrays in, the same out, without gradients. Any strides are read, and those of the state
    written, as they are; an mlx state gets other memory, and what shares the old one keeps its values. Dtypes are
    float32, float16 and bfloat16 (not numpy's), each array its own, computed in float32; or float64 throughout. A state
    of 16 bits is rounded at every token. torch.autocast changes no dtype.

    Args:
        state: [S, D, N], written; no other argument may share its memory. S is b unless there are `state_indices`.
        x: input [b, D]. Any size may be 0.
        delta: step sizes [b, D], before `delta_bias` and softplus.
        A: [D, N], real; negative for a state that decays.
        B, C: [b, N] shared by all channels, or [b, G, N] shared by D / G channels each.
        D: skip weights [D].
        z: gate [b, D]; the output is multiplied by silu(z).
        delta_bias: [D], added to delta.
        delta_softplus: take softplus of delta, linear above 20.
        state_indices: [b], int32 or int64: row i advances state[state_indices[i]], no state twice. A negative index is
            padding: the row's output is zero and no state is touched. On a GPU their values are not checked: an index
            of S or more touches no state either, and its row is NaN.
        backend: "auto", or a name that `fastlvm.explain("ssm_step", ...)` lists.

    Returns:
        Output [b, D] in x's dtype.

    Raises:
        TypeError: an argument is no array, of another kind than state, or of a dtype that is not taken.
        ValueError: a rank, a shape, a device or an index does not fit, the state is read-only or its elements overlap,
            an argument requires grad in grad mode, or the backend named cannot run the call. No state has changed then.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.
    """
    args = (state, x, delta, A, B, C, D, z, delta_bias, delta_softplus, state_indices)
    _check(*args)
    return dispatch.choose(_OP, backend, args).run(*args)


def _check(
    state: Any,
    x: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    delta_bias: Any,
    delta_softplus: bool,
    state_indices: Any,
) -> None:
    named = {"state": state, "x": x, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    _step.check_arrays(_OP, "ssm_scan", _OPTIONAL, named, state_indices)
    _checks.check_flag(_OP, "delta_softplus", delta_softplus)

    _checks.check_rank(_OP, "x", x, "(b, D)", 2)
    _checks.check_rank(_OP, "A", A, "(D, N)", 2)
    batch, channels = x.shape
    size = A.shape[1]
    _checks.check_shape(_OP, "A", A, "(D, N)", (channels, size))
    _step.check_states(_OP, state, state_indices, batch, "D, N", (channels, size))
    _checks.check_shape(_OP, "delta", delta, "(b, D)", (batch, channels))
    for name, M in (("B", B), ("C", C)):
        _check_layout(name, M, batch, channels, size)
    _checks.check_shape(_OP, "D", D, "(D,)", (channels,))
    _checks.check_shape(_OP, "z", z, "(b, D)", (batch, channels))
    _checks.check_shape(_OP, "delta_bias", delta_bias, "(D,)", (channels,))


def _check_layout(name: str, M: Any, batch: int, channels: int, size: int) -> None:
    _checks.check_rank(_OP, name, M, "(b, N) or (b, G, N)", 2, 3)
    if M.ndim == 2:
        _checks.check_shape(_OP, name, M, "(b, N)", (batch, size))
        return
    groups = M.shape[1]
    _checks.check_shape(_OP, name, M, "(b, G, N)", (batch, groups, size))
    if groups < 1 or channels % groups:
        raise ValueError(f"{_OP}: {name} has {groups} groups; wants a number that divides the {channels} channels")


dispatch.register(_OP, ssm_step, _check, cpu, triton, mlx, reference)
