"""InfoNCE over blocks of queries: logits by torch's matrix product, then one kernel for their sums and gradients.

A block of logits is in memory at a time, and the gradient of the losses by the logits takes its place there. A program
works on a row, in tiles [R, C] whose columns stay with their threads: maxima and sums are joined once a row.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_BYTES = 96 * 1024**2  # of a block's logits, in float32
LEAST_ROWS = 128  # of a block, whatever they take: the matrix products need them
_FP16_SCALE = 4096.0  # of probabilities in float16, most of which would be subnormal


@triton.jit
def _left_out(mask, m_j, ours, theirs, t_g, own, at, columns, G: tl.constexpr):
    """[R, C]: which of the keys `at` are no negatives of this row's query, whose positive is key `own`."""
    inside = at < columns
    if mask is not None:
        out = tl.load(mask + at * m_j, mask=inside, other=0) != 0
    else:
        out = at < 0
        for g in range(G):  # not unrolled: 16 labels would not fit in registers
            label = tl.load(ours + g)
            out |= (tl.load(theirs + g * t_g + at, mask=inside, other=-1) == label) & (label >= 0)
    return out & (at != own)


@triton.jit
def _rows(
    logits,  # [rows, M] float32: products of vectors
    row_stride,
    slopes, slopes_stride,  # the same memory, in the dtype of the gradients by the logits
    losses, log_sums, weights,  # [B], read or written where given
    mask, m_i, m_j,  # bool [B, M]
    ours, theirs, t_g,  # int64 labels [B, G] and, each column by itself, [G, M]
    first, columns, inverse_temperature, scale,
    SUMS: tl.constexpr, SLOPES: tl.constexpr, NARROW: tl.constexpr, G: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """With SUMS the loss of a row and the logarithm of its sum, else that is given; with SLOPES the gradients."""
    row = tl.program_id(0).to(tl.int64)
    own = first + row
    logits += row * row_stride
    if mask is not None:
        mask += own * m_i
    if ours is not None:
        ours += own * G
    positive = tl.load(logits + own) * inverse_temperature
    offsets = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]

    top, total = 0.0, 1.0
    if SUMS:
        tops = tl.full([C], float("-inf"), tl.float32)
        sums = tl.zeros([C], tl.float32)
        begin = own * 0
        while begin < columns:
            at = begin + offsets
            x = tl.load(logits + at, mask=at < columns, other=float("-inf")) * inverse_temperature
            if mask is not None or ours is not None:
                out = _left_out(mask, m_j, ours, theirs, t_g, own, at, columns, G)
                x = tl.where(out, float("-inf"), x)
                if SLOPES:  # for the second time around
                    tl.store(logits + at, float("-inf"), mask=out)
            higher = tl.maximum(tops, tl.max(x, axis=0))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            sums = sums * tl.exp(tops - base) + tl.sum(tl.exp(x - base[None, :]), axis=0)
            tops = higher
            begin += R * C
        top = tl.max(tops, axis=0)
        total = tl.sum(sums * tl.exp(tops - top), axis=0)
        log_sum = top + tl.log(total)
        tl.store(losses + own, tl.log(total) + (top - positive))
        tl.store(log_sums + own, log_sum)
    else:
        top = tl.load(log_sums + own)

    if SLOPES:
        if SUMS:
            tl.debug_barrier()
        slopes += row * slopes_stride
        factor = scale / total
        at_own = scale
        if weights is not None:
            weight = tl.load(weights + own).to(tl.float32)
            factor *= weight
            at_own *= weight
        begin = own * 0
        while begin < columns:
            at = begin + offsets
            x = tl.load(logits + at, mask=at < columns, other=float("-inf")) * inverse_temperature
            if not SUMS and (mask is not None or ours is not None):
                x = tl.where(_left_out(mask, m_j, ours, theirs, t_g, own, at, columns, G), float("-inf"), x)
            p = tl.exp(x - top) * factor
            p = tl.where(at == own, p - at_own, p)
            if NARROW:  # what is written lies where others may still have to read
                tl.debug_barrier()
            tl.store(slopes + at, p.to(slopes.dtype.element_ty), mask=at < columns)
            begin += R * C


