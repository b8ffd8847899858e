"""The training loop: one model, one payload, one run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlvm.errors import InputError, IntegrityError
from fastlvm.evaluation.gates import Verdict, sentence
from fastlvm.files import write_json
from fastlvm.models import ModelConfig, create
from fastlvm.models.tower import Tower, arrays
from fastlvm.training import checkpoint, curve, runs
from fastlvm.training.augment import Augment
from fastlvm.training.interrupt import Interrupt
from fastlvm.training.learned import Learned, split_tower
from fastlvm.training.negatives import Batch, Negatives
from fastlvm.training.objective import Objective
from fastlvm.training.options import TrainOptions, learning_rate
from fastlvm.training.ranks import Ranks, joined
from fastlvm.training.run_gates import RunGates
from fastlvm.training.step import Step
from fastlvm.training.validation import Validation

if TYPE_CHECKING:
    from fastlvm.data import Payload, Space, Windows

EVAL_BATCH = 512


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What a run came to. `best_epoch` 0 is the untrained model: training found nothing better."""

    path: Path
    epochs: int
    best_epoch: int
    best_r5: float
    start_r5: float
    stopped: str  # "epochs": all were run; "patience": validation R@5 stayed below its best; "gate": one was missed
    history: list[dict[str, Any]]
    parameters: int
    decay: float
    seconds: float
    windows_per_s: float  # of training, without evaluation
    first_process: bool = True  # of those that torchrun started
    missed: str = ""  # by what a gate stopped the run


@dataclasses.dataclass
class State:
    """Where a run stands, as JSON: everything in a checkpoint that is no tensor."""

    epoch: int = -1  # last finished epoch; 0 is the untrained model's evaluation
    step: int = 0  # optimizer steps done
    # of the epoch under way, over windows: loss, infonce, cosine, negatives, and how many windows
    sums: list[float] = dataclasses.field(default_factory=lambda: [0.0] * 5)
    seconds: float = 0.0
    loading: float = 0.0  # of them, how many were spent on fetching and augmenting contexts
    best_epoch: int = -1
    best_r5: float = -1.0
    stopped: str = ""
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


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
    config, options, fit = runs.request(model, payload, windows, settings)
    windows.verify(payload)  # payload ids, keys and vectors
    for split in ("train", "validation"):
        if len(windows.rows(split)) == 0:
            raise InputError(f"the {split} split holds no window: build the windows with a larger share for it")
    with joined() as ranks, checkpoint.KeptRandom(), Interrupt() as interrupt, _deterministic(options.deterministic):
        for turn in range(2):  # the first process makes the folder, and the others find it
            if ranks.first == (turn == 0):
                run, space = runs.open_run(out, config, options, fit, payload, windows, resume or not ranks.first)
            ranks.wait()
        return Trainer(Path(out), run, space, payload, windows, progress, interrupt, ranks).run()


