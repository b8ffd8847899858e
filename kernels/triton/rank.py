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

from . import early

WORST: tl.constexpr = tl.constexpr(-2147483648)  # as `ordered` gives it: below -inf


@triton.jit
def ordered(score):
    """int32 that compare as the floats do, -0 being 0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scores(
    vectors,
    query,
    scores,
    best,
    kept,
    count,
    row_stride,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
    STREAM: tl.constexpr,
    EARLY: tl.constexpr,
):
    early.begin(EARLY)
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
            if part == 0 and start == 0:
                early.wait(EARLY)
            for i in tl.static_range(len(blocks)):
                columns = start + i * CHUNK + tl.arange(0, CHUNK)
                asked = tl.load(query + columns, mask=columns < DIM, other=0.0)
                total += blocks[i].to(tl.float32) * asked[None, :]
        score = tl.sum(total, axis=1)
        tl.store(scores + rows, score, mask=there)
        highest = tl.maximum(highest, tl.max(tl.where(there, ordered(score), WORST), axis=0))
    tl.store(best + tile, highest)
    if kept is not None:
        for start in tl.static_range(0, DIM, CHUNK):
            columns = start + tl.arange(0, CHUNK)
            mine = (columns < DIM) & (tile == 0)
            tl.store(kept + columns, tl.load(query + columns, mask=mine, other=0.0), mask=mine)


@triton.jit
def _ties(mine, numbers, their, others):
    """How many of `others` have the same score and a lower number."""
    same = (their[None, :] == mine[:, None]) & (others[None, :] < numbers[:, None])
    return tl.sum(same.to(tl.int32), axis=1)


@triton.jit
def _best_tiles(
    best,
    chosen,
    k,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    early.begin(EARLY)
    first = tl.program_id(0) * BLOCK
    ours = first + tl.arange(0, BLOCK)
    early.wait(EARLY)
    mine = tl.load(best + ours, mask=ours < TILES, other=WORST)
    above = tl.zeros([BLOCK, OTHERS], tl.int32)
    for start in range(0, TILES, OTHERS * AHEAD):
        theirs = ()
        for i in tl.static_range(AHEAD):
            others = start + i * OTHERS + tl.arange(0, OTHERS)
            their = tl.load(best + others, mask=others < TILES, other=WORST)
            # of equal ones the lower is better; within our own see below
            theirs += (their + (others < first).to(tl.int32),)
        for i in tl.static_range(AHEAD):
            above += (theirs[i][None, :] > mine[:, None]).to(tl.int32)
    rank = _ties(mine, ours, mine, ours) + tl.sum(above, axis=1)
    tl.store(chosen + rank, ours, mask=(ours < TILES) & (rank < k))


@triton.jit
def _score(scores, rows, there):
    return tl.where(there, ordered(tl.load(scores + rows, mask=there, other=0.0)), WORST)


@triton.jit
def _best_rows(
    scores,
    best,
    chosen,
    ids,
    found,
    count,
    k,
    CHOSEN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BOUND: tl.constexpr,
    EARLY: tl.constexpr,
):
    early.begin(EARLY)
    each: tl.constexpr = TILE // BLOCK
    early.wait(EARLY)
    tile = tl.load(chosen + tl.program_id(0) // each)
    last = tl.load(chosen + CHOSEN - 1)
    rows = tile * TILE + tl.program_id(0) % each * BLOCK + tl.arange(0, BLOCK)
    there = (rows >= 0) & (rows < count)
    mine = _score(scores, rows, there)
    # each of k tiles holds a row as good as the best of the last of them
    least = tl.load(best + last) if BOUND else WORST
    if tl.max(mine, axis=0) >= least:
        within = tile * TILE + tl.arange(0, TILE)
        rank = _ties(mine, rows, _score(scores, within, (within >= 0) & (within < count)), within)
        for at in range(0, CHOSEN, AT_ONCE):
            slots = at + tl.arange(0, AT_ONCE)
            tiles = tl.load(chosen + slots, mask=slots < CHOSEN, other=0)
            others = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
            their = _score(scores, others, (slots < CHOSEN)[:, None] & (others >= 0) & (others < count))
            their += (tiles < tile).to(tl.int32)[:, None]  # as above, by tiles
            their = tl.reshape(their, [AT_ONCE * TILE], can_reorder=True)
            rank += tl.sum((their[None, :] > mine[:, None]).to(tl.int32), axis=1)
        tl.store(ids + rank, rows, mask=there & (rank < k))
        tl.store(found + rank, tl.load(scores + rows, mask=there, other=0.0), mask=there & (rank < k))


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
    kept: Tensor | None = None,
) -> None:
    """Fill scores float32 [n] with vectors [n, dim] · query float32 [dim], and best int32 [ceil(n / tile)].

    best: of each tile its highest score, as `ordered` has it. A program takes `part` rows of its tile after the other,
    `ahead` chunks of their columns at a time. stream: vectors are not kept in the cache. kept float32 [dim]: the query
    is copied there, which can be pinned memory of the host.
    """
    count, dim = vectors.shape
    _scores[(len(best),)](
        vectors,
        query,
        scores,
        best,
        kept,
        count,
        vectors.stride(0),
        DIM=dim,
        TILE=tile,
        PART=min(part, tile),
        CHUNK=min(chunk, max(16, triton.next_power_of_2(dim))),
        AHEAD=ahead,
        STREAM=stream,
        num_warps=warps,
        **early.options(),
    )


def best_rows(scores: Tensor, best: Tensor, ids: Tensor, found: Tensor, tile: int) -> None:
    """Fill ids int32 [k] and found float32 [k] with the rows of the k highest scores, best first; k ≤ n.

    ids and found can be pinned memory of the host.
    """
    k, tiles = len(ids), len(best)
    few, block = min(k, tiles), 16
    chosen = torch.empty(few, dtype=torch.int32, device=scores.device)
    others = min(512, triton.next_power_of_2(tiles))
    _best_tiles[(triton.cdiv(tiles, block),)](
        best,
        chosen,
        few,
        TILES=tiles,
        BLOCK=block,
        OTHERS=others,
        AHEAD=min(9, triton.cdiv(tiles, others)),
        num_warps=8,
        **early.options(),
    )
    _best_rows[(few * tile // block,)](
        scores,
        best,
        chosen,
        ids,
        found,
        len(scores),
        k,
        CHOSEN=few,
        TILE=tile,
        BLOCK=block,
        AT_ONCE=max(1, min(triton.next_power_of_2(few), 2048 // tile)),
        BOUND=few == k,
        num_warps=8,
        **early.options(),
    )