def forward(
    queries: Tensor,
    keys: Tensor,
    temperature: float,
    symmetric: bool,
    mask: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    losses: Tensor,
    log_sums: Tensor,
    dqueries: Tensor | None,
    dkeys: Tensor | None,
) -> None:
    """Write losses [B], log_sums [1 or 2, B] and, where given, the float32 gradients of the sum of the losses."""
    gradients = (dqueries, dkeys)
    _clear(gradients)
    queries, keys = _operands(queries, keys)
    for turn, args in enumerate(_passes(queries, keys, symmetric, mask, query_labels, key_labels, *gradients)):
        sums = losses if turn == 0 else torch.empty_like(losses)
        _pass(*args, temperature, sums, log_sums[turn], None)
        if turn == 1:
            losses.add_(sums).mul_(0.5)
    _scale(gradients, (0.5 if symmetric else 1.0) / temperature / _scale_of(queries))


def backward(
    weights: Tensor,
    queries: Tensor,
    keys: Tensor,
    temperature: float,
    symmetric: bool,
    mask: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    log_sums: Tensor,
    dqueries: Tensor | None,
    dkeys: Tensor | None,
) -> None:
    """Write the float32 gradients of the sum of the losses times `weights` [B], from the logarithms of their sums."""
    gradients = (dqueries, dkeys)
    _clear(gradients)
    if weights.numel() == 0:
        return
    queries, keys = _operands(queries, keys)
    weights = weights.float()
    factor: float | Tensor = (0.5 if symmetric else 1.0) / temperature / _scale_of(queries)
    if queries.dtype == torch.float16:  # whose range the weights, of any size, must not leave
        top = torch.where(weights.isfinite(), weights.abs(), 0.0).max()
        top = torch.where(top > 0, top, 1.0)
        weights, factor = weights / top, top * factor
    weights = weights.contiguous()
    for turn, args in enumerate(_passes(queries, keys, symmetric, mask, query_labels, key_labels, *gradients)):
        _pass(*args, temperature, None, log_sums[turn], weights)
    _scale(gradients, factor)


def _clear(gradients: tuple[Tensor | None, ...]) -> None:
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()


def _scale(gradients: tuple[Tensor | None, ...], factor: float | Tensor) -> None:
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(factor)


def _scale_of(x: Tensor) -> float:
    return _FP16_SCALE if x.dtype == torch.float16 else 1.0