class Trainer:
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
        self.path, self.identity, self.ranks = path, run, ranks
        self.payload, self.space = payload, space
        self.options = options = TrainOptions.from_dict(run["training"])
        self.progress, self.interrupt = progress, interrupt
        self.vectors = runs.vectors(payload, space, path)  # float32 [N, dim]
        self.groups = np.array(payload.groups, dtype=np.int64)
        articles = torch.from_numpy(np.asarray(payload.keys[:, 0], dtype=np.int64))
        trained = np.isin(payload.keys[:, 0], windows.articles("train"))
        pool = torch.from_numpy(np.flatnonzero(trained))
        self.rows = self._rows(windows.rows("train"))  # [n, context + 1]
        judged = self._rows(runs.sample(windows.rows("validation"), options.validation_limit, options.seed))
        self.validation = Validation(self.groups, judged, trained)

        checkpoint.seed_all(options.seed)
        self.model = create(ModelConfig.from_dict(run["model"]))
        tower = Tower(payload.dim, options.tower, self.model.config.dropout) if options.tower else None
        self.gates, self.missed = RunGates(options.gates), ""
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
        self.state = State()
        self.steps = math.ceil(len(self.rows) / options.batch_size)  # of one epoch
        self.step = Step(self.model, self.objective, options, ranks)
        if self.objective.projection is not None:
            self.objective.parallel = (ranks.parallel(self.objective.projection),)
        if not ranks.first:
            torch.manual_seed(options.seed * 1_000_003 + ranks.rank)  # dropout of its own
        self.board = curve.Board(path)

    def _rows(self, rows: np.ndarray) -> Tensor:
        found = torch.from_numpy(np.array(rows, dtype=np.int64))
        return found.flip(1) if self.options.reverse else found

    def _payload_vectors(self) -> np.ndarray:
        """The payload as it would be searched now, float32 [N, dim]."""
        if self.learned.tower is None:
            return self.vectors.numpy()
        space = self.space.with_tower(arrays(self.learned.tower.state_dict()))
        return runs.vectors(self.payload, space, self.path).numpy()

    def run(self) -> RunSummary:
        if (self.path / runs.LAST).exists():
            self._restore()
        if self.state.epoch < 0:
            self._finish_epoch(0, None, time.perf_counter())
        while not self.state.stopped:
            self._epoch(self.state.epoch + 1)
        self.board.close()
        state = self.state
        return RunSummary(
            path=self.path,
            epochs=state.epoch,
            best_epoch=state.best_epoch,
            best_r5=state.best_r5,
            start_r5=state.history[0]["val_r@5"],
            stopped=state.stopped,
            history=state.history,
            parameters=sum(weight.numel() for weight in self.learned.weights().values()),
            decay=self.identity["model"]["decay"],
            seconds=sum(entry["time"] for entry in state.history),
            windows_per_s=float(np.median([e["windows_per_s"] for e in state.history if e["windows_per_s"]] or [0])),
            first_process=self.ranks.first,
            missed=self.missed,
        )

    def _epoch(self, epoch: int) -> None:
        state, options = self.state, self.options
        started = time.perf_counter() - state.seconds
        # drawn from the seed and the epoch alone, so that an epoch cut short finds its order again
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.rows), generator=generator)
        if state.step == (epoch - 1) * self.steps:
            self.negatives.mine(self._nearest)
        self.learned.modules.train()
        for step in range(state.step - (epoch - 1) * self.steps, self.steps):
            chosen = order[step * options.batch_size : (step + 1) * options.batch_size]
            loss, lr = self._step(Batch(self.rows[chosen], chosen, self.ranks.share(len(chosen))))
            self._report(epoch, step + 1, loss, lr, None)
            if self.ranks.any(self.interrupt.requested) and step + 1 < self.steps:
                state.seconds = time.perf_counter() - started
                self._save()
                raise KeyboardInterrupt
        self._finish_epoch(epoch, learning_rate(state.step - 1, self.steps * options.epochs, options), started)

    def _step(self, batch: Batch) -> tuple[float, float]:
        options, state = self.options, self.state
        lr = learning_rate(state.step, self.steps * options.epochs, options)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
        begun = time.perf_counter()
        rows = batch.everyone[:, :-1]  # noise is drawn for all, so that it does not depend on the number of processes
        context = self.learned.towered(self.augment(self.vectors[rows], self.vectors, rows)[batch.own])
        state.loading += time.perf_counter() - begun
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.step(context, batch, self.augment.generator, self.ranks.weight(len(batch.everyone)))
        self.negatives.remember(batch)
        value = loss.total.item()
        if not math.isfinite(value):
            raise InputError(f"the loss is {value} at step {state.step + 1}: train with a smaller lr than {options.lr}")
        nn.utils.clip_grad_norm_(list(self.learned.names), options.clip)
        self.optimizer.step()
        state.step += 1
        self.learned.follow(state.step)
        n = self.ranks.weight(len(batch.everyone)) * len(batch.everyone) / self.ranks.size
        infonce = 0.0 if loss.infonce is None else loss.infonce.item()
        for i, part in enumerate((value, infonce, loss.cosine.item(), loss.negatives, 1.0)):
            state.sums[i] += part * n
        return value, lr

    @torch.no_grad()
    def _nearest(self, k: int) -> np.ndarray:
        """The k payload rows nearest to each training window's prediction, its target's group and context left out."""
        self.learned.modules.eval()
        contexts = (self.learned.towered(self.vectors[rows[:, :-1]]) for rows in self.rows.split(EVAL_BATCH))
        predicted = torch.cat([self.step.predict(context) for context in contexts])
        return runs.nearest(predicted.numpy(), self._payload_vectors(), self.rows.numpy(), k)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float | None]:
        """Loss, cosine and other metrics of the weights that would be kept, on the validation windows."""
        predicted, loss, cosine = [], 0.0, 0.0
        with self.learned.judged():
            for rows in self.validation.rows.split(EVAL_BATCH):
                batch = Batch(rows)
                predicted.append(self.model(self.learned.towered(self.vectors[batch.context])))
                parts = self.objective(predicted[-1], batch)
                loss += float(parts.total) * len(rows)
                cosine += (1 - float(parts.cosine)) * len(rows)
            pool = self._payload_vectors()
        n = len(self.validation.rows)
        figures = self.validation.figures(torch.cat(predicted).numpy(), pool)
        return {"val_loss": loss / n, "val_cosine": cosine / n, **figures}

    def _finish_epoch(self, epoch: int, lr: float | None, started: float) -> None:
        state = self.state
        seconds = time.perf_counter() - started
        *sums, windows = self.ranks.sums(state.sums)
        trained = [total / windows for total in sums] if windows else [None] * 4
        judged = self.ranks.same(self._evaluate() if self.ranks.first else None)
        entry: dict[str, Any] = {
            "epoch": epoch,
            "train_loss": trained[0],
            "train_infonce": trained[1] if self.objective.contrastive else None,
            "train_ar_cosine": trained[2],
            **judged,
            "negatives": trained[3] if self.objective.contrastive else None,
            "lr": lr,
            "time": time.perf_counter() - started,
            "windows_per_s": windows / seconds if windows else None,
            "loading": state.loading / seconds if windows else None,
        }
        state.history.append(entry)
        state.epoch, state.sums, state.seconds, state.loading = epoch, [0.0] * 5, 0.0, 0.0
        if entry["val_r@5"] > state.best_r5:
            state.best_r5, state.best_epoch = entry["val_r@5"], epoch
            self.best = {name: weight.clone() for name, weight in self.learned.kept().items()}
        judged_by_gates = self._end(entry)
        if judged_by_gates:
            entry["gates"] = [verdict.to_dict() for verdict in judged_by_gates]
        self._save()
        if self.ranks.first:
            self.board.add(entry)
        self._report(epoch, self.steps if epoch else 0, entry["train_loss"], lr, entry)
        if self.ranks.any(self.interrupt.requested):
            raise KeyboardInterrupt

    def _end(self, entry: dict[str, Any]) -> list[Verdict]:
        """Whether the run ends with an epoch, its line being the history's last, and what its gates say."""
        state, epoch = self.state, entry["epoch"]
        if self.options.patience and epoch - state.best_epoch >= self.options.patience:
            state.stopped = "patience"
        else:
            state.stopped = "epochs" if epoch == self.options.epochs else ""
        found = self.gates.judge(entry, ended=bool(state.stopped))
        said = sentence(found)
        if said:
            left = "" if state.stopped else "; resumed without that gate, the run goes on"
            self.missed, state.stopped = f"after epoch {epoch}, {said}{left}", "gate"
        return found

    def _report(
        self, epoch: int, step: int, loss: float | None, lr: float | None, entry: dict[str, Any] | None
    ) -> None:
        if self.progress is not None and self.ranks.first:
            self.progress(
                epoch=epoch, epochs=self.options.epochs, step=step, steps=self.steps, loss=loss, lr=lr, entry=entry
            )

    def _save(self) -> None:
        """Write the checkpoint first, then what follows from it."""
        dropout = self.ranks.all(torch.get_rng_state())
        if not self.ranks.first:
            return
        tensors = {
            **self.learned.tensors(),
            **checkpoint.prefixed("best", self.best),
            **checkpoint.prefixed("optimizer", checkpoint.optimizer_tensors(self.optimizer, self.learned.names)),
            **checkpoint.prefixed("random", checkpoint.random_tensors(self.augment.generator)),
            **{f"dropout.{rank}": state for rank, state in enumerate(dropout)},
            **checkpoint.prefixed("negatives", self.negatives.tensors()),
        }
        meta = {"config": self.identity, "state": dataclasses.asdict(self.state)}
        with self.interrupt.shielded():
            checkpoint.save(self.path / runs.LAST, tensors, meta)
            self._write_derived(best=self.state.best_epoch == self.state.epoch)

    def _write_derived(self, best: bool) -> None:
        state = self.state
        write_json(self.path / runs.HISTORY, state.history)
        if state.history:
            curve.draw(state.history, self.path)
        if not best:
            return
        _, tower = split_tower(self.best)
        if tower is not None:
            self.space.with_tower(tower).save(self.path / runs.SPACE)
        meta = {key: self.identity[key] for key in ("model", "payload_id", "windows_id", "space_id")}
        checkpoint.save(self.path / runs.BEST, self.best, {**meta, "epoch": state.best_epoch, "val_r@5": state.best_r5})

    def _restore(self) -> None:
        path = self.path / runs.LAST
        tensors, meta = checkpoint.load(path)
        if not runs.same(meta.get("config"), self.identity):
            raise IntegrityError(f"{path} belongs to another run than {runs.CONFIG} beside it: train in a new folder")
        self.learned.restore(tensors, path)
        checkpoint.load_optimizer(self.optimizer, self.learned.names, checkpoint.pick(tensors, "optimizer"), path)
        self.best = checkpoint.pick(tensors, "best")
        checkpoint.load_random(checkpoint.pick(tensors, "random"), self.augment.generator, path)
        dropout = checkpoint.pick(tensors, "dropout")
        if len(dropout) != self.ranks.size:
            raise InputError(f"{path} is of {len(dropout)} processes, and these are {self.ranks.size}: start as many")
        torch.set_rng_state(dropout[str(self.ranks.rank)])
        self.negatives.restore(checkpoint.pick(tensors, "negatives"))
        self.state = State(**meta["state"])
        if self.state.stopped == "gate":
            self._end(self.state.history[-1])  # the gate may be left out now
        if not self.ranks.first:
            return
        with self.interrupt.shielded():  # a kill may have come between the checkpoint and these
            self._write_derived(best=True)


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
