"""The scan of Mamba-2 (state space duality)."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _checks, dispatch
from fastlvm.ops.ssd_scan import cpu, mlx, reference, triton

_OP = "ssd_scan"
_OPTIONAL = ("D", "z", "dt_bias", "initial_state")


def ssd_scan(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
    initial_state: Any = None,
    return_final_state: bool = False,
    cu_seqlens: Any = None,
    *,
    backend: str = "auto",
) -> Any:
    """Run the scan of Mamba-2: `H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_tᵀ`, `out_t = (H_t C_t + D x_t) · silu(z_t)`.

    numpy arrays in, numpy arrays out; torch tensors or mlx arrays in, the same out, with gradients for every array,
    through the final state too. Any strides are read as they are. Dtypes are float32, float16 and bfloat16 (not
    numpy's), each array its own, with a float32 state; or float64 throughout. torch.autocast changes none of them. On a
    GPU, where chunks of time are products of matrices, a NaN in x reaches the whole chunk of its channel.

    Args:
        x: input [B, L, H, P]: H heads of P channels. Any size may be 0.
        dt: step sizes [B, L, H], before `dt_bias` and softplus.
        A: [H], one real number a head; negative for a state that decays.
        B, C: [B, L, G, N], each group shared by H / G heads.
        D: skip weights [H] or [H, P].
        z: gate [B, L, H, P]; the output is multiplied by silu(z).
        dt_bias: [H], added to dt.
        dt_softplus: take softplus of dt, linear above 20.
        initial_state: [B, H, P, N] before the first step; zero when None.
        return_final_state: also return the state after the last step.
        cu_seqlens: offsets [S + 1] of S packed sequences, int32 or int64 on the CPU: 0 first, never falling, L last.
            B is 1 then, sequence s is times [cu_seqlens[s], cu_seqlens[s + 1]), maybe none, of every array of time,
            and the states are [S, H, P, N]; the results are those of every sequence alone.
        backend: "auto", or a name that `fastlvm.explain("ssd_scan", ...)` lists.

    Returns:
        Output [B, L, H, P] in x's dtype; with `return_final_state` a pair of it and the state [B, H, P, N] in float32
        (float64 for float64), which a next call takes as `initial_state`.

    Raises:
        TypeError: an argument is no array, of another kind than x, or of a dtype that is not taken.
        ValueError: a rank, a shape, a device or an offset does not fit, or the backend named cannot run the call.

    Source: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
    Space Duality", 2024.
    """
    args = (x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    _check(*args)
    _checks.check_flag(_OP, "return_final_state", return_final_state)
    out, final_state = dispatch.choose(_OP, backend, args).run(*args, bool(return_final_state))
    return (out, final_state) if return_final_state else out


def _check(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    dt_bias: Any,
    dt_softplus: bool,
    initial_state: Any,
    cu_seqlens: Any,
) -> None:
    named = {"x": x, "dt": dt, "A": A, "B": B, "C": C}
    named.update({"D": D, "z": z, "dt_bias": dt_bias, "initial_state": initial_state})
    _checks.check_arrays(_OP, _OPTIONAL, named)
    _checks.check_flag(_OP, "dt_softplus", dt_softplus)

    _checks.check_rank(_OP, "x", x, "(B, L, H, P)", 4)
    _checks.check_rank(_OP, "B", B, "(B, L, G, N)", 4)
    sequences = _checks.check_sequences(_OP, "x", x, cu_seqlens)
    batch, length, heads, dim = x.shape
    groups, state = B.shape[2:]
    _checks.check_shape(_OP, "dt", dt, "(B, L, H)", (batch, length, heads))
    _checks.check_shape(_OP, "A", A, "(H,)", (heads,))
    _checks.check_shape(_OP, "B", B, "(B, L, G, N)", (batch, length, groups, state))
    if groups < 1 or heads % groups:
        raise ValueError(f"{_OP}: B has {groups} groups; wants a number that divides the {heads} heads")
    _checks.check_shape(_OP, "C", C, "(B, L, G, N)", (batch, length, groups, state))
    if D is not None:
        _checks.check_rank(_OP, "D", D, "(H,) or (H, P)", 1, 2)
        _checks.check_shape(_OP, "D", D, "(H,)" if D.ndim == 1 else "(H, P)", (heads, dim)[: D.ndim])
    _checks.check_shape(_OP, "z", z, "(B, L, H, P)", (batch, length, heads, dim))
    _checks.check_shape(_OP, "dt_bias", dt_bias, "(H,)", (heads,))
    letters = "(B, H, P, N)" if cu_seqlens is None else "(S, H, P, N)"
    _checks.check_shape(_OP, "initial_state", initial_state, letters, (sequences, heads, dim, state))


dispatch.register(_OP, ssd_scan, _check, cpu, triton, mlx, reference)
