"""Training losses in mlx. Vectors are L2-normalised; B is the batch, M the number of candidates, D their length."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from fastlvm.ops import info_nce
from fastlvm.training.masks import false_negatives
from fastlvm.training.options import TrainOptions, parse_negatives


class Task(NamedTuple):
    """What a batch's predictions are held against."""

    target: mx.array  # [B, D]
    keys: mx.array | None = None  # [M, D], the B targets first; None where the objective has no InfoNCE
    mask: mx.array | None = None  # bool [B, M], True for what is no negative of a window
    negatives: float = 0.0  # of a window, in the mean


class Objective:
    """The objective of `fastlvm.training.objective`, with negatives of the batch or of the payload.

    vectors             float32 [N, D], the payload in the space.
    articles, groups    int64 [N], of every payload row; pool: int64 [P], rows of the training articles.
    """

    def __init__(
        self, options: TrainOptions, vectors: np.ndarray, articles: np.ndarray, groups: np.ndarray, pool: np.ndarray
    ) -> None:
        self.options, self.vectors, self.articles, self.groups, self.pool = options, vectors, articles, groups, pool
        self.contrastive = options.objective != "ar"
        kind, most = parse_negatives(options.negatives)
        self.pooled = kind == "payload"
        self.drawn = most if 0 < most < len(pool) else 0  # rows of the pool in a step; 0 = all
        whole = self.contrastive and self.pooled and not self.drawn
        self.pool_vectors = mx.array(vectors[pool]) if whole else None

    def task(self, windows: np.ndarray, generator: np.random.Generator | None = None) -> Task:
        """windows: payload rows int64 [B, L + 1], the target last.

        generator: draws rows of the pool; None takes the same ones always.
        """
        target = mx.array(self.vectors[windows[:, -1]])
        if not self.contrastive:
            return Task(target)
        rows = windows[:, -1]
        if self.pooled:
            rows = np.concatenate([rows, self._of_pool(generator)])
        options, size = self.options, len(windows)
        masked = false_negatives(windows, rows, self.articles, self.groups, options.false_negatives)
        if self.pooled:
            masked[:, :size] = True  # the pool is where the other targets are from
        masked[np.arange(size), np.arange(size)] = False
        rest = self.vectors[rows[size:]] if self.pool_vectors is None else self.pool_vectors
        keys = mx.concatenate([target, mx.array(rest)])
        count = (masked.size - np.count_nonzero(masked)) / max(1, size) - 1
        return Task(target, keys, mx.array(masked), count)

    def _of_pool(self, generator: np.random.Generator | None) -> np.ndarray:
        if not self.drawn:
            return self.pool
        if generator is None:
            return self.pool[np.arange(self.drawn) * len(self.pool) // self.drawn]
        return self.pool[generator.permutation(len(self.pool))[: self.drawn]]

    def __call__(self, predicted: mx.array, task: Task) -> tuple[mx.array, mx.array, mx.array]:
        """predicted [B, D], L2-normalised. The loss, its InfoNCE (0 where it has none), and 1 − mean cosine."""
        options = self.options
        cosine = 1 - (predicted * task.target).sum(axis=-1).mean()
        if task.keys is None:
            return cosine + mx.square(predicted - task.target).mean(), mx.array(0.0), cosine
        infonce = info_nce(predicted, task.keys, options.temperature, mask=task.mask)
        weight = 1.0 if options.objective == "infonce" else options.infonce_weight
        return weight * infonce + (1 - weight) * cosine, infonce, cosine
