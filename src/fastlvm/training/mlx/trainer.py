"""Training with mlx: one model, one payload, one run folder."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_reduce

from fastlvm.errors import InputError
from fastlvm.models import ModelConfig, weight_file
from fastlvm.models.mlx import create, load_weights, weights
from fastlvm.training import runs
from fastlvm.training.interrupt import Interrupt
from fastlvm.training.loop import EVAL_BATCH, Loop, RunSummary, check_splits
from fastlvm.training.mlx.objective import Objective
from fastlvm.training.mlx.optimizer import Optimizer
from fastlvm.training.options import TrainOptions

if TYPE_CHECKING:
    from fastlvm.data import Payload, Space, Windows

FRAMEWORK = "mlx"
TORCHS = (
    "micro_batch",
    "projection",
    "tower",
    "queue",
    "hard_negatives",
    "context_dropout",
    "span_corruption",
    "precision",
    "compile",
    "deterministic",
    "ema",
)
"""Fields of `TrainOptions` that only torch has; here they keep their defaults."""


def train(
    model: str | ModelConfig,
    payload: Payload,
    windows: Windows,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: Callable[..., None] | None = None,
    **settings: Any,
) -> RunSummary:
    """`fastlvm.training.train` with mlx, on mlx's default device and in float32; the run folder is of the same files.

    What is drawn hangs on the seed and the number of the step alone, so that a run resumes bit for bit; it is drawn
    otherwise than by torch. Of `TrainOptions` those in `TORCHS` are refused. Raises as `fastlvm.training.train` does.
    """
    with _kept_random():
        config, options, fit = runs.request(model, payload, windows, settings, _size)
        _check_options(options)
        windows.verify(payload)  # payload ids, keys and vectors
        check_splits(windows)
        with Interrupt() as interrupt:
            run, space = runs.open_run(out, config, options, fit, payload, windows, resume, FRAMEWORK)
            return Trainer(Path(out), run, space, payload, windows, progress, interrupt).run()


def _size(config: ModelConfig) -> int:
    return _count(create(config))  # mlx makes no array before somebody reads it


def _count(model: nn.Module) -> int:
    found: int = tree_reduce(lambda total, weight: total + weight.size, model.parameters(), 0)
    return found


def _check_options(options: TrainOptions) -> None:
    for name in TORCHS:
        value, only = getattr(options, name), getattr(TrainOptions, name)
        if value != only:
            raise InputError(f"{name} is {value!r}, and mlx trains with {only!r} alone: leave it out or use torch")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("torchrun has started several processes, and mlx trains in one: start it without torchrun")


class Trainer(Loop):
    """State of one run in memory. Built afresh from a run folder, it stands where the last checkpoint left off."""

    def __init__(
        self,
        path: Path,
        run: dict[str, Any],
        space: Space,
        payload: Payload,
        windows: Windows,
        progress: Callable[..., None] | None,
        interrupt: Interrupt,
    ) -> None:
        super().__init__(path, run, space, payload, windows, progress, interrupt)
        self.vectors = runs.vectors(payload, space, path)  # float32 [N, dim]
        self._seed(0)
        self.model = create(ModelConfig.from_dict(run["model"]))
        mx.eval(self.model.parameters())
        self.objective = Objective(self.options, self.vectors, self.articles, self.groups, self.pool)
        self.optimizer = Optimizer(self.model, self.options)
        self.best: dict[str, np.ndarray] = {}

    def _seed(self, step: int) -> None:
        """mlx's generator for the weights, 0, or for the dropout of a step, from 1 on."""
        mx.random.seed((self.options.seed << 32) | step)

    def _draws(self, *which: int) -> np.random.Generator:
        return np.random.default_rng([self.options.seed, *which])

    def _parameters(self) -> int:
        return _count(self.model)

    def _order(self, epoch: int) -> np.ndarray:
        return self._draws(0, epoch).permutation(len(self.rows))

    def _begin(self, epoch: int, fresh: bool) -> None:
        self.model.train()

    def _step(self, chosen: np.ndarray) -> tuple[float, float]:
        state = self.state
        lr, rows = self._rate(state.step), self.rows[chosen]
        begun = time.perf_counter()
        context = mx.array(self.vectors[rows[:, :-1]])
        state.loading += time.perf_counter() - begun
        task = self.objective.task(rows, self._draws(1, state.step))
        self._seed(state.step + 1)
        gradients_of = nn.value_and_grad(self.model, lambda x: self.objective(self.model(x), task))
        (loss, infonce, cosine), gradients = gradients_of(context)
        value = float(loss)
        self._count(value, float(infonce), float(cosine), task.negatives, len(rows))
        self.optimizer(gradients, lr)
        state.step += 1
        return value, lr

    def _evaluate(self) -> dict[str, float | None]:
        self.model.eval()
        predicted, loss, cosine = [], 0.0, 0.0
        windows = self.validation.rows
        for first in range(0, len(windows), EVAL_BATCH):
            rows = windows[first : first + EVAL_BATCH]
            found = self.model(mx.array(self.vectors[rows[:, :-1]]))
            total, _, apart = self.objective(found, self.objective.task(rows))
            loss += float(total) * len(rows)
            cosine += (1 - float(apart)) * len(rows)
            predicted.append(np.array(found))
        figures = self.validation.figures(np.concatenate(predicted), self.vectors)
        return {"val_loss": loss / len(windows), "val_cosine": cosine / len(windows), **figures}

    def _take_best(self) -> None:
        self.best = weights(self.model)

    def _best(self) -> dict[str, np.ndarray]:
        return self.best

    def _tensors(self) -> dict[str, np.ndarray]:
        return {
            **weight_file.prefixed("model", weights(self.model)),
            **weight_file.prefixed("best", self.best),
            **weight_file.prefixed("optimizer", self.optimizer.arrays()),
        }

    def _write(self, path: Path, tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        weight_file.save(path, tensors, meta)

    def _restore(self) -> None:
        path = self.path / runs.LAST
        tensors, meta = weight_file.load(path)
        self._check_owner(meta)
        load_weights(self.model, weight_file.pick(tensors, "model"), path)
        self.optimizer.restore(weight_file.pick(tensors, "optimizer"), path)
        self.best = weight_file.pick(tensors, "best")
        self._resume(meta)


@contextlib.contextmanager
def _kept_random() -> Iterator[None]:
    """Leave the caller's mlx generator as it was found."""
    state: Any = mx.random.state
    high, low = (int(word) for word in state[0])  # its key, of which a seed is the two halves
    try:
        yield
    finally:
        mx.random.seed((high << 32) | low)
