"""A model's layers for few rows: a row is one vector of one context, activations are float32, weights of any dtype.

A Mamba block is four launches: norm and in_proj; convolution, SiLU and x_proj; dt_proj, softplus, scan, D and gate;
out_proj and residual. Where x_proj has too few outputs to fill a GPU its inputs are split, and the scan adds the parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import early, layers_few
from .math import COMPILED, exp2, sigmoid, softplus

AT_ONCE: tl.constexpr = tl.constexpr(6)  # positions of a context whose scan is a straight line of code
CHANNELS = 4  # of one program of a scan of few contexts
UNIT: tl.constexpr = tl.constexpr(1e-3)  # a length this far from 1 is float16 rounding, and kept


class Conv(NamedTuple):
    """A causal depthwise convolution with SiLU: weight float32 [channels, width], bias float32 [channels]."""

    weight: Tensor
    bias: Tensor


@triton.jit
def _dot(a, b, total):
    if COMPILED:
        return tl.dot(a, b, total, input_precision="ieee")
    else:  # the interpreter would multiply the bits of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)


@triton.jit
def _linear(
    x,
    weight,
    bias,
    norm,
    conv_weight,
    conv_bias,
    residual,
    out,
    rows_count,
    positions,
    eps,
    x_stride,
    residual_stride,
    out_stride,
    split_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    GELU: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    each: tl.constexpr = (INPUTS + SPLITS * CHUNK - 1) // (SPLITS * CHUNK) * CHUNK
    column_there, row_there = columns < OUTPUTS, rows < rows_count
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for step in range(0, each, CHUNK):
        at = split * each + step + tl.arange(0, CHUNK)
        inside = at < INPUTS
        matrix = tl.load(
            weight + columns[None, :] * INPUTS + at[:, None], mask=inside[:, None] & column_there[None, :], other=0.0
        )
        if WIDTH == 0:
            value = tl.load(
                x + rows[:, None] * x_stride + at[None, :], mask=row_there[:, None] & inside[None, :], other=0.0
            )
        else:
            value = tl.zeros([ROWS, CHUNK], tl.float32) + tl.load(conv_bias + at, mask=inside, other=0.0)[None, :]
            for tap in tl.static_range(WIDTH):
                ago = WIDTH - 1 - tap
                seen = row_there & (rows % positions >= ago)
                past = tl.load(
                    x + (rows - ago)[:, None] * x_stride + at[None, :], mask=seen[:, None] & inside[None, :], other=0.0
                )
                value += past * tl.load(conv_weight + at * WIDTH + tap, mask=inside, other=0.0)[None, :]
            value *= sigmoid(value)
        if norm is not None:
            squares += tl.sum(value * value, axis=1)
            value *= tl.load(norm + at, mask=inside, other=0.0)[None, :]
        total = _dot(value.to(matrix.dtype), matrix, total)
    if norm is not None:
        total *= tl.rsqrt(squares / INPUTS + eps)[:, None]
    if bias is not None:
        total += tl.load(bias + columns, mask=column_there, other=0.0)[None, :]
    if GELU:
        total *= 0.5 * (1.0 + tl.erf(total * 0.7071067811865476))
    both = row_there[:, None] & column_there[None, :]
    if residual is not None:
        total += tl.load(residual + rows[:, None] * residual_stride + columns[None, :], mask=both, other=0.0)
    tl.store(out + split * split_stride + rows[:, None] * out_stride + columns[None, :], total, mask=both)


@triton.jit
def _asked(
    row,
    t,
    xz,
    parts,
    channels,
    there,
    states,
    ranks,
    split_stride,
    READ: tl.constexpr,
    INNER: tl.constexpr,
    STATES: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """What a token is made of, as it lies in memory: inputs of the convolution, z, and the parts of δ, B and C."""
    pasts = ()
    for tap in tl.static_range(WIDTH):
        ago = WIDTH - 1 - tap
        pasts += (tl.load(xz + (row - ago) * (2 * INNER) + channels, mask=there & (t >= ago), other=0.0),)
    z = tl.zeros_like(channels).to(tl.float32)
    if READ:
        z = tl.load(xz + row * (2 * INNER) + INNER + channels, mask=there, other=0.0)
    WIDE: tl.constexpr = RANK + 2 * STATES
    lows = ()
    Bs = ()
    Cs = ()
    for split in tl.static_range(SPLITS):
        part = parts + split * split_stride + row * WIDE
        lows += (tl.load(part + ranks, mask=ranks < RANK, other=0.0),)
        Bs += (tl.load(part + RANK + states, mask=states < STATES, other=0.0),)
        if READ:
            Cs += (tl.load(part + RANK + STATES + states, mask=states < STATES, other=0.0),)
    return pasts, z, lows, Bs, Cs


@triton.jit
def _together(parts):
    total = parts[0]
    for i in tl.static_range(1, len(parts)):
        total += parts[i]
    return total


@triton.jit
def _stepped(pasts, lows, taps, conv_b, dt_matrix, dt_b):
    """u and δ [channels] of a token."""
    u = conv_b
    for tap in tl.static_range(len(taps)):
        u += pasts[tap] * taps[tap]
    u *= sigmoid(u)
    return u, softplus(tl.sum(dt_matrix * _together(lows)[None, :], axis=1) + dt_b)


@triton.jit
def _moved(state, u, delta, B, A, FIRST: tl.constexpr):
    """The state [channels, states] after a token."""
    entering = (delta * u)[:, None] * B[None, :]
    if FIRST:
        return entering
    else:
        return exp2(delta[:, None] * A) * state + entering


@triton.jit
def _read(state, u, z, C, skip):
    """What a block's channels put out for a token."""
    return (tl.sum(state * C[None, :], axis=1) + skip * u) * z * sigmoid(z)


