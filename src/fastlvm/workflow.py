"""What takes several rooms at once: evaluating runs and artifacts side by side, and describing the machine."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlvm.errors import FastlvmError, InputError, IntegrityError
from fastlvm.files import write_json
from fastlvm.opening import K, Opened, model_name, open_model, stages_of

if TYPE_CHECKING:
    from fastlvm.data import Payload, Windows
    from fastlvm.evaluation import Gate, Report
    from fastlvm.evaluation.latency import Latency

LATENCY_CONTEXTS = 500
LATENCY_REPEATS, LATENCY_WARMUP = 300, 30


@dataclass(frozen=True)
class Corpus:
    """A payload with windows of it. name: how a report calls it, None = its folder's. clusters: see `evaluate`."""

    payload: Payload
    windows: Windows
    name: str | None = None
    clusters: np.ndarray | None = None


def open_corpora(payloads: Sequence[Path], windows: Sequence[Path]) -> list[Corpus]:
    """Payload folders with a window file each, in their order."""
    from fastlvm.data import Payload, Windows

    if len(payloads) != len(windows):
        raise InputError(
            f"{len(payloads)} --payload and {len(windows)} --windows are given: name a window file for each payload"
        )
    opened = [Corpus(Payload.open(one), Windows.open(two)) for one, two in zip(payloads, windows, strict=True)]
    for at, corpus in enumerate(opened):
        if any(corpus.payload.id == other.payload.id for other in opened[:at]):
            raise InputError(f"{corpus.payload.path} is given twice: name every payload once")
    return opened


def report_folders(corpora: Sequence[Corpus], out: Path) -> list[Path]:
    """Where the report of each corpus goes: `out`, or where there are several, folders there of the payloads' names."""
    if len(corpora) == 1:
        return [out]
    names = [corpus.payload.path.resolve().name for corpus in corpora]
    return [
        out / (name if names.count(name) == 1 else f"{name}-{corpus.payload.id}")
        for name, corpus in zip(names, corpora, strict=True)
    ]


def evaluate_paths(
    paths: Sequence[Path],
    corpora: Sequence[Corpus],
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
    index: Path | None = None,
    rerank: Sequence[str] = (),
    outcomes: Sequence[Path] | None = None,
    say: Callable[[str], None] = lambda _: None,
    step: Callable[[float], None] = lambda _: None,
) -> list[Report]:
    """A report a corpus, of runs and artifacts beside the baselines; with the time a query takes, batch 1, at home.

    names: how the reports call the models, None = as their folders. index: a folder, searched instead of the artifacts'
    own and for runs. rerank: rerankers such as "mmr:0.7", of what artifacts' own indexes list. outcomes: a folder a
    corpus, that keeps what came out. say, step: as `evaluate` takes them. Raises InputError where a model is of none of
    the payloads, or a payload, its windows and a model do not go together; nothing is written then.
    """
    from fastlvm.evaluation import evaluate
    from fastlvm.evaluation.pipeline import check_windows
    from fastlvm.retrieval import Index

    for at, path in enumerate(paths):
        if any(path.resolve() == other.resolve() for other in paths[:at]):
            raise InputError(f"{path} is named twice: name every run and artifact once")
    called = names or [model_name(path, paths) for path in paths]
    searched = None if index is None else Index.open(index)
    opened = [open_model(path, own, index=searched, rerank=rerank) for path, own in zip(paths, called, strict=True)]
    for model in opened:
        _check_home(model, corpora)
    rankers = [[model.over(corpus.payload) for model in opened] for corpus in corpora]
    for corpus in corpora[1:]:  # before anything is written; the first is about to be checked anyway
        check_windows(corpus.payload, corpus.windows, split)
    reports = []
    for at, corpus in enumerate(corpora):
        report = evaluate(
            rankers[at],
            corpus.payload,
            corpus.windows,
            split=split,
            limit=limit,
            seed=seed,
            name=corpus.name,
            clusters=corpus.clusters,
            outcomes=None if outcomes is None else outcomes[at],
            progress=say,
            step=step,
        )
        contexts = corpus.payload.take(corpus.windows.rows(split)[:LATENCY_CONTEXTS, :-1])
        at_home = [model for model in opened if model.payload_id == corpus.payload.id]
        report.latency.update(_latencies(at_home, contexts, rerank, say))
        reports.append(report)
    return reports


