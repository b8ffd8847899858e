"""What every predictor is: a module from a context to one vector, with its configuration and its steps."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn

from fastlvm.models.config import ModelConfig

Array = mx.array


class Model(nn.Module):
    """`[B, L, vector_dim] -> [B, vector_dim]`, L2-normalised; 1 ≤ L ≤ config.context, oldest vector first.

    The twin of the class of the same name and module in `fastlvm.models`, with the same weights.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def __call__(self, x: Array) -> Array:
        raise NotImplementedError

    def start(self, batch: int) -> Any:
        """The state of `step` before the first vector, for `batch` sequences."""
        return Recent(self.config.context)

    def step(self, x: Array, state: Any) -> Array:
        """The prediction [B, vector_dim] after one more vector x [B, vector_dim] of each sequence; `state` goes on.

        After L ≤ context vectors it is what the model makes of these L. It has no gradient.
        """
        return self(state.push(x))

    def check(self, x: Array) -> None:
        """Raises InputError for what is no context."""
        self.config.check_context(tuple(x.shape), x.dtype, mx.issubdtype(x.dtype, mx.floating))


class Recent:
    """The newest vectors of sequences that are pushed one at a time."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.vectors: Array | None = None

    def push(self, x: Array) -> Array:
        """x [B, dim] → the newest ones with it, [B, up to `most`, dim]"""
        whole = x[:, None] if self.vectors is None else mx.concatenate([self.vectors, x[:, None]], axis=1)
        self.vectors = whole[:, -self.most :]
        return self.vectors


def normalize(x: Array) -> Array:
    """x / max(|x|, 1e-12) over the last dimension."""
    return x * mx.rsqrt(mx.maximum(mx.square(x).sum(axis=-1, keepdims=True), 1e-24))  # a zero has a gradient too
