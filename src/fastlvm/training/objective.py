"""Training losses. Vectors are L2-normalised; B is the batch, M the number of candidates, D the vectors' length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlvm.ops import info_nce
from fastlvm.training.negatives import Batch, Negatives
from fastlvm.training.options import TrainOptions


@dataclasses.dataclass
class Loss:
    """Total to minimise, and its parts; `infonce` is None where the objective has none."""

    total: Tensor
    infonce: Tensor | None
    cosine: Tensor  # 1 − mean cosine
    negatives: float = 0.0  # of a window, in the mean


class Projection(nn.Sequential):
    """Vectors [.., vector_dim] to the unit sphere where InfoNCE is taken: → 512 → 256, GELU, LayerNorm, L2."""

    def __init__(self, vector_dim: int, hidden: int = 512, out: int = 256) -> None:
        super().__init__(nn.Linear(vector_dim, hidden), nn.GELU(), nn.Linear(hidden, out), nn.LayerNorm(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=-1)


class Objective(nn.Module):
    """The loss of a batch, given the payload's vectors [N, D] in the space and what chooses the negatives."""

    def __init__(self, options: TrainOptions, vectors: Tensor, negatives: Negatives) -> None:
        super().__init__()
        self.options = options
        self.contrastive = options.objective != "ar"
        mlp = self.contrastive and options.projection == "mlp"
        self.projection = Projection(vectors.shape[1]) if mlp else None
        self.parallel: tuple[Callable[[Tensor], Tensor], ...] = ()  # the projection as several processes call it
        # plain attributes: the payload is no part of a checkpoint
        self.vectors, self.negatives = vectors, negatives
        pool = self.contrastive and options.negatives == "payload"
        self.pool_vectors = vectors[negatives.pool] if pool else None

    def forward(self, predicted: Tensor, batch: Batch, generator: torch.Generator | None = None) -> Loss:
        """predicted [B, D], L2-normalised. generator: draws hard negatives; None leaves out what training alone has."""
        target = self.vectors[batch.target]
        cosine = 1 - (predicted * target).sum(dim=-1).mean()
        if not self.contrastive:
            return Loss(cosine + F.mse_loss(predicted, target), None, cosine)
        infonce, count = self._infonce(predicted, batch, generator)
        weight = 1.0 if self.options.objective == "infonce" else self.options.infonce_weight
        return Loss(weight * infonce + (1 - weight) * cosine, infonce, cosine, count)

    def _infonce(self, predicted: Tensor, batch: Batch, generator: torch.Generator | None) -> tuple[Tensor, float]:
        rows, masked = self.negatives.candidates(batch, generator)
        queries, keys = predicted, self._keys(rows, len(batch.target))
        if self.projection is not None:
            queries = self.parallel[0](predicted) if self.parallel else self.projection(predicted)
            with torch.no_grad():  # the target branch teaches and does not learn
                keys = self.projection(keys)
        count = float((~masked).sum()) / max(1, len(masked)) - 1
        return info_nce(queries, keys, self.options.temperature, mask=masked), count

    def _keys(self, rows: Tensor, targets: int) -> Tensor:
        """Vectors of candidates; those of the pool are at hand."""
        if self.pool_vectors is None:
            return self.vectors[rows]
        end = targets + len(self.pool_vectors)
        return torch.cat([self.vectors[rows[:targets]], self.pool_vectors, self.vectors[rows[end:]]])
