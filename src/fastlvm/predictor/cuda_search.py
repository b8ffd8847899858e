"""Exact search of float16 vectors on a GPU: every score, then the k best, the lower row first of two with the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlvm.kernels.triton import rank
from fastlvm.predictor.cuda_layers import product

COUNTED = 8192  # candidates among which ranks are counted; more are sorted
TILES = 32768  # likewise tiles
SCORES = 1 << 25  # scores of many queries that are held at a time
SCALE = 1024.0  # of a query of length 1, so that its smallest parts are normal numbers in float16
LOW = 0x7FFFFFFF  # rows are below it


class Tune(NamedTuple):
    """How a single query is searched for; every choice finds the same.

    tile: rows whose best score is kept. part, chunk, ahead, warps, stream: of the pass over them, see
    `rank.score_rows`. counted: ranks are counted by two kernels, else torch sorts. early: a kernel begins before the
    one ahead of it has ended, and asks for its weights. direct: kernels read and write the host's memory themselves,
    else there are copies. poll: the host asks again and again whether the device is done, else it waits.
    """

    tile: int = 128
    part: int = 32
    chunk: int = 256
    ahead: int = 3
    warps: int = 8
    stream: bool = True
    counted: bool = True
    early: bool = True
    direct: bool = True
    poll: bool = False

    @property
    def pass_over(self) -> dict[str, Any]:
        """Arguments of `rank.score_rows`."""
        return {name: getattr(self, name) for name in ("part", "chunk", "ahead", "warps", "stream")}


class Exact:
    """vectors: float16 [n, dim] on the device, kept as they are."""

    def __init__(self, vectors: Tensor, tune: Tune | None = None) -> None:
        self.vectors = vectors
        self.tune = tune or Tune()

    def writes_itself(self, n: int, k: int) -> bool:
        """Whether what is filled for n queries may be pinned memory of the host."""
        tile = self.tune.tile
        tiles = -(-len(self.vectors) // tile)
        return n == 1 and self.tune.counted and 0 < min(k, tiles) * tile <= COUNTED and tiles <= TILES

    def __call__(self, queries: Tensor, ids: Tensor, scores: Tensor, kept: Tensor | None = None) -> None:
        """Fill ids int32 [n, k] and scores float32 [n, k], best first; queries float32 [n, dim], k ≤ vectors.

        Scores are sums of float16 vectors times float32 queries, in float32. Waits for nothing. kept float32 [n, dim],
        where `writes_itself`: takes a copy of the queries.
        """
        if len(queries) == 1:
            self._one(queries[0], ids[0], scores[0], None if kept is None else kept[0])
        elif len(queries):
            self._many(queries, ids, scores)

    def _one(self, query: Tensor, ids: Tensor, scores: Tensor, kept: Tensor | None) -> None:
        tile = self.tune.tile
        k, count = len(ids), len(self.vectors)
        tiles = -(-count // tile)
        every = torch.empty(count, dtype=torch.float32, device=query.device)
        best = torch.empty(tiles, dtype=torch.int32, device=query.device)
        rank.score_rows(self.vectors, query, every, best, tile, kept=kept, **self.tune.pass_over)
        if self.writes_itself(1, k):
            rank.best_rows(every, best, ids, scores, tile)
        else:
            _unpack(_best(every[None], best[None], k, tile, 0), ids[None], scores[None])

    def _many(self, queries: Tensor, ids: Tensor, scores: Tensor) -> None:
        tile, k, count = self.tune.tile, ids.shape[1], len(self.vectors)
        # two float16 numbers hold a float32 component but for its last bit or two
        scaled = queries * SCALE
        high = scaled.half()
        low = (scaled - high.float()).half()
        each = max(tile, SCORES // len(queries) // tile * tile)
        found = []
        for first in range(0, count, each):
            part = self.vectors[first : first + each]
            every = product(high, part.t())
            every += product(low, part.t())
            every /= SCALE
            tiles = -(-len(part) // tile)
            whole = every
            if tiles * tile > len(part):
                whole = torch.nn.functional.pad(every, (0, tiles * tile - len(part)), value=-torch.inf)
            best = _ordered(whole.view(len(queries), tiles, tile).amax(-1))
            found.append(_best(every, best, min(k, len(part)), tile, first))
        keys = found[0] if len(found) == 1 else torch.cat(found, 1).topk(k, dim=1).values
        _unpack(keys, ids, scores)


def _best(scores: Tensor, best: Tensor, k: int, tile: int, first: int) -> Tensor:
    """Keys int64 [n, k] of the k best, best first: the score above, what is left of `LOW` after the row below.

    scores float32 [n, rows], of rows first to first + rows - 1; best int32 [n, tiles], see `rank.score_rows`.
    """
    count, tiles = scores.shape[1], best.shape[1]
    keys = (best.long() << 32) | (LOW - torch.arange(tiles, device=best.device))
    chosen = LOW - (keys.topk(min(k, tiles), dim=1).values & LOW)
    rows = (chosen[..., None] * tile + torch.arange(tile, device=best.device)).flatten(1)  # [n, tiles · tile]
    there = rows < count
    candidates = scores.gather(1, rows.clamp(max=count - 1))
    keys = (_ordered(candidates).long() << 32) | (LOW - (rows + first))
    return keys.masked_fill(~there, torch.iinfo(torch.int64).min).topk(k, dim=1).values


def _ordered(scores: Tensor) -> Tensor:
    """int32 that compare as the floats do, as `rank.ordered`."""
    bits = scores.masked_fill(scores == 0, 0.0).view(torch.int32)  # a scalar that torch.where takes is copied in
    return bits ^ ((bits >> 31) & LOW)


def _unpack(keys: Tensor, ids: Tensor, scores: Tensor) -> None:
    ids.copy_(LOW - (keys & LOW))
    bits = (keys >> 32).to(torch.int32)
    scores.copy_((bits ^ ((bits >> 31) & LOW)).view(torch.float32))
