"""The selective scan of Mamba."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _checks, dispatch
from fastlvm.ops.ssm_scan import cpu, mlx, reference, triton

_OP = "ssm_scan"
_OPTIONAL = ("D", "z", "delta_bias", "initial_state")
_LAYOUTS = "(D, N), (B, N, L) or (B, G, N, L)"


def ssm_scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    initial_state: Any = None,
    return_final_state: bool = False,
    cu_seqlens: Any = None,
    *,
    backend: str = "auto",
) -> Any:
    """Run the selective scan: `h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t`, `out_t = (<C_t, h_t> + D u_t) · silu(z_t)`.

    numpy arrays in, numpy arrays out; torch tensors or mlx arrays in, the same out, with gradients for every array,
    through the final state too. Any strides are read as they are: a transposed channel-last tensor costs no copy.
    Dtypes are float32, float16 and bfloat16 (not numpy's), each array its own, with a float32 state; or float64
    throughout. torch.autocast changes none of them.

    Args:
        u: input [B, D, L]. Any size may be 0.
        delta: step sizes [B, D, L], before `delta_bias` and softplus.
        A: [D, N], real; negative for a state that decays.
        B, C: [D, N] constant in time, [B, N, L] shared by all channels, or [B, G, N, L] shared by D / G channels each.
        D: skip weights [D].
        z: gate [B, D, L]; the output is multiplied by silu(z).
        delta_bias: [D], added to delta.
        delta_softplus: take softplus of delta, linear above 20.
        initial_state: [B, D, N] before the first step; zero when None.
        return_final_state: also return the state after the last step.
        cu_seqlens: offsets [S + 1] of S packed sequences, int32 or int64 on the CPU: 0 first, never falling, L last.
            B is 1 then, sequence s is times [cu_seqlens[s], cu_seqlens[s + 1]), maybe none, of every array of time,
            and the states are [S, D, N]; the results are those of every sequence alone.
        backend: "auto", or a name that `fastlvm.explain("ssm_scan", ...)` lists.

    Returns:
        Output [B, D, L] in u's dtype; with `return_final_state` a pair of it and the state [B, D, N] in float32
        (float64 for float64), which a next call takes as `initial_state`.

    Raises:
        TypeError: an argument is no array, of another kind than u, or of a dtype that is not taken.
        ValueError: a rank, a shape, a device or an offset does not fit, or the backend named cannot run the call.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.
    """
    args = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens)
    _check(*args)
    _checks.check_flag(_OP, "return_final_state", return_final_state)
    out, final_state = dispatch.choose(_OP, backend, args).run(*args, bool(return_final_state))
    return (out, final_state) if return_final_state else out


def _check(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    delta_bias: Any,
    delta_softplus: bool,
    initial_state: Any,
    cu_seqlens: Any,
) -> None:
    named = {"u": u, "delta": delta, "A": A, "B": B, "C": C}
    named.update({"D": D, "z": z, "delta_bias": delta_bias, "initial_state": initial_state})
    _checks.check_arrays(_OP, _OPTIONAL, named)
    _checks.check_flag(_OP, "delta_softplus", delta_softplus)

    _checks.check_rank(_OP, "u", u, "(B, D, L)", 3)
    _checks.check_rank(_OP, "A", A, "(D, N)", 2)
    sequences = _checks.check_sequences(_OP, "u", u, cu_seqlens)
    batch, channels, length = u.shape
    state = A.shape[1]
    _checks.check_shape(_OP, "delta", delta, "(B, D, L)", (batch, channels, length))
    _checks.check_shape(_OP, "A", A, "(D, N)", (channels, state))
    for name, M in (("B", B), ("C", C)):
        _check_layout(name, M, batch, channels, length, state)
    _checks.check_shape(_OP, "D", D, "(D,)", (channels,))
    _checks.check_shape(_OP, "z", z, "(B, D, L)", (batch, channels, length))
    _checks.check_shape(_OP, "delta_bias", delta_bias, "(D,)", (channels,))
    letters = "(B, D, N)" if cu_seqlens is None else "(S, D, N)"
    _checks.check_shape(_OP, "initial_state", initial_state, letters, (sequences, channels, state))


def _check_layout(name: str, M: Any, batch: int, channels: int, length: int, state: int) -> None:
    _checks.check_rank(_OP, name, M, _LAYOUTS, 2, 3, 4)
    if M.ndim == 2:
        _checks.check_shape(_OP, name, M, "(D, N)", (channels, state))
    elif M.ndim == 3:
        _checks.check_shape(_OP, name, M, "(B, N, L)", (batch, state, length))
    else:
        groups = M.shape[1]
        _checks.check_shape(_OP, name, M, "(B, G, N, L)", (batch, groups, state, length))
        if groups < 1 or channels % groups:
            raise ValueError(f"{_OP}: {name} has {groups} groups; wants a number that divides the {channels} channels")


dispatch.register(_OP, ssm_scan, _check, cpu, triton, mlx, reference)