def _operands(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both in 16 bits or both in float32, each a matrix that cuBLAS reads as it lies."""
    if queries.dtype != keys.dtype:
        queries, keys = queries.float(), keys.float()
    return _matrix(queries), _matrix(keys)


def _matrix(x: Tensor) -> Tensor:
    (rows, columns), (step, unit) = x.shape, x.stride()
    plain = (unit == 1 and step >= columns) or (step == 1 and unit >= rows)
    return x if plain else x.contiguous()


def _passes(
    queries: Tensor,
    keys: Tensor,
    symmetric: bool,
    mask: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    dqueries: Tensor | None,
    dkeys: Tensor | None,
) -> list[tuple[Tensor | None, ...]]:
    """Arguments of one direction or of both, in the second of which queries and keys change places."""
    there = (queries, keys, mask, query_labels, key_labels, dqueries, dkeys)
    back = (keys, queries, None if mask is None else mask.t(), key_labels, query_labels, dkeys, dqueries)
    return [there, back] if symmetric else [there]


def _pass(
    queries: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    dqueries: Tensor | None,
    dkeys: Tensor | None,
    temperature: float,
    losses: Tensor | None,
    log_sums: Tensor,
    weights: Tensor | None,
) -> None:
    """Losses and sums of one direction, or with weights none, and what it adds to the gradients."""
    batch, count = queries.shape[0], keys.shape[0]
    if batch == 0:
        return
    slopes = dqueries is not None or dkeys is not None
    narrow = queries.dtype != torch.float32
    pitch = triton.cdiv(count, 16) * 16
    rows = _rows_of_a_block(batch, pitch)
    memory = torch.empty((rows, pitch), dtype=torch.float32, device=queries.device)
    gradients = memory.view(queries.dtype)[:, :count]
    if mask is not None:
        mask = mask.view(torch.uint8)
    ours, theirs, columns = None, None, 0
    if query_labels is not None and key_labels is not None:
        ours, theirs, columns = query_labels.contiguous(), key_labels.t().contiguous(), query_labels.shape[1]
    warps, tall, block = _tile_of_a_row(count, masked=mask is not None or ours is not None)

    for first in range(0, batch, rows):
        some = queries[first : first + rows]
        logits, given = memory[: len(some), :count], gradients[: len(some)]
        _multiply(some, keys.t(), logits, add=False)
        with torch.cuda.device_of(queries):
            _rows[(len(some),)](
                *(logits, pitch),
                *((given, given.stride(0)) if slopes else (None, 0)),
                *(losses, log_sums, weights),
                *((None, 0, 0) if mask is None else (mask, *mask.stride())),
                *(ours, theirs, count),
                *(first, count, 1.0 / temperature, _scale_of(queries)),
                SUMS=losses is not None,
                SLOPES=slopes,
                NARROW=narrow,
                G=columns,
                R=tall,
                C=block,
                num_warps=warps,
            )
        if dqueries is not None:
            _multiply(given, keys, dqueries[first : first + rows], add=True)
        if dkeys is not None:
            _multiply(given.t(), some, dkeys, add=True)


def _rows_of_a_block(batch: int, pitch: int) -> int:
    most = max(LEAST_ROWS, BLOCK_BYTES // (4 * pitch) // LEAST_ROWS * LEAST_ROWS)
    blocks = triton.cdiv(batch, most)
    return min(batch, triton.cdiv(triton.cdiv(batch, blocks), LEAST_ROWS) * LEAST_ROWS)


def _tile_of_a_row(count: int, *, masked: bool) -> tuple[int, int, int]:
    """Warps, R and C for rows of `count` keys.

    A thread reads and writes 8 neighbours, 16 bytes of gradients, at a time. The rows that all processors are at should
    fit the L2 cache together, to be read once more from there: many warps for a long row.
    """
    whole = triton.next_power_of_2(count)
    warps = 4 if count < 4096 else 8 if masked or count < 16384 else 16
    block = min(whole, 256 * warps)
    return warps, 1 if masked else min(2, whole // block), block


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """Write a @ b in float32, or add it to what `out` holds."""
    if a.shape[1] == 0:
        if not add:
            out.zero_()
        return
    wider = {}
    if a.dtype != torch.float32:
        if _widens(a.device.type, a.dtype, add):
            wider = {"out_dtype": torch.float32}
        elif add and _widens(a.device.type, a.dtype, False):
            out.add_(torch.mm(a, b, out_dtype=torch.float32))
            return
        else:
            a, b = a.float(), b.float()
    if add:
        torch.addmm(out, a, b, **wider, out=out)
    else:
        torch.mm(a, b, **wider, out=out)


@functools.cache
def _widens(device: str, dtype: torch.dtype, add: bool) -> bool:
    """Whether torch multiplies matrices of this dtype into float32 there, or adds their product."""
    one, sums = torch.ones((16, 16), dtype=dtype, device=device), torch.zeros((16, 16), device=device)
    try:
        if add:
            torch.addmm(sums, one, one, out_dtype=torch.float32, out=sums)
        else:
            torch.mm(one, one, out_dtype=torch.float32, out=sums)
    except (TypeError, RuntimeError):
        return False
    return True
