"""Recency mixture: one learned weight per position of the context. It is a model by itself, and under others."""

from __future__ import annotations

import math

import mlx.core as mx
from mlx import nn

from fastlvm.errors import InputError
from fastlvm.models.config import ModelConfig
from fastlvm.models.mlx.base import Array, Model, normalize


class RecencyMixture(nn.Module):
    """Weighted sum [B, L, D] → [B, D] of the newest L vectors, weights = softmax of one logit per position.

    The weights start at decay ** age, so that the newest vector counts most; without `learned` they stay there.
    """

    def __init__(self, context: int, decay: float, learned: bool = True) -> None:
        super().__init__()
        age = mx.arange(context - 1, -1, -1, dtype=mx.float32)
        self.logits = age * math.log(decay)  # [context]
        if not learned:
            self.freeze()

    def __call__(self, x: Array) -> Array:
        weights = mx.softmax(self.logits[self.logits.shape[0] - x.shape[1] :]).astype(x.dtype)
        return (x * weights[:, None]).sum(axis=1)


class Mixture(Model):
    """y = normalize(mixture(x)): what a network has to beat."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if not config.residual:
            raise InputError(f"residual is False, and a {config.name} is nothing without its mixture: leave it out")
        self.mixture = RecencyMixture(config.context, config.decay)

    def __call__(self, x: Array) -> Array:
        self.check(x)
        return normalize(self.mixture(x))


def corrected(model: Model, x: Array, y: Array) -> Array:
    """A head's output y [B, D] as the prediction: added to the mixture of the context x where the model has one."""
    return normalize(model.mixture(x) + y if "mixture" in model else y)
