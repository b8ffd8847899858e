"""One token of the selective scan: the state is read and written once, which is what takes the time."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .math import LOG2E, exp2, sigmoid, softplus


@triton.jit
def _step(
    state, x, delta, A, B, C, D, z, delta_bias, indices, out,
    h_s, h_d, h_n, x_b, x_d, dt_b, dt_d, A_d, A_n, B_b, B_g, B_n, C_b, C_g, C_n, D_d, z_b, z_d, bias_d, o_b, o_d,
    states, channels, N, per_B, per_C,
    SOFTPLUS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    d = (tl.program_id(0) * BD + tl.arange(0, BD)[:, None]).to(tl.int64)  # [BD, 1]
    in_d = d < channels
    slot, missing = b, False
    if indices is not None:
        slot = tl.load(indices + b).to(tl.int64)
        missing = slot >= states
    here = in_d & (slot >= 0) & (slot < states)
    u = tl.load(x + b * x_b + d * x_d, in_d, 0.0).to(tl.float32)
    dt = tl.load(delta + b * dt_b + d * dt_d, in_d, 0.0).to(tl.float32)
    if delta_bias is not None:
        dt += tl.load(delta_bias + d * bias_d, in_d, 0.0).to(tl.float32)
    if SOFTPLUS:
        dt = softplus(dt)
    y = tl.zeros([BD, 1], tl.float32)
    for first in range(0, N, BN):
        n = (first + tl.arange(0, BN)[None, :]).to(tl.int64)  # [1, BN]
        both = here & (n < N)
        a = tl.load(A + d * A_d + n * A_n, both, 0.0).to(tl.float32) * LOG2E
        B_n_ = tl.load(B + b * B_b + (d // per_B) * B_g + n * B_n, both, 0.0).to(tl.float32)
        C_n_ = tl.load(C + b * C_b + (d // per_C) * C_g + n * C_n, both, 0.0).to(tl.float32)
        place = state + slot * h_s + d * h_d + n * h_n
        h = exp2(dt * a) * tl.load(place, both, 0.0).to(tl.float32) + (dt * u) * B_n_
        tl.store(place, h, both)
        y += tl.sum(h * C_n_, 1, keep_dims=True)
    if D is not None:
        y += tl.load(D + d * D_d, in_d, 0.0).to(tl.float32) * u
    if z is not None:
        gate = tl.load(z + b * z_b + d * z_d, in_d, 0.0).to(tl.float32)
        y = y * gate * sigmoid(gate)
    y = tl.where(here, y, 0.0)
    if indices is not None:
        y = tl.where(missing, float("nan"), y)
    tl.store(out + b * o_b + d * o_d, y, in_d)


def ssm_step(
    state: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, indices: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """Write `out` [b, D] and advance `state` [S, D, N] in place; row i has state i, or the one its index says.

    A negative index is padding, its output zero; one of S or more reads and writes no state, its output is NaN.
    """
    batch, channels = x.shape
    N = A.shape[1]
    if not (batch and channels):
        return
    grouped = [M if M.ndim == 3 else M[:, None] for M in (B, C)]  # [b, G, N]
    groups: list[Any] = [channels // M.shape[1] for M in grouped]
    BN = min(256, triton.next_power_of_2(max(N, 1)))
    BD = max(1, min(2048 // BN, triton.next_power_of_2(channels)))
    strides = (
        *state.stride(), *x.stride(), *delta.stride(), *A.stride(), *(s for M in grouped for s in M.stride()),
        D.stride(0) if D is not None else 0, *(z.stride() if z is not None else (0, 0)),
        delta_bias.stride(0) if delta_bias is not None else 0, *out.stride(),
    )  # fmt: skip
    _step[(triton.cdiv(channels, BD), batch)](
        state, x, delta, A, *grouped, D, z, delta_bias, indices, out, *strides, state.shape[0], channels, N, *groups,
        SOFTPLUS=delta_softplus, BD=BD, BN=BN, num_warps=4,
    )  # fmt: skip
