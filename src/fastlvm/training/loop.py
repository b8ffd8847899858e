"""The epochs of a run, whatever framework takes its steps: judged, reported, written down, and where they end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlvm.errors import InputError, IntegrityError
from fastlvm.evaluation.gates import Verdict, sentence
from fastlvm.files import write_json
from fastlvm.training import curve, runs
from fastlvm.training.interrupt import Interrupt
from fastlvm.training.options import TrainOptions, learning_rate
from fastlvm.training.run_gates import RunGates
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


def check_splits(windows: Windows) -> None:
    """Raises InputError where there is nothing to train on, or to judge by."""
    for split in ("train", "validation"):
        if len(windows.rows(split)) == 0:
            raise InputError(f"the {split} split holds no window: build the windows with a larger share for it")


class Loop:
    """A run in memory. What derives from it takes the steps, judges the model, and writes and reads its tensors.

    rows        int64 [n, context + 1], payload rows of the training windows, the target last.
    pool        int64 [P], payload rows of the training articles.
    groups, articles    int64 [N], of every payload row.
    """

    first = True  # whether this process writes the run folder

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
        self.path, self.identity = path, run
        self.payload, self.space = payload, space
        self.options = options = TrainOptions.from_dict(run["training"])
        self.progress, self.interrupt = progress, interrupt
        self.contrastive = options.objective != "ar"
        self.groups = np.array(payload.groups, dtype=np.int64)
        self.articles = np.array(payload.keys[:, 0], dtype=np.int64)
        trained = np.isin(payload.keys[:, 0], windows.articles("train"))
        self.pool = np.flatnonzero(trained)
        self.rows = self._ordered(windows.rows("train"))
        judged = self._ordered(runs.sample(windows.rows("validation"), options.validation_limit, options.seed))
        self.validation = Validation(self.groups, judged, trained)
        self.gates, self.missed = RunGates(options.gates), ""
        self.state = State()
        self.steps = math.ceil(len(self.rows) / options.batch_size)  # of one epoch

    def _ordered(self, rows: np.ndarray) -> np.ndarray:
        found = np.array(rows, dtype=np.int64)
        return np.ascontiguousarray(found[:, ::-1]) if self.options.reverse else found

    def _parameters(self) -> int:
        """How many numbers are learned or kept."""
        raise NotImplementedError

    def _order(self, epoch: int) -> Any:
        """The training windows in an epoch's order, from the seed alone: one that was cut short finds it again."""
        raise NotImplementedError

    def _begin(self, epoch: int, fresh: bool) -> None:
        """What comes before an epoch's steps, and before the rest of them where it is not `fresh`."""
        raise NotImplementedError

    def _step(self, chosen: Any) -> tuple[float, float]:
        """One optimizer step on some of `_order`; the loss and the learning rate. Counts `state` on."""
        raise NotImplementedError

    def _evaluate(self) -> dict[str, float | None]:
        """`val_loss`, `val_cosine` and the metrics of the weights that would be kept, on the validation windows."""
        raise NotImplementedError

    def _take_best(self) -> None:
        """Hold the weights that would be kept as the best so far."""
        raise NotImplementedError

    def _tensors(self) -> Any:
        """Everything that a checkpoint keeps beside `state`."""
        raise NotImplementedError

    def _write(self, path: Path, tensors: Any, meta: dict[str, Any]) -> None:
        raise NotImplementedError

    def _best(self) -> Any:
        """What `_take_best` holds."""
        raise NotImplementedError

    def _restore(self) -> None:
        """Go back to where last.safetensors left off; `_resume` for what it says of the state."""
        raise NotImplementedError

    # One process alone; several speak to each other here.
    def _stopping(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self.interrupt.requested

    def _totals(self) -> list[float]:
        return self.state.sums

    def _judged(self) -> dict[str, float | None]:
        return self._evaluate()

    def run(self) -> RunSummary:
        if (self.path / runs.LAST).exists():
            self._restore()
        if self.state.epoch < 0:
            self._finish_epoch(0, None, time.perf_counter())
        while not self.state.stopped:
            self._epoch(self.state.epoch + 1)
        self._close()
        state = self.state
        return RunSummary(
            path=self.path,
            epochs=state.epoch,
            best_epoch=state.best_epoch,
            best_r5=state.best_r5,
            start_r5=state.history[0]["val_r@5"],
            stopped=state.stopped,
            history=state.history,
            parameters=self._parameters(),
            decay=self.identity["model"]["decay"],
            seconds=sum(entry["time"] for entry in state.history),
            windows_per_s=float(np.median([e["windows_per_s"] for e in state.history if e["windows_per_s"]] or [0])),
            first_process=self.first,
            missed=self.missed,
        )

    def _close(self) -> None:
        """After the last epoch."""

    def _epoch(self, epoch: int) -> None:
        state, options = self.state, self.options
        started = time.perf_counter() - state.seconds
        order, done = self._order(epoch), state.step - (epoch - 1) * self.steps
        self._begin(epoch, fresh=done == 0)
        for step in range(done, self.steps):
            loss, lr = self._step(order[step * options.batch_size : (step + 1) * options.batch_size])
            self._report(epoch, step + 1, loss, lr, None)
            if self._stopping() and step + 1 < self.steps:
                state.seconds = time.perf_counter() - started
                self._save()
                raise KeyboardInterrupt
        self._finish_epoch(epoch, self._rate(state.step - 1), started)

    def _rate(self, step: int) -> float:
        return learning_rate(step, self.steps * self.options.epochs, self.options)

    def _count(self, loss: float, infonce: float, cosine: float, negatives: float, windows: float) -> None:
        """Take a step's figures, means over `windows`, into the epoch's; a loss that is no number ends the run."""
        if not math.isfinite(loss):
            step, lr = self.state.step + 1, self.options.lr
            raise InputError(f"the loss is {loss} at step {step}: train with a smaller lr than {lr}")
        for i, part in enumerate((loss, infonce, cosine, negatives, 1.0)):
            self.state.sums[i] += part * windows

    def _finish_epoch(self, epoch: int, lr: float | None, started: float) -> None:
        state = self.state
        seconds = time.perf_counter() - started
        *sums, windows = self._totals()
        trained = [total / windows for total in sums] if windows else [None] * 4
        entry: dict[str, Any] = {
            "epoch": epoch,
            "train_loss": trained[0],
            "train_infonce": trained[1] if self.contrastive else None,
            "train_ar_cosine": trained[2],
            **self._judged(),
            "negatives": trained[3] if self.contrastive else None,
            "lr": lr,
            "time": time.perf_counter() - started,
            "windows_per_s": windows / seconds if windows else None,
            "loading": state.loading / seconds if windows else None,
        }
        state.history.append(entry)
        state.epoch, state.sums, state.seconds, state.loading = epoch, [0.0] * 5, 0.0, 0.0
        if entry["val_r@5"] > state.best_r5:
            state.best_r5, state.best_epoch = entry["val_r@5"], epoch
            self._take_best()
        verdicts = self._end(entry)
        if verdicts:
            entry["gates"] = [verdict.to_dict() for verdict in verdicts]
        self._save()
        self._note(entry)
        self._report(epoch, self.steps if epoch else 0, entry["train_loss"], lr, entry)
        if self._stopping():
            raise KeyboardInterrupt

    def _note(self, entry: dict[str, Any]) -> None:
        """An epoch's line, once it is written."""

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
        if self.progress is not None and self.first:
            self.progress(
                epoch=epoch, epochs=self.options.epochs, step=step, steps=self.steps, loss=loss, lr=lr, entry=entry
            )

    def _save(self) -> None:
        """Write the checkpoint first, then what follows from it."""
        tensors = self._tensors()
        if not self.first:
            return
        meta = {"config": self.identity, "state": dataclasses.asdict(self.state)}
        with self.interrupt.shielded():
            self._write(self.path / runs.LAST, tensors, meta)
            self._write_derived(best=self.state.best_epoch == self.state.epoch)

    def _write_derived(self, best: bool) -> None:
        state = self.state
        write_json(self.path / runs.HISTORY, state.history)
        if state.history:
            curve.draw(state.history, self.path)
        if not best:
            return
        meta = {key: self.identity[key] for key in ("model", "payload_id", "windows_id", "space_id")}
        meta |= {"epoch": state.best_epoch, "val_r@5": state.best_r5}
        self._write(self.path / runs.BEST, self._best(), meta)

    def _check_owner(self, meta: dict[str, Any]) -> None:
        """Raises IntegrityError where a checkpoint's metadata is not of this run."""
        if not runs.same(meta.get("config"), self.identity):
            path = self.path / runs.LAST
            raise IntegrityError(f"{path} belongs to another run than {runs.CONFIG} beside it: train in a new folder")

    def _resume(self, meta: dict[str, Any]) -> None:
        """Take over the state of a checkpoint whose tensors are restored."""
        self.state = State(**meta["state"])
        if self.state.stopped == "gate":
            self._end(self.state.history[-1])  # the gate may be left out now
        if not self.first:
            return
        with self.interrupt.shielded():  # a kill may have come between the checkpoint and these
            self._write_derived(best=True)
