"""The scan of Mamba-2 as mamba_ssm has it, alone and with what stands around it in a block."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlvm.compat._checks import (
    before_first,
    check_activation,
    check_seq_idx,
    check_shape,
    one_row,
    refuse_complex,
    runs,
)
from fastlvm.compat.causal_conv1d import causal_conv1d_fn
from fastlvm.compat.mamba_ssm.norms import rmsnorm_fn, wide
from fastlvm.errors import InputError
from fastlvm.ops import ssd_scan

_NO_LIMIT = (0.0, math.inf)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """Run the scan of Mamba-2, with gradients for every tensor, through the states too.

    Args:
        x, z: [B, L, H, P].
        dt: [B, L, H].
        A: [H], real.
        B, C: [B, L, G, N], each group shared by H / G heads.
        chunk_size: of no effect, the ops choose their own.
        D: [H] or [H, P].
        dt_bias: [H].
        initial_states: [B, H, P, N]; with `seq_idx` they go before the sequence of index 0 that begins a row.
        seq_idx: [B, L], int32: neighbours of the same index are one sequence, which sees nothing before it.
        cu_seqlens: offsets [S + 1] of packed sequences, for `return_varlen_states` only; `seq_idx` keeps the output of
            one from the next.
        dt_softplus: take softplus of dt, linear above 20.
        dt_limit: the least and the largest step size, after bias and softplus.
        return_final_states: also return the states after the last step of every row.
        return_varlen_states: also return those after every sequence of `cu_seqlens`; B is 1 then.
        state_dtype: dtype of the states of sequences; C's when None.

    Returns:
        [B, L, H, P] in x's dtype, or a tuple of it, the final states [B, H, P, N] in float32 (float64 for float64) and
        the states of the sequences [S, H, P, N], as wanted.

    Raises:
        InputError: `seq_idx`, `cu_seqlens` or `dt_limit` does not fit, or A is complex (a NotImplementedError, too).
        TypeError, ValueError: as `fastlvm.ssd_scan`.
    """
    op = "mamba_chunk_scan_combined"
    refuse_complex(op, A=A, B=B, C=C)
    steps = finished_steps(op, dt, dt_bias, bool(dt_softplus), dt_limit)
    offsets = _offsets(op, x, cu_seqlens) if return_varlen_states else None
    out, final, apart = _scan(op, x, steps, A, B, C, D, z, initial_states, seq_idx, offsets)
    results = [out]
    if return_final_states:
        results.append(final)
    if offsets is not None:
        if apart is None:
            apart = _states(x, steps, A, B, C, initial_states, offsets)
        results.append(apart.to(C.dtype if state_dtype is None else state_dtype))
    return results[0] if len(results) == 1 else tuple(results)


def finished_steps(
    op: str, dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float]
) -> tuple[Tensor, Tensor | None, bool]:
    """dt, bias and flag as the scan takes them; what it has no argument for is done here, in float32."""
    least, most = dt_limit
    if not 0 <= least <= most:
        raise InputError(f"{op}: dt_limit is {tuple(dt_limit)}; wants 0 or more, and no less than that")
    if dt_softplus and (least, most) == _NO_LIMIT:
        return dt, dt_bias, True
    held = wide(dt)
    if dt_bias is not None:
        check_shape(op, "dt_bias", dt_bias, "(H,)", tuple(dt.shape[-1:]))
        held = held + dt_bias.to(held.dtype)
    if dt_softplus:
        held = F.softplus(held, threshold=20.0)
    return held.clamp(least, most), None, False


def _offsets(op: str, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        raise InputError(f"{op}: return_varlen_states is set without cu_seqlens; pass the offsets of the sequences")
    if len(x) != 1:
        raise InputError(f"{op}: x has batch size {len(x)}; wants 1 with return_varlen_states")
    if cu_seqlens.ndim != 1 or not len(cu_seqlens) or cu_seqlens[-1] > x.shape[1]:
        raise InputError(f"{op}: cu_seqlens are not offsets into {x.shape[1]} tokens; wants 0 first, never falling")
    return cu_seqlens.cpu().long()


def _scan(
    op: str,
    x: Tensor,
    steps: tuple[Tensor, Tensor | None, bool],
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, final state of every row, and the states at `offsets` if those are where the sequences end."""
    dt, dt_bias, dt_softplus = steps
    if seq_idx is None or not seq_idx.numel():
        return *ssd_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_states, True), None
    check_seq_idx(op, seq_idx, *x.shape[:2])
    for name, M in (("dt", dt), ("B", B), ("C", C), ("z", z)):
        if M is not None and M.shape[:2] != x.shape[:2]:
            raise InputError(f"{op}: {name} has shape {tuple(M.shape)}; wants {tuple(x.shape[:2])} first, as x")
    packed = runs(seq_idx)
    start = None
    if initial_states is not None:
        check_shape(op, "initial_states", initial_states, "(B, H, P, N)", (len(x), *x.shape[2:], B.shape[-1]))
        start = before_first(initial_states * (seq_idx[:, 0] == 0).view(-1, 1, 1, 1), packed)
    x_row, dt_row, B_row, C_row = (one_row(M) for M in (x, dt, B, C))
    z_row = None if z is None else one_row(z)
    out, states = ssd_scan(
        x_row, dt_row, A, B_row, C_row, D, z_row, dt_bias, dt_softplus, start, True, cu_seqlens=packed.offsets
    )
    same = offsets is not None and torch.equal(offsets, packed.offsets)
    return out.view(x.shape), states[packed.last], states if same else None


