"""One token of Mamba-2: one pass over the states, which are read and written where they are."""

from __future__ import annotations

import triton
import triton.language as tl
from fastlvm.kernels.triton.math import LOG2E, exp2, sigmoid, softplus
from torch import Tensor

_ELEMENTS = 4096  # of the state a program holds at a time


@triton.jit
def _step_kernel(
    state, x, dt, A, B, C, D, z, dt_bias, indices, out, states, heads, per_group, state_s, x_s, dt_s, A_s, B_s, C_s,
    D_s, z_s, bias_s, indices_s, out_s, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """BP channels of one head of one row."""
    zero = tl.full([], 0, tl.int64)
    TILES: tl.constexpr = (P + BP - 1) // BP
    pid = tl.program_id(0)
    p = zero + pid % TILES * BP + tl.arange(0, BP)
    h = zero + pid // TILES % heads
    b = zero + pid // TILES // heads
    place = b
    if indices is not None:
        place = zero + tl.load(indices + b * indices_s)
    here = p < P
    there = here & (place >= 0) & (place < states)  # nothing is read or written elsewhere
    g = h // per_group

    step = tl.load(dt + b * dt_s[0] + h * dt_s[1]).to(tl.float32)
    if dt_bias is not None:
        step += tl.load(dt_bias + h * bias_s).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    decay = exp2(step * tl.load(A + h * A_s).to(tl.float32) * LOG2E)
    inputs = tl.load(x + b * x_s[0] + h * x_s[1] + p * x_s[2], mask=here, other=0.0).to(tl.float32)

    at_state = state + place * state_s[0] + h * state_s[1] + p[:, None] * state_s[2]
    at_B, at_C = B + b * B_s[0] + g * B_s[1], C + b * C_s[0] + g * C_s[1]
    y = tl.zeros([BP], tl.float32)
    for first in range(0, N, BN):
        n = zero + first + tl.arange(0, BN)
        inside = n < N
        mask = there[:, None] & inside[None, :]
        at = at_state + n[None, :] * state_s[3]
        H = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [BP, BN]
        grown = tl.load(at_B + n * B_s[2], mask=inside, other=0.0).to(tl.float32)
        H = decay * H + (step * inputs)[:, None] * grown[None, :]
        tl.store(at, H, mask=mask)
        y += tl.sum(H * tl.load(at_C + n * C_s[2], mask=inside, other=0.0).to(tl.float32)[None, :], 1)
    if D is not None:
        y += tl.load(D + h * D_s[0] + p * D_s[1], mask=here, other=0.0).to(tl.float32) * inputs
    if z is not None:
        gate = tl.load(z + b * z_s[0] + h * z_s[1] + p * z_s[2], mask=here, other=0.0).to(tl.float32)
        y *= gate * sigmoid(gate)
    if indices is not None:
        y = tl.where(place < 0, 0.0, tl.where(place < states, y, float("nan")))
    tl.store(out + b * out_s[0] + h * out_s[1] + p * out_s[2], y, mask=here)


def step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, indices: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """Advance the states [S, h, p, n] and write `out` [b, h, p].

    A row whose index is negative gets zeros; one whose index is S or more gets NaN. Neither touches a state.
    """
    batch, heads, dim = x.shape
    groups, size = B.shape[1:]
    BN = min(triton.next_power_of_2(max(size, 1)), 512)
    BP = max(1, min(triton.next_power_of_2(max(dim, 1)), _ELEMENTS // BN))
    while BP > 8 and batch * heads * triton.cdiv(dim, BP) < 512:  # more programs where there are few
        BP //= 2
    programs = batch * heads * triton.cdiv(dim, BP)
    if not programs:
        return
    D_s = (0, 0) if D is None else (*D.stride(), 0)[:2]
    _step_kernel[(programs,)](
        state, x, dt, A, B, C, D, z, dt_bias, indices, out, state.shape[0], heads, heads // groups, state.stride(),
        x.stride(), dt.stride(), *A.stride(), B.stride(), C.stride(), D_s, (0, 0, 0) if z is None else z.stride(),
        *((0,) if dt_bias is None else dt_bias.stride()), *((0,) if indices is None else indices.stride()),
        out.stride(), P=dim, N=size, BP=BP, BN=BN, SOFTPLUS=dt_softplus, num_warps=4 if BP * BN >= 1024 else 1,
    )  # fmt: skip
