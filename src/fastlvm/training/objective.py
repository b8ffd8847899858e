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
    """The loss of a batch, given the payload's vectors [N, D] in the space and what chooses the negatives.

    tower: what the vectors go through, and learns.
    """

    def __init__(
        self, options: TrainOptions, vectors: Tensor, negatives: Negatives, tower: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.options = options
        self.contrastive = options.objective != "ar"
        mlp = self.contrastive and options.projection == "mlp"
        self.projection = Projection(vectors.shape[1]) if mlp else None
        self.parallel: tuple[Callable[[Tensor], Tensor], ...] = ()  # the projection as several processes call it
        self.tower = () if tower is None else (tower,)  # no part of this module either
        self.dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32  # of what InfoNCE multiplies
        # plain attributes: the payload is no part of a checkpoint
        self.vectors, self.negatives = vectors, negatives
        pool = self.contrastive and negatives.pooled and not negatives.drawn
        self.pool_vectors = self._candidates(negatives.pool) if pool else None

    def forward(self, predicted: Tensor, batch: Batch, generator: torch.Generator | None = None) -> Loss:
        """predicted [B, D], L2-normalised. generator: draws hard negatives; None leaves out what training alone has."""
        if not self.contrastive:
            target = self.vectors[batch.target]
            cosine = _distance(predicted, target)
            return Loss(cosine + F.mse_loss(predicted, target), None, cosine)
        rows, masked = self.negatives.candidates(batch, generator)
        keys = self._keys(rows, len(batch.target))
        cosine = _distance(predicted, keys[: len(batch.target)] if self.tower else self.vectors[batch.target])
        infonce = self._infonce(predicted, keys, masked)
        weight = 1.0 if self.options.objective == "infonce" else self.options.infonce_weight
        count = (masked.numel() - int(masked.count_nonzero())) / max(1, len(masked)) - 1
        return Loss(weight * infonce + (1 - weight) * cosine, infonce, cosine, count)

    def _infonce(self, predicted: Tensor, keys: Tensor, masked: Tensor) -> Tensor:
        queries = predicted
        if self.projection is not None:
            queries = self.parallel[0](predicted) if self.parallel else self.projection(predicted)
            with torch.no_grad():  # the target branch teaches and does not learn
                keys = self.projection(keys)
        return info_nce(queries.to(self.dtype), keys.to(self.dtype), self.options.temperature, mask=masked)

    def _keys(self, rows: Tensor, targets: int) -> Tensor:
        """Vectors of candidates; those of the pool are at hand."""
        if self.pool_vectors is None:
            vectors = self._candidates(rows)
        else:
            end = targets + len(self.pool_vectors)
            parts = self._candidates(rows[:targets]), self.pool_vectors, self._candidates(rows[end:])
            vectors = torch.cat(parts)
        for tower in self.tower:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.options.precision == "bf16"):
                vectors = tower(vectors).float()
        return vectors

    def _candidates(self, rows: Tensor) -> Tensor:
        """Vectors as InfoNCE multiplies them, or as a tower or a projection reads them."""
        vectors = self.vectors[rows]
        return vectors if self.tower or self.projection is not None else vectors.to(self.dtype)


def _distance(predicted: Tensor, target: Tensor) -> Tensor:
    return 1 - (predicted * target).sum(dim=-1).mean()