def _states(
    x: Tensor,
    steps: tuple[Tensor, Tensor | None, bool],
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None,
    offsets: Tensor,
) -> Tensor:
    """The states [S, H, P, N] after the sequences between `offsets`, each by itself."""
    (dt, dt_bias, dt_softplus), length = steps, int(offsets[-1])
    x, dt, B, C = (M[:, :length] for M in (x, dt, B, C))
    start = None
    if initial_states is not None:
        later = initial_states.new_zeros(max(len(offsets) - 2, 0), *initial_states.shape[1:])
        start = torch.cat([initial_states, later])
    states: Tensor = ssd_scan(x, dt, A, B, C, None, None, dt_bias, dt_softplus, start, True, cu_seqlens=offsets)[1]
    return states


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Any:
    """What a Mamba-2 block does after its first projection, with gradients for every tensor.

    Args:
        zxbcdt: [B, L, 2 d_mlp + 2 dim + 2 G N + H], in this order: gate and input of d_mlp channels that skip the scan,
            gate z and input x of the dim = H P that do not, B, C, dt.
        conv1d_weight: [dim + 2 G N, W]; `conv1d_bias` [dim + 2 G N].
        dt_bias, A: [H]; dt goes through softplus.
        D: [H], with `headdim` P, or [H, P].
        chunk_size: of no effect.
        initial_states, seq_idx, dt_limit: as `mamba_chunk_scan_combined`.
        return_final_states: also return the states [B, H, P, N] after the last step.
        activation: of the convolution: None, "silu" or "swish".
        rmsnorm_weight: [dim] of a gated RMS norm over dim / G channels each; None gates only.
        rmsnorm_eps: added to the mean square.
        outproj_weight, outproj_bias: [d_model, d_mlp + dim] and [d_model], of the last projection, if any.
        headdim: P; may be None where D tells it.
        ngroups: G.
        norm_before_gate: gate the normalised output instead of normalising the gated one.

    Returns:
        [B, L, d_model], or [B, L, d_mlp + dim] without a projection; with `return_final_states` a pair of it and
        the states.

    Raises:
        InputError: a shape or an argument does not fit.
        TypeError, ValueError: as `fastlvm.ssd_scan`.
    """
    op = "mamba_split_conv1d_scan_combined"
    check_activation(op, activation)
    head_dim = D.shape[1] if D.ndim > 1 else headdim
    if head_dim is None:
        raise InputError(f"{op}: headdim is None; wants the channels of a head with a D of shape {tuple(D.shape)}")
    if outproj_weight is None and outproj_bias is not None:
        raise InputError(f"{op}: outproj_bias is given without outproj_weight; pass both")
    heads = len(D)
    if ngroups < 1 or heads % ngroups:
        raise InputError(f"{op}: ngroups is {ngroups}; wants a number that divides the {heads} heads")
    dim = heads * head_dim
    size = (len(conv1d_weight) - dim) // (2 * ngroups)
    mlp = (zxbcdt.shape[-1] - 2 * dim - 2 * ngroups * size - heads) // 2
    widths = [2 * max(mlp, 0), dim, dim + 2 * ngroups * size, heads]
    check_shape(op, "zxbcdt", zxbcdt, "(B, L, 2 d_mlp + 2 dim + 2 G N + H)", (*zxbcdt.shape[:2], sum(widths)))
    skip, z, xbc, dt = zxbcdt.split(widths, dim=-1)
    xbc = causal_conv1d_fn(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    x, B, C = xbc.transpose(1, 2).split([dim, ngroups * size, ngroups * size], dim=-1)
    z_heads = z.unflatten(-1, (heads, head_dim)) if rmsnorm_weight is None else None
    out, final = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, head_dim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, size)),
        C.unflatten(-1, (ngroups, size)),
        chunk_size,
        D,
        z_heads,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    out = out.flatten(2)
    if rmsnorm_weight is not None:
        out = rmsnorm_fn(out, rmsnorm_weight, None, z, rmsnorm_eps, dim // ngroups, norm_before_gate)
    if mlp > 0:
        out = torch.cat([gated(skip), out], dim=-1)
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    return (out, final) if return_final_states else out


def gated(x: Tensor) -> Tensor:
    """[..., 2 d] → [..., d]: the second half, gated by SiLU of the first."""
    gate, held = x.chunk(2, dim=-1)
    return F.silu(gate) * held