@triton.jit
def _scan(
    xz,
    parts,
    conv_weight,
    conv_bias,
    dt_weight,
    dt_bias,
    A_log2e,
    D,
    out,
    split_stride,
    POSITIONS: tl.constexpr,
    INNER: tl.constexpr,
    STATES: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES_2: tl.constexpr,
    RANK_2: tl.constexpr,
    EARLY: tl.constexpr,
):
    early.begin(EARLY)
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    window = tl.program_id(1).to(tl.int64)
    states = tl.arange(0, STATES_2)
    ranks = tl.arange(0, RANK_2)
    there = channels < INNER
    conv_b = tl.load(conv_bias + channels, mask=there, other=0.0)
    dt_b = tl.load(dt_bias + channels, mask=there, other=0.0)
    skip = tl.load(D + channels, mask=there, other=0.0)
    dt_matrix = tl.load(
        dt_weight + channels[:, None] * RANK + ranks[None, :], mask=there[:, None] & (ranks < RANK)[None, :], other=0.0
    ).to(tl.float32)
    A = tl.load(
        A_log2e + channels[:, None] * STATES + states[None, :],
        mask=there[:, None] & (states < STATES)[None, :],
        other=0.0,
    ).to(tl.float32)
    taps = ()
    for tap in tl.static_range(WIDTH):
        taps += (tl.load(conv_weight + channels * WIDTH + tap, mask=there, other=0.0),)
    early.wait(EARLY)
    state = tl.zeros([CHANNELS, STATES_2], tl.float32)
    if POSITIONS <= AT_ONCE:
        # every load before the first sum, as sums are barriers that no load passes
        asked = ()
        for t in tl.static_range(POSITIONS):
            asked += (
                _asked(
                    window * POSITIONS + t,
                    t,
                    xz,
                    parts,
                    channels,
                    there,
                    states,
                    ranks,
                    split_stride,
                    READ=not LAST or t == POSITIONS - 1,
                    INNER=INNER,
                    STATES=STATES,
                    RANK=RANK,
                    WIDTH=WIDTH,
                    SPLITS=SPLITS,
                ),
            )
        tokens = ()
        for t in tl.static_range(POSITIONS):
            tokens += (_stepped(asked[t][0], asked[t][2], taps, conv_b, dt_matrix, dt_b),)
        for t in tl.static_range(POSITIONS):
            u, delta = tokens[t]
            state = _moved(state, u, delta, _together(asked[t][3]), A, FIRST=t == 0)
            if not LAST:
                y = _read(state, u, asked[t][1], _together(asked[t][4]), skip)
                tl.store(out + (window * POSITIONS + t) * INNER + channels, y, mask=there)
            elif t == POSITIONS - 1:
                y = _read(state, u, asked[t][1], _together(asked[t][4]), skip)
                tl.store(out + window * INNER + channels, y, mask=there)
    else:
        for t in range(0, POSITIONS):
            pasts, z, lows, Bs, Cs = _asked(
                window * POSITIONS + t,
                t,
                xz,
                parts,
                channels,
                there,
                states,
                ranks,
                split_stride,
                READ=True,
                INNER=INNER,
                STATES=STATES,
                RANK=RANK,
                WIDTH=WIDTH,
                SPLITS=SPLITS,
            )
            u, delta = _stepped(pasts, lows, taps, conv_b, dt_matrix, dt_b)
            state = _moved(state, u, delta, _together(Bs), A, FIRST=False)
            y = _read(state, u, z, _together(Cs), skip)
            if LAST:
                tl.store(out + window * INNER + channels, y, mask=there & (t == POSITIONS - 1))
            else:
                tl.store(out + (window * POSITIONS + t) * INNER + channels, y, mask=there)


