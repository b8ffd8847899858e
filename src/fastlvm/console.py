"""What the commands share: how they end, what they read from the command line and how they show it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from fastlvm import gates
from fastlvm.errors import FastlvmError, InputError

if TYPE_CHECKING:
    import numpy as np
    from rich.progress import TaskID
    from typing_extensions import Self

    from fastlvm.evaluation import Verdict
    from fastlvm.evaluation.latency import Latency
    from fastlvm.retrieval import Index
    from fastlvm.training import RunSummary
    from fastlvm.training.sweep import Result

INTERRUPTED = 130
GATES = f"{', '.join(gates.names())}, or a .toml file"
_EXTRAS = {"torch": "torch", "matplotlib": "plot", "mlx": "mlx"}


def command(group: typer.Typer, name: str, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose help ends in an example and whose failures are one line and an exit code."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except FastlvmError as error:
                _leave(str(error), error.exit_code)
            except KeyboardInterrupt as error:
                _leave(str(error) or "interrupted", INTERRUPTED)
            except BrokenPipeError:
                _drop_output()
                raise typer.Exit(0) from None
            except MemoryError as error:
                _leave(f"not enough memory ({error}): ask for less, or use a larger machine", InputError.exit_code)
            except OSError as error:
                _drop_output()
                what = f"{error.filename}: " if error.filename else ""
                _leave(f"{what}{error.strerror or error}", InputError.exit_code)
            except ModuleNotFoundError as error:
                root = (error.name or "").partition(".")[0]
                if root not in _EXTRAS:
                    raise
                _leave(f"this needs {root}: pip install 'fastlvm[{_EXTRAS[root]}]'", InputError.exit_code)

        group.command(name, epilog=f"Example: {example}")(guarded)
        return function

    return register


def _leave(message: str, code: int) -> NoReturn:
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(message.split()))
    typer.echo(f"fastlvm: {line}", err=True)
    raise typer.Exit(code)


def _drop_output() -> None:
    """Whatever standard output cannot take: without this the interpreter would try again on leaving, and complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def interrupted(out: Path, again: str) -> KeyboardInterrupt:
    """What to raise on Ctrl-C so that the line printed says how to go on; `again`: how, where `out` holds something."""
    kept = out.is_dir() and any(out.iterdir())
    return KeyboardInterrupt(f"interrupted; {again} goes on from what {out} holds" if kept else "interrupted")


def note(text: str) -> None:
    """A line about what is being done, on the error stream so that results can be piped."""
    typer.echo(text, err=True)


def show(renderable: Any) -> None:
    """Print a rich table; as wide as it needs where the output is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=120, highlight=False)
    console.print(renderable)


def read_array(path: Path, name: str) -> np.ndarray:
    """A .npy array, memory-mapped; never a pickled one."""
    import numpy as np

    from fastlvm.data.npz import HEADER_ERRORS

    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise InputError(f"{name}: {path} {what}, and a .npy file is wanted")
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except HEADER_ERRORS as error:
        raise InputError(f"{name}: {path} is not a whole .npy array ({error}): save it with numpy.save") from error


def keep_apart(given: Path, out: Path) -> None:
    """Refuse to write over what is read."""
    if out.exists() and given.exists() and out.samefile(given):
        raise InputError(f"--out: {out} is the file that is read: name another one")


def parse_split(text: str) -> tuple[float, float, float]:
    """Three fractions such as 0.8,0.1,0.1."""
    try:
        train, validation, test = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--split: got {text!r}, wants three fractions such as 0.8,0.1,0.1") from error
    return train, validation, test


def parse_rerankers(texts: list[str]) -> list[Any]:
    """The rerankers that texts such as "mmr:0.7" name, in their order."""
    from fastlvm.retrieval.rerank import parse

    return [parse(text) for text in texts]


def parse_settings(pairs: list[str], taken: Collection[str]) -> dict[str, Any]:
    """`key=value` pairs; values are JSON where they parse as JSON, else plain strings. `taken`: keys not to be set."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise InputError(f"--set: got {pair!r}, wants key=value such as d_model=256")
        if key in taken or key in settings:
            raise InputError(f"--set: {key} has an option of its own or is given twice: name it once, as that option")
        try:
            settings[key] = json.loads(value)
        except (ValueError, RecursionError):
            settings[key] = value
    return settings


