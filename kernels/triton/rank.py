"""The k rows of highest inner product with one query, exactly: a pass over the vectors and two counts of ranks.

Rows lie in tiles of TILE. The pass leaves every score and each tile's best. Of the k best rows none lies outside the k
best tiles, as each of those holds a row that is better; so k · TILE scores remain. A rank is counted, not sorted: how
many others are better, the row of lower number being better where scores are equal. One program does not wait for
another, and no two write to one place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORST: tl.constexpr = tl.constexpr(-2147483648)  # as `ordered` gives it: below -inf


@triton.jit
def ordered(score):
    """int32 that compare as the floats do; NaN is the greatest, and -0 is 0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scores(
    vectors,
    query,
    scores,
    best,
    count,
    row_stride,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
    STREAM: tl.constexpr,
):
    tile = tl.program_id(0)
    highest = WORST
    for part in tl.static_range(0, TILE, PART):
        rows = tile * TILE + part + tl.arange(0, PART)
        there = rows < count
        starts = vectors + rows.to(tl.int64) * row_stride
        total = tl.zeros([PART, CHUNK], tl.float32)
        for start in tl.static_range(0, DIM, CHUNK * AHEAD):
            # all of them on their way before the query is waited for
            blocks = ()
            for at in tl.static_range(start, min(start + CHUNK * AHEAD, DIM), CHUNK):
                columns = at + tl.arange(0, CHUNK)
                blocks += (
                    tl.load(
                        starts[:, None] + columns[None, :],
                        mask=there[:, None] & (columns < DIM)[None, :],
                        other=0.0,
                        eviction_policy="evict_first" if STREAM else "",
                    ),
                )
            for i in tl.static_range(len(blocks)):
                columns = start + i * CHUNK + tl.arange(0, CHUNK)
                asked = tl.load(query + columns, mask=columns < DIM, other=0.0)
                total += blocks[i].to(tl.float32) * asked[None, :]
        score = tl.sum(total, axis=1)
        tl.store(scores + rows, score, mask=there)
        highest = tl.maximum(highest, tl.max(tl.where(there, ordered(score), WORST), axis=0))
    tl.store(best + tile, highest)


@triton.jit
def _best_tiles(best, chosen, k, TILES: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr):
    ours = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(best + ours, mask=ours < TILES, other=WORST)
    rank = tl.zeros([BLOCK], tl.int32)
    for at in range(0, TILES, OTHERS):
        others = at + tl.arange(0, OTHERS)
        there = others < TILES
        their = tl.load(best + others, mask=there, other=WORST)
        better = their[None, :] > mine[:, None]
        equal = (their[None, :] == mine[:, None]) & (others[None, :] < ours[:, None])
        rank += tl.sum(((better | equal) & there[None, :]).to(tl.int32), axis=1)
    tl.store(chosen + rank, ours, mask=(ours < TILES) & (rank < k))


@triton.jit
def _candidates(scores, chosen, count, at, total, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows and scores of candidates at to at + BLOCK - 1, as numbers that compare; those beyond the last are WORST."""
    which = at + tl.arange(0, BLOCK)
    tile = tl.load(chosen + which // TILE, mask=which < total, other=0)
    rows = tile * TILE + which % TILE
    there = (which < total) & (rows < count)
    score = tl.load(scores + rows, mask=there, other=0.0)
    return rows, score, tl.where(there, ordered(score), WORST), there


@triton.jit
def _best_rows(
    scores,
    chosen,
    ids,
    found,
    count,
    k,
    TOTAL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    rows, score, mine, there = _candidates(scores, chosen, count, tl.program_id(0) * BLOCK, TOTAL, TILE, BLOCK)
    rank = tl.zeros([BLOCK], tl.int32)
    for at in range(0, TOTAL, OTHERS):
        other, _, their, others = _candidates(scores, chosen, count, at, TOTAL, TILE, OTHERS)
        better = their[None, :] > mine[:, None]
        equal = (their[None, :] == mine[:, None]) & (other[None, :] < rows[:, None])
        rank += tl.sum(((better | equal) & others[None, :]).to(tl.int32), axis=1)
    tl.store(ids + rank, rows, mask=there & (rank < k))
    tl.store(found + rank, score, mask=there & (rank < k))


def score_rows(
    vectors: Tensor,
    query: Tensor,
    scores: Tensor,
    best: Tensor,
    tile: int,
    part: int = 32,
    chunk: int = 256,
    ahead: int = 3,
    warps: int = 8,
    stream: bool = True,
) -> None:
    """Fill scores float32 [n] with vectors [n, dim] · query float32 [dim], and best int32 [ceil(n / tile)].

    best: of each tile its highest score, as `ordered` has it. A program takes `part` rows of its tile after the other,
    `ahead` chunks of their columns at a time. stream: vectors are not kept in the cache.
    """
    count, dim = vectors.shape
    _scores[(len(best),)](
        vectors,
        query,
        scores,
        best,
        count,
        vectors.stride(0),
        DIM=dim,
        TILE=tile,
        PART=min(part, tile),
        CHUNK=min(chunk, max(16, triton.next_power_of_2(dim))),
        AHEAD=ahead,
        STREAM=stream,
        num_warps=warps,
    )


def best_rows(scores: Tensor, best: Tensor, ids: Tensor, found: Tensor, tile: int) -> None:
    """Fill ids int32 [k] and found float32 [k] with the rows of the k highest scores, best first; k ≤ n."""
    k, tiles = len(ids), len(best)
    few = min(k, tiles)
    chosen = torch.empty(few, dtype=torch.int32, device=scores.device)
    block, others = 32, 128
    _best_tiles[(triton.cdiv(tiles, block),)](best, chosen, few, TILES=tiles, BLOCK=block, OTHERS=others, num_warps=4)
    _best_rows[(triton.cdiv(few * tile, block),)](
        scores, chosen, ids, found, len(scores), k, TOTAL=few * tile, TILE=tile, BLOCK=block, OTHERS=others, num_warps=4
    )
