"""Training losses. Vectors are L2-normalised; B is the batch, M the number of candidates, D the vectors' length."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlvm.training.options import TrainOptions


@dataclasses.dataclass
class Loss:
    """Total to minimise, and its parts; `infonce` is None where the objective has none."""

    total: Tensor
    infonce: Tensor | None
    cosine: Tensor  # 1 − mean cosine


@dataclasses.dataclass
class Batch:
    """Windows of one step: payload rows [B, L + 1], the target last."""

    rows: Tensor

    @property
    def context(self) -> Tensor:
        return self.rows[:, :-1]

    @property
    def target(self) -> Tensor:
        return self.rows[:, -1]


class Projection(nn.Sequential):
    """Vectors [.., vector_dim] to the unit sphere where InfoNCE is taken: → 512 → 256, GELU, LayerNorm, L2."""

    def __init__(self, vector_dim: int, hidden: int = 512, out: int = 256) -> None:
        super().__init__(nn.Linear(vector_dim, hidden), nn.GELU(), nn.Linear(hidden, out), nn.LayerNorm(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=-1)


def info_nce(queries: Tensor, keys: Tensor, positive: Tensor, temperature: float, masked: Tensor | None) -> Tensor:
    """Mean cross-entropy of each query's positive key among the unmasked keys.

    queries [B, D], keys [M, D], positive int64 [B], masked bool [B, M] (the positive itself is never masked).
    """
    logits = queries @ keys.T / temperature  # [B, M]
    if masked is not None:
        masked = masked.scatter(1, positive[:, None], False)
        logits = logits.masked_fill(masked, float("-inf"))
    return F.cross_entropy(logits, positive)


class Objective(nn.Module):
    """The loss of a batch, given the payload's vectors in the space.

    vectors   float32 [N, D], the whole payload in the space.
    articles  int64 [N], groups int64 [N]: article and duplicate group of every row.
    pool      int64 [M], rows of the training articles: the candidates of `negatives="payload"`.
    """

    def __init__(self, options: TrainOptions, vectors: Tensor, articles: Tensor, groups: Tensor, pool: Tensor) -> None:
        super().__init__()
        self.options = options
        self.contrastive = options.objective == "contrastive"
        mlp = self.contrastive and options.projection == "mlp"
        self.projection = Projection(vectors.shape[1]) if mlp else None
        # plain attributes: the payload is no part of a checkpoint
        self.vectors, self.articles, self.groups, self.pool = vectors, articles, groups, pool
        self.pool_vectors = vectors[pool] if self.contrastive and options.negatives == "payload" else None

    def forward(self, predicted: Tensor, batch: Batch) -> Loss:
        """predicted [B, D], L2-normalised."""
        target = self.vectors[batch.target]
        cosine = 1 - (predicted * target).sum(dim=-1).mean()
        if not self.contrastive:
            return Loss(cosine + F.mse_loss(predicted, target), None, cosine)
        infonce = self._infonce(predicted, target, batch)
        weight = self.options.infonce_weight
        return Loss(weight * infonce + (1 - weight) * cosine, infonce, cosine)

    def _infonce(self, predicted: Tensor, target: Tensor, batch: Batch) -> Tensor:
        if self.pool_vectors is None:
            candidates, keys = batch.target, target
            positive = torch.arange(len(target))
        else:
            # the target stands first: a validation target is no row of the pool
            candidates = torch.cat([batch.target, self.pool])
            keys = torch.cat([target, self.pool_vectors])
            positive = torch.arange(len(target))
        masked = false_negatives(batch, candidates, self.articles, self.groups, self.options.false_negatives)
        if self.pool_vectors is not None:
            # one positive per query; the other queries' targets are in the pool already
            masked[:, : len(target)] = True
        if self.projection is None:
            queries = predicted
        else:
            queries = self.projection(predicted)
            with torch.no_grad():  # the target branch teaches and does not learn
                keys = self.projection(keys)
        return info_nce(queries, keys, positive, self.options.temperature, masked)


def false_negatives(batch: Batch, candidates: Tensor, articles: Tensor, groups: Tensor, rule: str) -> Tensor:
    """bool [B, M]: candidates (payload rows [M]) that are no negatives of a window.

    Always the rows of the target's duplicate group. "article" adds the rows of its article; "group" adds the window's
    own context and its duplicates, which retrieval excludes as well.
    """
    own = groups[candidates]  # [M]
    masked = own == groups[batch.target][:, None]
    if rule == "article":
        return masked | (articles[candidates] == articles[batch.target][:, None])
    for position in range(batch.context.shape[1]):
        masked |= own == groups[batch.context[:, position]][:, None]
    return masked
