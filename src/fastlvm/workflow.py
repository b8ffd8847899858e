"""What takes several rooms at once: evaluating runs and artifacts side by side, and describing the machine."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlvm.errors import FastlvmError, GateError, InputError, IntegrityError

if TYPE_CHECKING:
    from fastlvm.data import Payload, Windows
    from fastlvm.evaluation import Ranker, Report
    from fastlvm.predictor import Predictor

LATENCY_CONTEXTS = 500


def model_name(path: Path, among: Sequence[Path]) -> str:
    """How a report calls the model of a folder: its name, its path where two have the same name."""
    same = [other for other in among if other.resolve().name == path.resolve().name]
    return path.resolve().name if len(same) == 1 else str(path)


def _open(path: Path, name: str, payload: Payload) -> tuple[Ranker, Predictor | None]:
    """A run or an artifact as something to rank; an artifact's predictor beside it."""
    from fastlvm.evaluation import Ranker

    if not path.is_dir():
        raise InputError(f"{path} is no folder: name a run or an artifact")
    if (path / "golden.npz").exists():
        from fastlvm.predictor import Predictor

        predictor = Predictor.load(path)
        _same_payload(path, predictor.payload_id, payload)
        return Ranker(name, predictor.predict, predictor.index.space), predictor
    from fastlvm.training import load_run, predict_with

    model, config, space = load_run(path)
    _same_payload(path, config["payload_id"], payload)
    predict = predict_with(model)
    return Ranker(name, lambda context: predict(space.apply(context)), space), None


def _same_payload(path: Path, found: str, payload: Payload) -> None:
    if found != payload.id:
        raise IntegrityError(f"{path} belongs to payload {found}, and {payload.path} is {payload.id}: name its own")


def evaluate_paths(
    paths: Sequence[Path],
    payload: Payload,
    windows: Windows,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    name: str | None = None,
    names: Sequence[str] | None = None,
    clusters: np.ndarray | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Evaluate runs and artifacts beside the baselines; for artifacts also the time one query takes, batch 1.

    name: how the report calls the payload; names: how it calls the models. None takes those of the folders. clusters:
    see `evaluate`.
    """
    from fastlvm import get_num_threads
    from fastlvm.evaluation import evaluate, measure_retrieval

    for at, path in enumerate(paths):
        if any(path.resolve() == other.resolve() for other in paths[:at]):
            raise InputError(f"{path} is named twice: name every run and artifact once")
    called = names or [model_name(path, paths) for path in paths]
    opened = [_open(path, own, payload) for path, own in zip(paths, called, strict=True)]
    rankers = [ranker for ranker, _ in opened]
    report = evaluate(
        rankers, payload, windows, split=split, limit=limit, seed=seed, name=name, clusters=clusters, progress=say
    )
    contexts = payload.take(windows.rows(split)[:LATENCY_CONTEXTS, :-1])
    for ranker, predictor in opened:
        if predictor is not None:
            say(f"timing {ranker.name}")
            search = functools.partial(predictor.index.search, k=50)
            report.latency[ranker.name] = measure_retrieval(
                predictor.predict, search, contexts, threads=get_num_threads()
            )
    return report


def write_report(report: Report, out: Path, say: Callable[[str], None]) -> None:
    """report.json and, with matplotlib, report.png in folder `out`."""
    report.write(out / "report.json")
    say(f"{out / 'report.json'} written")
    try:
        report.plot(out / "report.png")
        say(f"{out / 'report.png'} written")
    except FastlvmError as error:
        say(f"no chart: {error}")


def check_gate(gate: str) -> None:
    """Refuse, before the work, a gate that is not known."""
    from fastlvm.evaluation.gates import GATES

    if gate not in GATES:
        raise InputError(f"gate {gate!r} is not known: choose one of {', '.join(GATES)}")


def judge(report: Report, gate: str, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Say how every model stands to every threshold of a gate; then raise GateError where one is missed."""
    from fastlvm.evaluation.gates import check

    missed = []
    for name in names:
        for row in check(report, gate, model=name):
            say(f"gate {gate}, {name}: {row}, {'passed' if row.passed else 'missed'}")
            if not row.passed:
                missed.append(f"{name}: {row}")
    if missed:
        raise GateError(f"gate {gate} missed: {'; '.join(missed)}")


def model_info(name: str, settings: dict[str, Any]) -> list[tuple[str, str]]:
    """What a model is made of and what one prediction takes, as (name, value) lines."""
    from fastlvm.models import ModelConfig
    from fastlvm.predictor.export import describe
    from fastlvm.predictor.forward import Plan

    config = ModelConfig.preset(name, **settings)
    plan = Plan(describe(config), config.context, config.vector_dim)
    matrices = sum(outputs * inputs for outputs, inputs in plan.matrices().values())
    count = sum(math.prod(shape) for shape in plan.tensors().values())
    kinds = Counter(layer.__class__.__name__ for layer in plan.layers)
    return [
        ("model", name),
        ("takes", f"{config.context} × {config.vector_dim}"),
        ("layers", ", ".join(f"{number} {kind}" for kind, number in kinds.items())),
        ("parameters", f"{count:,}"),
        ("FLOPs a context", f"{plan.operations():,}"),
        ("weights in int8", f"{(4 * (count - matrices) + matrices) / 1e6:,.1f} MB"),
    ]


def machine_info() -> list[tuple[str, str]]:
    """Versions, instruction sets and threads, as (name, value) lines."""
    import platform
    from importlib import metadata

    import fastlvm
    from fastlvm import _C
    from fastlvm.evaluation.latency import machine

    lines = [("fastlvm", fastlvm.__version__), ("python", platform.python_version()), ("machine", machine())]
    lines.append(("instruction set", f"{_C.isa()} (this machine can run {', '.join(_C.isas())})"))
    lines.append(("threads", str(fastlvm.get_num_threads())))
    for package in ("numpy", "faiss-cpu", "torch", "triton", "mlx"):
        try:
            lines.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            lines.append((package, "not installed"))
    u, matrix, state = np.zeros((1, 2, 3), np.float32), np.zeros((1, 4, 3), np.float32), np.zeros((2, 4), np.float32)
    for verdict in fastlvm.explain("ssm_scan", u, u, state, matrix, matrix):
        lines.append((f"ssm_scan {verdict.backend}", f"{'yes' if verdict.ok else 'no'}, {verdict.reason}"))
    lines.append(("charts", "yes" if importlib.util.find_spec("matplotlib") else "no, pip install 'fastlvm[plot]'"))
    return lines
