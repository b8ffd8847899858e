"""What a window's target is told from: the rows InfoNCE takes as candidates, and which of them are no negatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlvm.training import masks
from fastlvm.training.options import TrainOptions, parse_hard, parse_negatives

MINED = 50  # nearest rows that hard negatives are taken from


class Batch:
    """Windows of one step: payload rows [B, L + 1], the target last.

    everyone: rows [G, L + 1] of all processes' windows, of which `own` [B] are this one's; windows: [G], which of the
    training windows they are, None where nobody asks.
    """

    def __init__(self, everyone: Tensor, windows: Tensor | None = None, own: Tensor | None = None) -> None:
        self.everyone, self.windows = everyone, windows
        self.own = torch.arange(len(everyone)) if own is None else own
        self.rows = everyone[self.own]

    @property
    def context(self) -> Tensor:
        return self.rows[:, :-1]

    @property
    def target(self) -> Tensor:
        return self.rows[:, -1]

    @property
    def others(self) -> Tensor:
        """Targets of other processes' windows."""
        rest = torch.ones(len(self.everyone), dtype=torch.bool)
        rest[self.own] = False
        return self.everyone[rest, -1]


class Candidates(NamedTuple):
    """Payload rows int64 [M], the B targets first, and bool [B, M]: what is no negative of a window."""

    rows: Tensor
    masked: Tensor


class Negatives:
    """Chooses candidates as the options say.

    articles, groups    int64 [N], of every payload row.
    pool                int64 [P], rows of the training articles.
    """

    def __init__(self, options: TrainOptions, articles: Tensor, groups: Tensor, pool: Tensor) -> None:
        self.options, self.articles, self.groups, self.pool = options, articles, groups, pool
        kind, most = parse_negatives(options.negatives)
        self.pooled = kind == "payload"
        self.drawn = most if 0 < most < len(pool) else 0  # rows of the pool in a step; 0 = all
        self.source, self.hard = parse_hard(options.hard_negatives)
        self.queue = torch.empty(0, dtype=torch.int64)  # targets of the batches before, the newest last
        self.mined: Tensor | None = None  # int64 [training windows, MINED], rows near to a prediction, -1 = none
        order = torch.argsort(articles[pool], stable=True)
        self._by_article = pool[order]
        self._articles = articles[self._by_article]

    def candidates(self, batch: Batch, generator: torch.Generator | None) -> Candidates:
        """generator: draws rows of the pool and hard negatives; None takes the same rows always and no hard ones."""
        parts = [batch.target]
        if self.pooled:
            parts.append(self._of_pool(generator))
        else:
            parts.append(batch.others)
            if generator is not None:
                parts.append(self.queue)
        hard = None
        if self.hard and generator is not None:
            hard = self._hard(batch, generator)  # [G, K]
            parts.append(hard.reshape(-1).clamp(min=0))
        rows = torch.cat(parts)
        masked = self._masked(batch, rows)
        size = len(batch.target)
        if self.pooled:
            masked[:, :size] = True  # the pool is where the other targets are from
        if hard is not None:
            self._admit(masked, batch, hard, rows)
        at = torch.arange(size)
        masked[at, at] = False
        return Candidates(rows, masked)

    def remember(self, batch: Batch) -> None:
        """Put a batch's targets into the queue."""
        if self.options.queue:
            self.queue = torch.cat([self.queue, batch.everyone[:, -1]])[-self.options.queue :]

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"queue": self.queue} | ({} if self.mined is None else {"mined": self.mined})

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.queue, self.mined = tensors["queue"], tensors.get("mined")

    def mine(self, nearest: Callable[[int], np.ndarray]) -> None:
        """Find what the model takes for the targets of training windows now. nearest(k): rows int64 [windows, k]."""
        if self.source == "index":
            self.mined = torch.from_numpy(np.asarray(nearest(MINED), dtype=np.int64))

    def _of_pool(self, generator: torch.Generator | None) -> Tensor:
        if not self.drawn:
            return self.pool
        if generator is None:
            return self.pool[torch.arange(self.drawn) * len(self.pool) // self.drawn]
        return self.pool[torch.randperm(len(self.pool), generator=generator)[: self.drawn]]

    def _masked(self, batch: Batch, rows: Tensor) -> Tensor:
        return false_negatives(batch, rows, self.articles, self.groups, self.options.false_negatives)

    def _hard(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Rows int64 [G, K] for each process's windows; -1 where there is none."""
        if self.source == "same-article":
            own = self.articles[batch.everyone[:, -1]]
            first = torch.searchsorted(self._articles, own)
            count = torch.searchsorted(self._articles, own, right=True) - first
            draw = torch.rand(len(own), self.hard, generator=generator, dtype=torch.float64)
            picked = first[:, None] + (draw * count[:, None]).long()
            return torch.where(count[:, None] > 0, self._by_article[picked.clamp(max=len(self.pool) - 1)], -1)
        if self.mined is None or batch.windows is None:
            return torch.full((len(batch.everyone), self.hard), -1)
        near = self.mined[batch.windows]
        draw = torch.rand(near.shape, generator=generator)
        return near.gather(1, draw.argsort(dim=1)[:, : self.hard])

    def _admit(self, masked: Tensor, batch: Batch, hard: Tensor, rows: Tensor) -> None:
        """Let hard negatives count for their own window, whatever the rule; not the target's group or the context's."""
        first, each = len(rows) - hard.numel(), hard.shape[1]
        # The pool has them already, where the rule lets them count.
        masked[:, first:] |= True if self.pooled else (hard.reshape(-1) < 0)[None]
        own = hard[batch.own]  # [B, K]
        wrong = (self.groups[own.clamp(min=0)][:, :, None] == self.groups[batch.rows][:, None, :]).any(dim=2) | (
            own < 0
        )
        columns = first + batch.own[:, None] * each + torch.arange(each)
        masked[torch.arange(len(own))[:, None], columns] = wrong


def false_negatives(batch: Batch, candidates: Tensor, articles: Tensor, groups: Tensor, rule: str) -> Tensor:
    """bool [B, M]: what `masks.false_negatives` says of a batch's own windows."""
    rows, among, article, group = (tensor.numpy() for tensor in (batch.rows, candidates, articles, groups))
    return torch.from_numpy(masks.false_negatives(rows, among, article, group, rule))
