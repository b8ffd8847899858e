"""One token of the selective scan, as mamba_ssm has it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlvm.compat._checks import check_shape, refuse_complex
from fastlvm.errors import InputError
from fastlvm.ops import ssd_step, ssm_step


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Advance the states by one token in place; without gradients.

    Args:
        state: [S, dim, N] or [S, h, dim, N], written. S is b unless there are indices.
        x, dt, z: [b, dim] or [b, h, dim].
        A: [dim, N] or [h, dim, N], real.
        B, C: [b, N] or [b, g, N], shared by h / g heads each.
        D, dt_bias: [dim] or [h, dim].
        dt_softplus: take softplus of dt, linear above 20.
        state_batch_indices: [b], int32: row i advances the state of that index, no state twice. A negative one is
            padding: the row's output is zero and no state is touched.

    Returns:
        [b, dim] or [b, h, dim] in x's dtype, as the state has heads or not.

    Raises:
        InputError: a shape does not fit, or A is complex (a NotImplementedError, too).
        TypeError, ValueError: as `fastlvm.ssm_step`. No state has changed then.
    """
    op = "selective_state_update"
    refuse_complex(op, state=state, A=A)
    with_heads = state.ndim > 3
    state, A = _with_heads(state, 4, 1), _with_heads(A, 3, 0)
    x, dt, B, C = (_with_heads(M, 3, 1) for M in (x, dt, B, C))
    z = None if z is None else _with_heads(z, 3, 1)
    D, dt_bias = (None if M is None else _with_heads(M, 2, 0) for M in (D, dt_bias))
    _check(op, state, x, dt, A, B, C, D, z, dt_bias)
    step = _tied if _is_tied(dt, A, dt_bias) else _free
    out = step(state, x, dt, A, B, C, D, z, dt_bias, bool(dt_softplus), state_batch_indices)
    return out if with_heads else out[:, 0]


def _with_heads(x: Tensor, rank: int, axis: int) -> Tensor:
    return x.unsqueeze(axis) if x.ndim == rank - 1 else x


def _check(
    op: str,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    if state.ndim != 4 or B.ndim != 3:
        shapes = f"{tuple(state.shape)} and {tuple(B.shape)}"
        raise InputError(f"{op}: state and B have shapes {shapes}; wants (b, dim, N) or (b, h, dim, N), and (b, g, N)")
    _, heads, dim, size = state.shape
    batch, groups = len(x), B.shape[1]
    for name, M in (("x", x), ("dt", dt), ("z", z)):
        check_shape(op, name, M, "(b, h, dim)", (batch, heads, dim))
    check_shape(op, "A", A, "(h, dim, N)", (heads, dim, size))
    if groups < 1 or heads % groups:
        raise InputError(f"{op}: B has {groups} groups; wants a number that divides the {heads} heads")
    for name, M in (("B", B), ("C", C)):
        check_shape(op, name, M, "(b, g, N)", (batch, groups, size))
    for name, M in (("D", D), ("dt_bias", dt_bias)):
        check_shape(op, name, M, "(h, dim)", (heads, dim))


def _is_tied(dt: Tensor, A: Tensor, dt_bias: Tensor | None) -> bool:
    """Whether one step size and one decay serve a whole head, as in Mamba-2: told by strides of 0."""
    strides = [dt.stride(-1), A.stride(-1), A.stride(-2), 0 if dt_bias is None else dt_bias.stride(-1)]
    return not any(strides) and A.numel() > 0


def _tied(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    indices: Tensor | None,
) -> Tensor:
    bias = None if dt_bias is None else dt_bias[:, 0]
    out: Tensor = ssd_step(state, x, dt[..., 0], A[:, 0, 0], B, C, D, z, bias, dt_softplus, indices)
    return out


def _free(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    indices: Tensor | None,
) -> Tensor:
    """Heads are h runs of the h·dim channels that `ssm_step` knows, each group of B and C a run of such runs."""
    _, heads, dim, size = state.shape
    in_place = heads == 1 or state.stride(1) == dim * state.stride(2)
    channels = state.flatten(1, 2) if in_place else state.reshape(len(state), heads * dim, size)
    x_flat, dt_flat = x.flatten(1), dt.flatten(1)
    z_flat = None if z is None else z.flatten(1)
    D_flat, bias = (None if M is None else M.flatten() for M in (D, dt_bias))
    out = ssm_step(
        channels, x_flat, dt_flat, A.flatten(0, 1), B, C, D_flat, z_flat, bias, dt_softplus, state_indices=indices
    )
    if not in_place:
        state.copy_(channels.view_as(state))
    return out.view(x.shape)