def _check_home(model: Opened, corpora: Sequence[Corpus]) -> None:
    for corpus in corpora:
        if model.context != corpus.windows.context:
            raise InputError(
                f"{model.path} takes contexts of {model.context} chunks, and the windows of {corpus.payload.path} have "
                f"{corpus.windows.context}: build windows with --context {model.context}"
            )
    if all(model.payload_id != corpus.payload.id for corpus in corpora):
        given = " and ".join(f"{corpus.payload.path} is {corpus.payload.id}" for corpus in corpora)
        raise IntegrityError(f"{model.path} belongs to payload {model.payload_id}, and {given}: name its own")


def _latencies(
    models: Sequence[Opened], contexts: np.ndarray, rerank: Sequence[str], say: Callable[[str], None]
) -> dict[str, Latency]:
    """By name, of the models that have something to search in."""
    found = {}
    for model in models:
        if model.index is not None:
            say(f"timing {model.ranker.name}")
            found[model.ranker.name] = _latency(model, contexts, rerank)
    return found


def _latency(model: Opened, contexts: np.ndarray, rerank: Sequence[str]) -> Latency:
    from fastlvm import get_num_threads
    from fastlvm.evaluation.latency import measure_predictor, measure_retrieval

    assert model.index is not None
    often = {"warmup": LATENCY_WARMUP, "repeats": LATENCY_REPEATS, "threads": get_num_threads()}
    k = min(K, len(model.index))
    if model.predictor is None or model.predictor.index is not model.index:
        search = functools.partial(model.index.search, k=k)
        return measure_retrieval(lambda context: model.ranker.predict(context[None]), search, contexts, **often)
    return measure_predictor(model.predictor, contexts, k, stages=stages_of(rerank), **often)


def write_report(report: Report, out: Path, say: Callable[[str], None]) -> None:
    """report.json, report.md, report.html and, with matplotlib, report.png in folder `out`."""
    from fastlvm.evaluation.markdown import write_markdown
    from fastlvm.evaluation.page import write_page

    report.write(out / "report.json")
    write_markdown(report, out / "report.md")
    write_page(report, out / "report.html")
    written = [f"report.{kind}" for kind in ("json", "md", "html")]
    try:
        report.plot(out / "report.png")
        written.append("report.png")
    except FastlvmError as error:
        say(f"no charts: {error}")
    say(f"{', '.join(written)} written to {out}")


def refuse_faults(reports: Sequence[Report]) -> None:
    """Raise InputError with what reports found to be wrong with their models, if anything."""
    faults = [finding["sentence"] for report in reports for finding in report.findings if finding["level"] == "fault"]
    if faults:
        raise InputError("; ".join(dict.fromkeys(faults)))


def load_gates(gates: Sequence[str], split: str) -> list[Gate]:
    """The gates of these names and files, each once; refuses, before the work, those that judge another split."""
    from fastlvm.data.split import ALIASES
    from fastlvm.evaluation import load_gate
    from fastlvm.evaluation.gates import check_split

    found = list(dict.fromkeys(load_gate(gate) for gate in gates))
    for gate in found:
        check_split(gate, ALIASES.get(split, split))
    return found


def judge(
    reports: Sequence[Report],
    gates: Sequence[Gate],
    names: Sequence[str],
    out: Path,
    say: Callable[[str], None],
    out_of_domain: Report | None = None,
) -> None:
    """Say how every model stands to every limit, write it to gates.json in `out`, raise GateError where one is missed.

    A model is judged by the report of its own payload. out_of_domain: a report of models of the same names on another
    corpus; None takes the first of `reports` that a model is out of its domain in.
    """
    from fastlvm.evaluation import check, enforce

    rows = []
    for gate in gates:
        for name in names:
            home = next(report for report in reports if report.row(name).domain == "in")
            away = out_of_domain or next((report for report in reports if report.row(name).domain == "out"), None)
            rows += check(home, gate, model=name, out_of_domain=away)
    for row in rows:
        say(f"gate {row.gate}, {row.model}: {row}, {'passed' if row.passed else 'missed'}")
    write_json(out / "gates.json", [row.to_dict() for row in rows])
    enforce(rows)


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
