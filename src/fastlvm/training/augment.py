"""Noise put on a batch's contexts while training, drawn from one generator whose state a checkpoint keeps."""

from __future__ import annotations

import torch
from torch import Tensor


class Augment:
    """Last-k context dropout and span corruption.

    Context dropout: with probability `context_dropout` the newest k vectors of a window, k uniform in 1–3 and at least
    one vector left, are set to zero. Span corruption: with probability `span_corruption` one position, chosen
    uniformly, is replaced by the vector of a training row of another article.
    """

    def __init__(
        self, pool: Tensor, articles: Tensor, *, context_dropout: float, span_corruption: float, seed: int
    ) -> None:
        """pool: int64 [M], payload rows to corrupt with; articles: int64 [N], the article of every payload row."""
        order = torch.argsort(articles[pool], stable=True)
        self.pool = pool[order]  # [M], rows of one article adjacent
        self.pool_articles = articles[self.pool]
        self.articles = articles
        self.context_dropout = context_dropout
        # with a single training article there is no other one to take a vector from
        several = len(pool) > 0 and bool(self.pool_articles[0] != self.pool_articles[-1])
        self.span_corruption = span_corruption if several else 0.0
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, context: Tensor, vectors: Tensor, rows: Tensor) -> Tensor:
        """context [B, L, D] of the payload rows `rows` [B, L]; vectors [N, D], the payload. Returns a changed copy."""
        context = context.clone()
        self._corrupt(context, vectors, rows)
        self._drop(context)
        return context

    def _drop(self, context: Tensor) -> None:
        batch, length, _ = context.shape
        if self.context_dropout == 0 or length < 2:
            return
        hit = torch.rand(batch, generator=self.generator) < self.context_dropout
        k = torch.randint(1, min(3, length - 1) + 1, (batch,), generator=self.generator)
        position = torch.arange(length)
        context[hit[:, None] & (position >= length - k[:, None])] = 0

    def _corrupt(self, context: Tensor, vectors: Tensor, rows: Tensor) -> None:
        batch, length, _ = context.shape
        if self.span_corruption == 0:
            return
        hit = torch.rand(batch, generator=self.generator) < self.span_corruption
        position = torch.randint(0, length, (batch,), generator=self.generator)
        draw = torch.rand(batch, generator=self.generator, dtype=torch.float64)
        own = self.articles[rows[:, -1]]
        first = torch.searchsorted(self.pool_articles, own)  # the article's rows are pool[first:end]
        end = torch.searchsorted(self.pool_articles, own, right=True)
        others = len(self.pool) - (end - first)
        pick = (draw * others).long()
        pick = torch.where(pick >= first, pick + (end - first), pick)
        context[hit, position[hit]] = vectors[self.pool[pick[hit]]]