class _Bar:
    """A progress bar on the error stream, drawn on a terminal alone; `column` is how it counts."""

    def __init__(self, column: str) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            getattr(progress, column)(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class TrainingBar(_Bar):
    """Draws what the trainer reports: on a terminal a bar for the epoch under way, and a line for each one done."""

    def __init__(self) -> None:
        super().__init__("MofNCompleteColumn")
        self._epoch = -1

    def __call__(
        self,
        *,
        epoch: int,
        epochs: int,
        step: int,
        steps: int,
        loss: float | None,
        lr: float | None,
        entry: dict[str, Any] | None,
    ) -> None:
        if entry is not None:
            trained = "" if entry["train_loss"] is None else f"train loss {entry['train_loss']:.4f}  "
            shown = {"cosine": "val_cosine", "R@5": "val_r@5", "unseen": "val_r@5_unseen"}
            figures = "  ".join(f"{name} {entry[key]:.4f}" for name, key in shown.items())
            self._bar.console.print(f"epoch {epoch:>3}  {trained}{figures}")
            for row in entry.get("gates", []):
                word = {None: "not judged in training", True: "met", False: "missed"}[row["passed"]]
                value = "" if row["value"] is None else f" {row['value']:.4f}"
                self._bar.console.print(f"gate {row['gate']}: {row['metric']}{value}, wanted {row['wanted']}: {word}")
            return
        if epoch != self._epoch:
            self._bar.start()  # not before there is something to draw: what comes first may be refused
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task, self._epoch = self._bar.add_task(f"epoch {epoch} of {epochs}", total=steps), epoch
        assert self._task is not None
        self._bar.update(self._task, completed=step)


class RankingBar(_Bar):
    """Says what an evaluation is about to do and, on a terminal, draws how much of it is done."""

    def __init__(self) -> None:
        super().__init__("TaskProgressColumn")

    def say(self, text: str) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        self._bar.console.print(text, markup=False, soft_wrap=True)

    def step(self, share: float) -> None:
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=1.0)
        self._bar.update(self._task, completed=share)


def training_verdict(summary: RunSummary) -> str:
    """What training came to, in a sentence."""
    start = f"the recency mixture it starts from (decay {summary.decay:g}) has validation R@5 {summary.start_r5:.4f}"
    if summary.best_epoch == 0:
        kept = "no epoch beat it, so the mixture is what was kept"
    else:
        kept = f"epoch {summary.best_epoch} of {summary.epochs} reached {summary.best_r5:.4f} and was kept"
    return f"{summary.parameters:,} weights, {summary.seconds:.0f} s of training: {start}; {kept}"


def print_sweep(results: Sequence[Result]) -> None:
    """Every run of a sweep, and the mean over seeds."""
    from rich.table import Table

    from fastlvm.training.sweep import averages

    runs = Table(title="validation R@5 of the best epoch")
    for title in ("run", "parameters", "best epoch", "R@5", "untrained", "unseen R@5", "untrained", "windows/s"):
        runs.add_column(title, justify="left" if title == "run" else "right")
    for one in results:
        values = one.r5, one.start_r5, one.unseen_r5, one.start_unseen_r5
        figures = *(f"{value:.4f}" for value in values), f"{one.windows_per_s:.0f}"
        runs.add_row(one.cell.name, f"{one.parameters:,}", str(one.best_epoch), *figures)
    show(runs)
    means = Table(title="over seeds")
    for title in ("model", "runs", "mean R@5", "deviation"):
        means.add_column(title, justify="left" if title == "model" else "right")
    for name, count, mean, deviation in averages(results):
        means.add_row(name, str(count), f"{mean:.4f}", f"{deviation:.4f}" if count > 1 else "-")
    show(means)


