"""Products with at most 16 rows: every weight of a program is on its way before the first of its rows is waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import early
from .math import COMPILED, sigmoid

if TYPE_CHECKING:
    from .layers import Conv

ROWS = 16
MOST, MOST_CONVOLVED = 2048, 512  # inputs of one program, that its registers hold


@triton.jit
def _product(a, b):
    if COMPILED:
        return tl.dot(a, b, input_precision="ieee")
    else:  # the interpreter would multiply the bits of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32))


@triton.jit
def _few(
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
    STEPS: tl.constexpr,
    WAYS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Inputs are dealt to WAYS warps in chunks, in STEPS rounds; their sums are added at the end."""
    early.begin(EARLY)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    column_there, row_there = columns < OUTPUTS, rows < rows_count
    own = tl.arange(0, WAYS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]  # [ways, chunk]
    first = split * (STEPS * WAYS * CHUNK)
    matrices = ()
    for step in tl.static_range(STEPS):
        at = first + step * (WAYS * CHUNK) + own
        matrices += (
            tl.load(
                weight + columns[None, None, :] * INPUTS + at[:, :, None],
                mask=(at < INPUTS)[:, :, None] & column_there[None, None, :],
                other=0.0,
            ),
        )
    scales = ()
    if norm is not None:
        for step in tl.static_range(STEPS):
            at = first + step * (WAYS * CHUNK) + own
            scales += (tl.load(norm + at, mask=at < INPUTS, other=0.0),)
    taps = ()
    biases = ()
    if WIDTH > 0:
        for step in tl.static_range(STEPS):
            at = first + step * (WAYS * CHUNK) + own
            biases += (tl.load(conv_bias + at, mask=at < INPUTS, other=0.0),)
            for tap in tl.static_range(WIDTH):
                taps += (tl.load(conv_weight + at * WIDTH + tap, mask=at < INPUTS, other=0.0),)
    offset = tl.zeros([COLUMNS], tl.float32)
    if bias is not None:
        offset = tl.load(bias + columns, mask=column_there, other=0.0)
    scales, taps, biases = early.all_here(scales, EARLY), early.all_here(taps, EARLY), early.all_here(biases, EARLY)
    early.wait(EARLY)
    both = row_there[:, None] & column_there[None, :]
    added = tl.zeros([ROWS, COLUMNS], tl.float32)
    if residual is not None:
        added = tl.load(residual + rows[:, None] * residual_stride + columns[None, :], mask=both, other=0.0)
    pasts = ()
    for step in tl.static_range(STEPS):
        at = first + step * (WAYS * CHUNK) + own
        for tap in tl.static_range(WIDTH if WIDTH > 0 else 1):
            ago = WIDTH - 1 - tap if WIDTH > 0 else 0
            seen = row_there & (rows % positions >= ago) if WIDTH > 0 else row_there
            pasts += (
                tl.load(
                    x + (rows - ago)[None, :, None] * x_stride + at[:, None, :],
                    mask=seen[None, :, None] & (at < INPUTS)[:, None, :],
                    other=0.0,
                ),
            )
    pasts = early.all_here(pasts, EARLY)
    total = tl.zeros([WAYS, ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([WAYS, ROWS, CHUNK], tl.float32)
    for step in tl.static_range(STEPS):
        if WIDTH == 0:
            value = pasts[step]
        else:
            value = tl.zeros([WAYS, ROWS, CHUNK], tl.float32) + biases[step][:, None, :]
            for tap in tl.static_range(WIDTH):
                value += pasts[step * WIDTH + tap] * taps[step * WIDTH + tap][:, None, :]
            value *= sigmoid(value)
        if norm is not None:
            squares += value * value
            value *= scales[step][:, None, :]
        total += _product(value.to(weight.dtype.element_ty), matrices[step])
    found = tl.sum(total, axis=0)
    if norm is not None:
        found *= tl.rsqrt(tl.sum(tl.sum(squares, axis=2), axis=0) / INPUTS + eps)[:, None]
    found += offset[None, :]
    if GELU:
        found *= 0.5 * (1.0 + tl.erf(found * 0.7071067811865476))
    found += added
    tl.store(out + split * split_stride + rows[:, None] * out_stride + columns[None, :], found, mask=both)


def fits(rows: int, inputs: int, splits: int, weight: Tensor, conv: bool) -> bool:
    """Whether `linear` can take it."""
    most = MOST_CONVOLVED if conv else MOST
    return rows <= ROWS and weight.dtype != torch.float32 and triton.cdiv(inputs, splits) <= most


def linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    conv: Conv | None,
    positions: int,
    gelu: bool,
    residual: Tensor | None,
) -> None:
    """As `layers.linear`, into out float32 [splits, rows, outputs]."""
    splits, rows, outputs = out.shape
    inputs = weight.shape[1]
    each = triton.cdiv(inputs, splits)
    ways = 16 if each > 1024 else 8
    chunk = max(16, min(32, triton.next_power_of_2(triton.cdiv(each, ways))))
    if conv is not None:
        chunk = 16
    _few[(triton.cdiv(outputs, 16), splits)](
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
        STEPS=triton.cdiv(each, ways * chunk),
        WAYS=ways,
        CHUNK=chunk,
        ROWS=ROWS,
        COLUMNS=16,
        num_warps=ways,
        **early.options(),
    )
