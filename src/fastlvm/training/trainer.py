"""Training with torch: one model, one payload, one run folder."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlvm.errors import InputError
from fastlvm.models import ModelConfig, create
from fastlvm.models.tower import Tower, arrays
from fastlvm.training import checkpoint, curve, runs
from fastlvm.training.augment import Augment
from fastlvm.training.interrupt import Interrupt
from fastlvm.training.learned import Learned, split_tower
from fastlvm.training.loop import EVAL_BATCH, Loop, RunSummary, check_splits
from fastlvm.training.negatives import Batch, Negatives
from fastlvm.training.objective import Objective
from fastlvm.training.ranks import Ranks, joined
from fastlvm.training.step import Step

if TYPE_CHECKING:
    from fastlvm.data import Payload, Space, Windows


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
    """Train `model` on the windows' training split and keep the weights with the best validation R@5 in folder `out`.

    settings   fields of `TrainOptions` (objective, epochs, batch_size, lr, space, …) and of `ModelConfig` (d_model, …).
               Without `decay`, the recency mixture's decay is fitted on training windows.
    resume     go on from `out/last.safetensors` with the same settings, bit for bit; an empty folder is started.
    progress   called as progress(epoch=, epochs=, step=, steps=, loss=, lr=, entry=None) after every optimizer step
               and, with `entry` the epoch's line of the history, after every epoch. `step` counts within the epoch.

    Started by torchrun, the processes share every batch: `torchrun --nproc-per-node=2 -m fastlvm train …`. Their
    gradients are those of one process with the same batch.

    The checkpoint is written after every epoch. Ctrl-C ends the step under way, writes it at that step and raises
    KeyboardInterrupt. Raises InputError for settings or a folder that do not fit, IntegrityError when the windows do
    not come from the payload or a file is damaged; nothing is written then.
    """
    config, options, fit = runs.request(model, payload, windows, settings, size)
    windows.verify(payload)  # payload ids, keys and vectors
    check_splits(windows)
    with joined() as ranks, checkpoint.KeptRandom(), Interrupt() as interrupt, _deterministic(options.deterministic):
        for turn in range(2):  # the first process makes the folder, and the others find it
            if ranks.first == (turn == 0):
                run, space = runs.open_run(out, config, options, fit, payload, windows, resume or not ranks.first)
            ranks.wait()
        return Trainer(Path(out), run, space, payload, windows, progress, interrupt, ranks).run()


def size(config: ModelConfig) -> int:
    """How many weights a model has."""
    with torch.device("meta"):  # shapes without memory
        return sum(weight.numel() for weight in create(config).parameters())


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
        ranks: Ranks,
    ) -> None:
        super().__init__(path, run, space, payload, windows, progress, interrupt)
        self.ranks, self.first, options = ranks, ranks.first, self.options
        self.vectors = torch.from_numpy(runs.vectors(payload, space, path))  # float32 [N, dim]
        self.windows = torch.from_numpy(self.rows)
        articles, pool = torch.from_numpy(self.articles), torch.from_numpy(self.pool)

        checkpoint.seed_all(options.seed)
        self.model = create(ModelConfig.from_dict(run["model"]))
        tower = Tower(payload.dim, options.tower, self.model.config.dropout) if options.tower else None
        self.negatives = Negatives(options, articles, torch.from_numpy(self.groups), pool)
        shared = None if tower is None else ranks.parallel(tower)
        self.objective = Objective(options, self.vectors, self.negatives, shared)
        self.augment = Augment(
            pool,
            articles,
            context_dropout=options.context_dropout,
            span_corruption=options.span_corruption,
            seed=options.seed + 1,
        )
        self.learned = Learned(self.model, self.objective.projection, tower, options)
        self.optimizer = torch.optim.AdamW(self.learned.groups(), lr=options.lr, fused=True)
        self.best: dict[str, Tensor] = {}
        self.step = Step(self.model, self.objective, options, ranks)
        if self.objective.projection is not None:
            self.objective.parallel = (ranks.parallel(self.objective.projection),)
        if not ranks.first:
            torch.manual_seed(options.seed * 1_000_003 + ranks.rank)  # dropout of its own
        self.board = curve.Board(path)

    def _payload_vectors(self) -> np.ndarray:
        """The payload as it would be searched now, float32 [N, dim]."""
        if self.learned.tower is None:
            return self.vectors.numpy()
        space = self.space.with_tower(arrays(self.learned.tower.state_dict()))
        return runs.vectors(self.payload, space, self.path)

    def _parameters(self) -> int:
        return sum(weight.numel() for weight in self.learned.weights().values())

    def _stopping(self) -> bool:
        return self.ranks.any(self.interrupt.requested)

    def _totals(self) -> list[float]:
        return self.ranks.sums(self.state.sums)

    def _judged(self) -> dict[str, float | None]:
        found: dict[str, float | None] = self.ranks.same(self._evaluate() if self.first else None)
        return found

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.rows), generator=generator)

    def _begin(self, epoch: int, fresh: bool) -> None:
        if fresh:
            self.negatives.mine(self._nearest)
        self.learned.modules.train()

    def _step(self, chosen: Tensor) -> tuple[float, float]:
        options, state = self.options, self.state
        batch = Batch(self.windows[chosen], chosen, self.ranks.share(len(chosen)))
        lr = self._rate(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
        begun = time.perf_counter()
        rows = batch.everyone[:, :-1]  # noise is drawn for all, so that it does not depend on the number of processes
        context = self.learned.towered(self.augment(self.vectors[rows], self.vectors, rows)[batch.own])
        state.loading += time.perf_counter() - begun
        self.optimizer.zero_grad(set_to_none=True)
        weight = self.ranks.weight(len(batch.everyone))
        loss = self.step(context, batch, self.augment.generator, weight)
        self.negatives.remember(batch)
        value, infonce = loss.total.item(), 0.0 if loss.infonce is None else loss.infonce.item()
        n = weight * len(batch.everyone) / self.ranks.size
        self._count(value, infonce, loss.cosine.item(), loss.negatives, n)
        nn.utils.clip_grad_norm_(list(self.learned.names), options.clip)
        self.optimizer.step()
        state.step += 1
        self.learned.follow(state.step)
        return value, lr

    @torch.no_grad()
    def _nearest(self, k: int) -> np.ndarray:
        """The k payload rows nearest to each training window's prediction, its target's group and context left out."""
        self.learned.modules.eval()
        contexts = (self.learned.towered(self.vectors[rows[:, :-1]]) for rows in self.windows.split(EVAL_BATCH))
        predicted = torch.cat([self.step.predict(context) for context in contexts])
        return runs.nearest(predicted.numpy(), self._payload_vectors(), self.rows, k)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float | None]:
        predicted, loss, cosine = [], 0.0, 0.0
        windows = torch.from_numpy(self.validation.rows)
        with self.learned.judged():
            for rows in windows.split(EVAL_BATCH):
                batch = Batch(rows)
                predicted.append(self.model(self.learned.towered(self.vectors[batch.context])))
                parts = self.objective(predicted[-1], batch)
                loss += float(parts.total) * len(rows)
                cosine += (1 - float(parts.cosine)) * len(rows)
            pool = self._payload_vectors()
        n = len(windows)
        figures = self.validation.figures(torch.cat(predicted).numpy(), pool)
        return {"val_loss": loss / n, "val_cosine": cosine / n, **figures}

    def _take_best(self) -> None:
        self.best = {name: weight.clone() for name, weight in self.learned.kept().items()}

    def _best(self) -> dict[str, Tensor]:
        return self.best

    def _note(self, entry: dict[str, Any]) -> None:
        if self.first:
            self.board.add(entry)

    def _close(self) -> None:
        self.board.close()

    def _tensors(self) -> dict[str, Tensor]:
        dropout = self.ranks.all(torch.get_rng_state())
        if not self.first:
            return {}
        return {
            **self.learned.tensors(),
            **checkpoint.prefixed("best", self.best),
            **checkpoint.prefixed("optimizer", checkpoint.optimizer_tensors(self.optimizer, self.learned.names)),
            **checkpoint.prefixed("random", checkpoint.random_tensors(self.augment.generator)),
            **{f"dropout.{rank}": state for rank, state in enumerate(dropout)},
            **checkpoint.prefixed("negatives", self.negatives.tensors()),
        }

    def _write(self, path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        checkpoint.save(path, tensors, meta)

    def _write_derived(self, best: bool) -> None:
        tower = split_tower(self.best)[1] if best else None
        if tower is not None:
            self.space.with_tower(tower).save(self.path / runs.SPACE)
        super()._write_derived(best)

    def _restore(self) -> None:
        path = self.path / runs.LAST
        tensors, meta = checkpoint.load(path)
        self._check_owner(meta)
        self.learned.restore(tensors, path)
        checkpoint.load_optimizer(self.optimizer, self.learned.names, checkpoint.pick(tensors, "optimizer"), path)
        self.best = checkpoint.pick(tensors, "best")
        checkpoint.load_random(checkpoint.pick(tensors, "random"), self.augment.generator, path)
        dropout = checkpoint.pick(tensors, "dropout")
        if len(dropout) != self.ranks.size:
            raise InputError(f"{path} is of {len(dropout)} processes, and these are {self.ranks.size}: start as many")
        torch.set_rng_state(dropout[str(self.ranks.rank)])
        self.negatives.restore(checkpoint.pick(tensors, "negatives"))
        self._resume(meta)


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