@triton.jit
def _normalised(x, weight, bias, columns, inside, eps, DIM: tl.constexpr, KIND: tl.constexpr):
    if KIND == "unit":
        # scaled by the largest first, so that no square overflows; of zeros NaN is made, as of infinity
        largest = tl.max(tl.abs(x), axis=0)
        scaled = tl.where(inside, x / largest, 0.0)
        length = largest * tl.sqrt(tl.sum(scaled * scaled, axis=0))
        far = tl.abs(length - 1.0) > UNIT
        x = tl.where(far | (length != length), scaled / tl.sqrt(tl.sum(scaled * scaled, axis=0)), x)
    elif KIND == "l2":
        square = tl.sum(x * x, axis=0)
        x = tl.where(square == 0.0, x, x / tl.sqrt(square))
    elif KIND == "rms":
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / DIM + eps)
        x = x * scale * tl.load(weight + columns, mask=inside, other=0.0)
    elif KIND == "layer":
        x = tl.where(inside, x - tl.sum(x, axis=0) / DIM, 0.0)
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / DIM + eps)
        x = x * scale * tl.load(weight + columns, mask=inside, other=0.0)
        x += tl.load(bias + columns, mask=inside, other=0.0)
    return x


@triton.jit
def _norms(
    x,
    weight,
    bias,
    first,
    out,
    eps,
    x_stride,
    DIM: tl.constexpr,
    BEFORE: tl.constexpr,
    BETWEEN: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    early.begin(EARLY)
    early.wait(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value = _normalised(value, weight, bias, columns, inside, eps, DIM, BEFORE)
    value = _normalised(value, weight, bias, columns, inside, eps, DIM, BETWEEN)
    if first is not None:
        tl.store(first + row * DIM + columns, value, mask=inside)
    value = _normalised(value, weight, bias, columns, inside, eps, DIM, KIND)
    if out is not None:
        tl.store(out + row * DIM + columns, value, mask=inside)


@triton.jit
def _mixed(
    context,
    weights,
    h,
    out,
    DIM: tl.constexpr,
    POSITIONS: tl.constexpr,
    L2: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    early.begin(EARLY)
    early.wait(EARLY)
    window = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    total = tl.zeros([BLOCK], tl.float32)
    for t in range(0, POSITIONS):
        vector = tl.load(context + (window * POSITIONS + t) * DIM + columns, mask=inside, other=0.0)
        total += vector * tl.load(weights + t)
    if h is not None:
        total += tl.load(h + window * DIM + columns, mask=inside, other=0.0)
    if L2:
        total = _normalised(total, weights, weights, columns, inside, 0.0, DIM, "l2")
    tl.store(out + window * DIM + columns, total, mask=inside)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    conv: Conv | None = None,
    positions: int = 1,
    gelu: bool = False,
    residual: Tensor | None = None,
    splits: int = 1,
) -> Tensor:
    """weight [outputs, inputs] times rows x float32 [rows, inputs], any stride between rows: float32 [rows, outputs].

    norm, eps: of an RMSNorm before it. conv: before it; a context is `positions` rows. bias [outputs]; gelu after it;
    residual float32 [rows, outputs], any stride between rows, added last. splits: of the inputs; with more than one
    the result is parts [splits, rows, outputs] to be summed, and norm, bias, gelu and residual cannot be had.
    """
    rows, (outputs, inputs) = len(x), weight.shape
    wide = weight.dtype == torch.float32
    out = torch.empty((splits, rows, outputs), dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out if splits > 1 else out[0]
    if layers_few.fits(rows, inputs, splits, weight, conv is not None):
        layers_few.linear(x, weight, out, bias, norm, eps, conv, positions, gelu, residual)
        return out if splits > 1 else out[0]
    if rows <= 16:
        block, columns, chunk, stages = 16, 16, 64 if wide else 256, 4
    elif rows <= 64:
        block, columns, chunk, stages = triton.next_power_of_2(rows), 32, 32 if wide else 128, 3
    else:
        block, columns, chunk, stages = 64, 64, 32 if wide else 64, 3
    if conv is not None:  # each tap is a load of its own
        chunk, stages = min(chunk, 128 if rows <= 16 else 64), 2
    chunk = max(16, min(chunk, triton.next_power_of_2(triton.cdiv(inputs, splits))))
    _linear[(triton.cdiv(outputs, columns), triton.cdiv(rows, block), splits)](
        x,
        weight,
        bias,
        norm,
        None if conv is None else conv.weight,
        None if conv is None else conv.bias,
        residual,
        out,
        rows,
        positions,
        eps,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        outputs,
        out.stride(0),
        INPUTS=inputs,
        OUTPUTS=outputs,
        WIDTH=0 if conv is None else conv.weight.shape[1],
        GELU=gelu,
        SPLITS=splits,
        ROWS=block,
        COLUMNS=columns,
        CHUNK=chunk,
        num_warps=4,
        num_stages=stages,
    )
    return out if splits > 1 else out[0]


def scan(
    xz: Tensor,
    parts: Tensor,
    conv: Conv,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log2e: Tensor,
    D: Tensor,
    positions: int,
    last: bool = False,
) -> Tensor:
    """What a Mamba block has before out_proj: float32 [rows, inner]; [rows / positions, inner] with `last`.

    xz: [x | z] float32 [rows, 2 inner] of in_proj. parts: [δ | B | C] float32 [splits, rows, rank + 2 N], to be summed.
    dt_weight [inner, rank]; dt_bias, D float32 [inner]; A_log2e [inner, N]: A / ln 2. last: of each context's newest
    token alone.
    """
    inner, states = A_log2e.shape
    windows = len(xz) // positions
    out = torch.empty((windows if last else len(xz), inner), dtype=torch.float32, device=xz.device)
    if windows == 0:
        return out
    states_2 = triton.next_power_of_2(states)
    channels = max(1, min(CHANNELS if windows < 8 else 16, 2048 // states_2))
    _scan[(triton.cdiv(inner, channels), windows)](
        xz,
        parts,
        conv.weight,
        conv.bias,
        dt_weight,
        dt_bias,
        A_log2e,
        D,
        out,
        parts.stride(0),
        POSITIONS=positions,
        INNER=inner,
        STATES=states,
        RANK=dt_weight.shape[1],
        WIDTH=conv.weight.shape[1],
        SPLITS=len(parts),
        LAST=last,
        CHANNELS=channels,
        STATES_2=states_2,
        RANK_2=triton.next_power_of_2(dt_weight.shape[1]),
        num_warps=4,
        **early.options(),
    )
    return out


def norms(
    x: Tensor,
    before: tuple[str, ...] = (),
    kind: str | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of x [rows, dim] after the norms `before`, and those after `kind` too: float32, one tensor twice without.

    before: at most two of "unit" (divided by a length that is far from 1; NaN for zeros) and "l2". kind: "l2", "rms"
    with weight float32 [dim], or "layer" with bias too. device: of the results, where x is pinned memory of the host.
    """
    rows, dim = x.shape
    device = device or x.device
    first = torch.empty((rows, dim), dtype=torch.float32, device=device) if before or kind is None else None
    out = torch.empty((rows, dim), dtype=torch.float32, device=device) if kind is not None else None
    one, two = (*before, "", "")[:2]
    if x.numel():
        _norms[(rows,)](
            x,
            weight,
            bias,
            first,
            out,
            eps,
            x.stride(0),
            DIM=dim,
            BEFORE=one,
            BETWEEN=two,
            KIND=kind or "",
            BLOCK=triton.next_power_of_2(dim),
            num_warps=4,
            **early.options(),
        )
    first = first if first is not None else out
    assert first is not None
    return first, first if out is None else out


def mixed(context: Tensor, weights: Tensor, h: Tensor | None = None, l2: bool = False) -> Tensor:
    """h + Σ weights[t] context[:, t], of length 1 with l2: float32 [n, dim].

    context: float32 [n, positions, dim], contiguous; weights float32 [positions]; h float32 [n, dim], None = 0.
    """
    n, positions, dim = context.shape
    out = torch.empty((n, dim), dtype=torch.float32, device=context.device)
    if n:
        _mixed[(n,)](
            context,
            weights,
            h,
            out,
            DIM=dim,
            POSITIONS=positions,
            L2=l2,
            BLOCK=triton.next_power_of_2(dim),
            num_warps=4,
            **early.options(),
        )
    return out
