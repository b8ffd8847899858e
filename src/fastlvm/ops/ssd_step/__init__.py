"""One token of the state space dual (SSD) form of Mamba-2."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _checks, _step, dispatch
from fastlvm.ops.ssd_step import cpu, mlx, reference, triton

_OP = "ssd_step"
_OPTIONAL = ("D", "z", "dt_bias")


def ssd_step(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
    state_indices: Any = None,
    *,
    backend: str = "auto",
) -> Any:
    """Advance the states by one token in place: `H = exp(dt A) H + dt x Bᵀ`, `out = (H C + D x) · silu(z)`.

    What `fastlvm.ssd_scan` does to a sequence of length 1, without a copy of the state. numpy arrays in, numpy array
    out; torch tensors or mlx arrays in, the same out, without gradients. Any strides are read, and those of the state
    written, as they are; an mlx state gets other memory, and what shares the old one keeps its values. Dtypes are
    float32, float16 and bfloat16 (not numpy's), each array its own, computed in float32; or float64 throughout. A state
    of 16 bits is rounded at every token. torch.autocast changes no dtype.

    Args:
        state: [S, h, p, n], written; no other argument may share its memory. S is b unless there are `state_indices`.
        x: input [b, h, p]: h heads of p channels. Any size may be 0.
        dt: step sizes [b, h], before `dt_bias` and softplus.
        A: [h], real; negative for a state that decays.
        B, C: [b, g, n], shared by h / g heads each.
        D: skip weights, [h] or [h, p].
        z: gate [b, h, p]; the output is multiplied by silu(z).
        dt_bias: [h], added to dt.
        dt_softplus: take softplus of dt, linear above 20.
        state_indices: [b], int32 or int64: row i advances state[state_indices[i]], no state twice. A negative index is
            padding: the row's output is zero and no state is touched. On a GPU their values are not checked: an index
            of S or more touches no state either, and its row is NaN.
        backend: "auto", or a name that `fastlvm.explain("ssd_step", ...)` lists.

    Returns:
        Output [b, h, p] in x's dtype.

    Raises:
        TypeError: an argument is no array, of another kind than state, or of a dtype that is not taken.
        ValueError: a rank, a shape, a device or an index does not fit, the state is read-only or its elements overlap,
            an argument requires grad in grad mode, or the backend named cannot run the call. No state has changed then.

    Source: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
    Space Duality", 2024.
    """
    args = (state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_indices)
    _check(*args)
    return dispatch.choose(_OP, backend, args).run(*args)


def _check(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    dt_bias: Any,
    dt_softplus: bool,
    state_indices: Any,
) -> None:
    named = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    _step.check_arrays(_OP, "ssd_scan", _OPTIONAL, named, state_indices)
    _checks.check_flag(_OP, "dt_softplus", dt_softplus)

    _checks.check_rank(_OP, "x", x, "(b, h, p)", 3)
    _checks.check_rank(_OP, "B", B, "(b, g, n)", 3)
    batch, heads, channels = x.shape
    groups, size = B.shape[1:]
    _checks.check_shape(_OP, "B", B, "(b, g, n)", (batch, groups, size))
    if groups < 1 or heads % groups:
        raise ValueError(f"{_OP}: B has {groups} groups; wants a number that divides the {heads} heads")
    _checks.check_shape(_OP, "C", C, "(b, g, n)", (batch, groups, size))
    _step.check_states(_OP, state, state_indices, batch, "h, p, n", (heads, channels, size))
    _checks.check_shape(_OP, "dt", dt, "(b, h)", (batch, heads))
    _checks.check_shape(_OP, "A", A, "(h,)", (heads,))
    if D is not None:
        _checks.check_rank(_OP, "D", D, "(h,) or (h, p)", 1, 2)
        whole = D.ndim == 2
        _checks.check_shape(_OP, "D", D, "(h, p)" if whole else "(h,)", (heads, channels) if whole else (heads,))
    _checks.check_shape(_OP, "z", z, "(b, h, p)", (batch, heads, channels))
    _checks.check_shape(_OP, "dt_bias", dt_bias, "(h,)", (heads,))


dispatch.register(_OP, ssd_step, _check, cpu, triton, mlx, reference)