def print_latency(
    latency: Latency,
    profile: list[tuple[str, dict[str, float]]] | None,
    nbytes: int,
    verdicts: Sequence[Verdict] = (),
    *,
    as_json: bool,
) -> None:
    """Stages of a prediction in milliseconds, where there is a profile its layers in microseconds, and gates."""
    if as_json:
        content = latency.to_dict() | {"packed_bytes": nbytes}
        if profile is not None:
            content["profile"] = [{"layer": name, "microseconds": parts} for name, parts in profile]
        if verdicts:
            content["gates"] = [verdict.to_dict() for verdict in verdicts]
        typer.echo(json.dumps(content))
        return
    from rich.table import Table

    threads = "the default threads" if latency.threads is None else f"{latency.threads} threads"
    stages = Table(title=f"ms for one context; {latency.repeats} calls on {threads}; {latency.machine}")
    for title in ("stage", "median", "P95", "P99", "mean"):
        stages.add_column(title, justify="left" if title == "stage" else "right")
    for name, stage in latency.stages.items():
        stages.add_row(name, *(f"{value:.3f}" for value in (stage.p50, stage.p95, stage.p99, stage.mean)))
    show(stages)
    if profile is not None:
        _print_profile(profile, nbytes)
    if verdicts:
        judged = Table(title="gates")
        for title in ("gate", "wanted", "measured", ""):
            judged.add_column(title)
        for verdict in verdicts:
            judged.add_row(verdict.gate, verdict.wanted, verdict.measured, verdict.word)
        show(judged)


def _print_profile(profile: list[tuple[str, dict[str, float]]], nbytes: int) -> None:
    from rich.table import Table

    phases = list(dict.fromkeys(phase for _, parts in profile for phase in parts))
    layers = Table(title=f"µs by layer; {nbytes / 1e6:.1f} MB of packed weights", show_footer=True)
    layers.add_column("layer", footer="all")
    for phase in phases:
        layers.add_column(phase, f"{sum(parts.get(phase, 0) for _, parts in profile):.0f}", justify="right")
    layers.add_column("all", f"{sum(sum(parts.values()) for _, parts in profile):.0f}", justify="right")
    for name, parts in profile:
        shown = (f"{parts[phase]:.1f}" if phase in parts else "" for phase in phases)
        layers.add_row(name, *shown, f"{sum(parts.values()):.1f}")
    show(layers)


def print_index(index: Index) -> None:
    """What was measured when an index was built, if anything was."""
    from rich.table import Table

    if not index.curve:
        return
    table = Table(title="recall@50 against exact search, and ms for one query")
    for title in ("kind", "rows", "nlist", "nprobe", "ef_search", "recall@50", "ms", ""):
        table.add_column(title, justify="left" if title in ("kind", "") else "right")
    taken = (index.kind, index.curve[-1].rows, index.nlist, index.nprobe, index.ef_search)
    for point in sorted(index.curve, key=lambda point: (point.rows, point.kind, *(value or 0 for value in point[2:5]))):
        options = ("" if value is None else str(value) for value in point[2:5])
        figures = f"{point.recall_at_50:.4f}", f"{point.ms:.3f}"
        table.add_row(point.kind, f"{point.rows:,}", *options, *figures, "taken" if point[:5] == taken else "")
    show(table)


def print_found(found: Any, ranked: Any = None, *, single: bool, as_json: bool) -> None:
    """Rows, keys and scores of `Predictor.search`, the best first; what `Predictor.rerank` says of its stages."""
    stages = [] if ranked is None else [f"{stage.name} {stage.ms:.3f} ms" for stage in ranked.stages]
    said = {} if ranked is None else {"label": ranked.label, "ms": {s.name: s.ms for s in ranked.stages}}
    results = [found] if single else [type(found)(*part) for part in zip(*found, strict=True)]
    for number, one in enumerate(results):
        rows = [
            {"row": int(row), "article": int(article), "chunk": int(chunk), "score": float(score)}
            for row, score, (article, chunk) in zip(one.ids, one.scores, one.keys, strict=True)
            if row >= 0
        ]
        if as_json:
            typer.echo(json.dumps({"context": number, "results": rows, **said}))
            continue
        if not single:
            typer.echo(f"context {number}")
        typer.echo(f"{'row':>9} {'article':>8} {'chunk':>6} {'score':>8}")
        for r in rows:
            typer.echo(f"{r['row']:>9} {r['article']:>8} {r['chunk']:>6} {r['score']:>8.4f}")
    if stages and not as_json:
        typer.echo(f"{', '.join(stages)}; {ranked.label}")


def print_example(lines: list[tuple[str, str]], width: int = 110) -> None:
    """Labelled texts, each cut to a line."""
    for label, text in lines:
        typer.echo(f"{label}: {text if len(text) <= width else text[: width - 1] + '…'}")
