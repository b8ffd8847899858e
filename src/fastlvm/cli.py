"""The command line: parse, call one function, print.

Exit codes: 0 ok, 1 a gate failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastlvm.console import (
    GATES,
    RankingBar,
    TrainingBar,
    command,
    interrupted,
    keep_apart,
    note,
    parse_rerankers,
    parse_settings,
    print_example,
    print_found,
    print_latency,
    read_array,
    show,
    training_verdict,
)
from fastlvm.diagnose_cli import diagnose
from fastlvm.errors import InputError
from fastlvm.files import check_folder, check_new_folder, write_json
from fastlvm.index_cli import index_app
from fastlvm.train_cli import sweep, train
from fastlvm.windows_cli import windows_app

RERANK = (
    "mmr:RELEVANCE, directional-bonus:WEIGHT, sequence-bias:WEIGHT:DECAY or shard-assist:WEIGHT; the last two use keys"
)

app = typer.Typer(
    name="fastlvm",
    help="Predict the next chunk of a document and retrieve it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
payload_app = typer.Typer(help="Tables of chunk vectors with keys, texts and provenance.", no_args_is_help=True)
app.add_typer(payload_app, name="payload")
app.add_typer(windows_app, name="windows")
app.add_typer(index_app, name="index")
bench_app = typer.Typer(help="Time what is installed, on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


def _print_notices(notices: list[str]) -> None:
    for notice in notices:
        typer.echo(f"note: {notice}")


def _print_payload(payload: Any) -> None:
    provenance = payload.provenance
    typer.echo(f"payload   {payload.path}")
    typer.echo(f"id        {payload.id}")
    typer.echo(f"rows      {len(payload)} x {payload.dim} {payload.vectors.dtype}")
    typer.echo(f"encoder   {provenance.encoder}")
    typer.echo(f"source    {provenance.source or '-'}")
    typer.echo(f"made by   {provenance.tool}, {provenance.created_at}")
    _print_notices(payload.notices)


@command(payload_app, "build", "fastlvm payload build --vectors v.npy --keys k.npy --encoder gtr-t5-base --out payload")
def payload_build(
    vectors: Annotated[Path, typer.Option(help="float .npy of rows x dim")],
    keys: Annotated[Path, typer.Option(help="integer .npy of rows x 2: article, chunk")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    encoder: Annotated[str, typer.Option(help="name of the encoder that made the vectors")],
    texts: Annotated[Path | None, typer.Option(help=".parquet, .jsonl or .jsonl.gz with a text column")] = None,
    source: Annotated[str, typer.Option(help="where the texts come from")] = "",
) -> None:
    """Check, normalise and store vectors with their keys and provenance."""
    from fastlvm import Payload

    check_new_folder(out)
    payload = Payload.build(
        out, read_array(vectors, "--vectors"), read_array(keys, "--keys"), texts=texts, encoder=encoder, source=source
    )
    _print_payload(payload)


@command(payload_app, "import", "fastlvm payload import wikipedia_584k_payload.npy --out payload")
def payload_import(
    old: Annotated[Path, typer.Argument(help="the predecessor's payload .npy or ordered .npz")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    encoder: Annotated[str, typer.Option(help="name of the encoder that made the vectors")] = "unknown",
) -> None:
    """Import a predecessor's payload; pickles are read by an unpickler that admits arrays and nothing else."""
    from fastlvm.data import import_payload

    check_new_folder(out)
    _print_payload(import_payload(old, out, encoder=encoder))


@command(payload_app, "info", "fastlvm payload info payload")
def payload_info(folder: Annotated[Path, typer.Argument(help="payload folder")]) -> None:
    """Print what a payload holds and where it comes from."""
    from fastlvm import Payload

    _print_payload(Payload.open(folder))


@command(payload_app, "verify", "fastlvm payload verify payload")
def payload_verify(folder: Annotated[Path, typer.Argument(help="payload folder")]) -> None:
    """Hash every file and check every row."""
    from fastlvm import Payload

    payload = Payload.open(folder)
    payload.verify()
    typer.echo(f"ok: {len(payload)} rows, hashes, norms and key order hold (id {payload.id})")


command(app, "train", "fastlvm train --model mamba-s --payload payload --windows windows.npz --out run")(train)
command(app, "sweep", "fastlvm sweep --model gru --model lstm --seeds 0,1 --payload P --windows W --out runs")(sweep)
command(app, "diagnose", "fastlvm diagnose artifact --payload payload --windows windows.npz --index index")(diagnose)


@command(app, "eval", "fastlvm eval artifact --payload payload --windows windows.npz --split test --out report")
def evaluate(
    models: Annotated[list[Path], typer.Argument(help="runs or artifacts")],
    payload: Annotated[list[Path], typer.Option(help="payload folder; again for another corpus")],
    windows: Annotated[list[Path], typer.Option(help="windows .npz, one for each --payload, in their order")],
    out: Annotated[Path, typer.Option(help="folder for report.json, .md, .html and .png")],
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    index: Annotated[Path | None, typer.Option(help="index folder, searched instead of the artifacts' own")] = None,
    rerank: Annotated[list[str] | None, typer.Option(help=RERANK)] = None,
    limit: Annotated[int | None, typer.Option(help="most windows to rank, a seeded sample")] = None,
    seed: Annotated[int, typer.Option(help="seed of the sample and of the intervals")] = 0,
    gate: Annotated[list[str] | None, typer.Option("--gates", help=GATES)] = None,
    out_of_domain: Annotated[
        Path | None, typer.Option(help="report.json of the same models on another corpus, for gates that want it")
    ] = None,
) -> None:
    """Rank models and baselines on the same windows over the whole payload; exit 1 when a gate fails.

    What came out of a model is kept in the folder: the same command goes on where an interrupted one stopped.
    """
    from fastlvm import workflow
    from fastlvm.evaluation import Report
    from fastlvm.evaluation.compare import RANKS

    check_folder(out)
    gates = workflow.load_gates(gate or [], split)
    elsewhere = None if out_of_domain is None else Report.open(out_of_domain)
    corpora = workflow.open_corpora(payload, windows)
    folders = workflow.report_folders(corpora, out)
    for folder in folders:
        check_folder(folder)
    try:
        with RankingBar() as bar:
            reports = workflow.evaluate_paths(
                models,
                corpora,
                split=split,
                limit=limit,
                seed=seed,
                index=index,
                rerank=rerank or (),
                outcomes=[folder / RANKS for folder in folders],
                say=bar.say,
                step=bar.step,
            )
    except KeyboardInterrupt:
        raise interrupted(out, "the same command") from None
    for report, folder in zip(reports, folders, strict=True):
        show(report.table())
        workflow.write_report(report, folder, say=note)
    workflow.refuse_faults(reports)
    if gates:
        names = [workflow.model_name(model, models) for model in models]
        workflow.judge(reports, gates, names, out, say=typer.echo, out_of_domain=elsewhere)


@command(app, "compare", "fastlvm compare reports/mlp reports/mamba-s --out leaderboard.json")
def compare(
    reports: Annotated[list[Path], typer.Argument(help="report.json files, or folders with one")],
    out: Annotated[Path | None, typer.Option(help=".json to write")] = None,
) -> None:
    """Rankers of several reports on one table; reports of other payloads, splits or settings are refused."""
    from fastlvm.evaluation.compare import compare as places_of
    from fastlvm.evaluation.compare import open_report
    from fastlvm.evaluation.table import leaderboard

    found = [open_report(path) for path in reports]
    if out is not None:
        for file, _ in found:
            keep_apart(file, out)
    places = places_of(found)
    show(leaderboard(found[0][1], places))
    if out is not None:
        write_json(out, {"format": "fastlvm-leaderboard", "version": 1, "places": [one.to_dict() for one in places]})


@command(app, "export", "fastlvm export run --index index --precision int8 --out artifact")
def export(
    run: Annotated[Path, typer.Argument(help="run folder")],
    out: Annotated[Path, typer.Option(help="artifact folder to write")],
    index: Annotated[Path | None, typer.Option(help="index folder; built from --payload when absent")] = None,
    payload: Annotated[Path | None, typer.Option(help="payload folder")] = None,
    windows: Annotated[Path | None, typer.Option(help="windows .npz, checked against --payload")] = None,
    precision: Annotated[str, typer.Option(help="of the packed matrices: fp32, bf16 or int8")] = "fp32",
) -> None:
    """Write what a predictor needs, weights, space and index, and check it against the trained model."""
    import fastlvm

    check_new_folder(out)
    fastlvm.export(
        run,
        out,
        precision,
        index,
        payload=fastlvm.Payload.open(payload) if payload else None,
        windows=fastlvm.Windows.open(windows) if windows else None,
    )
    typer.echo(f"artifact written to {out}")


@command(bench_app, "latency", "fastlvm bench latency artifact --threads 2 --gate ours-latency --profile")
def bench_latency(
    artifact: Annotated[Path, typer.Argument(help="artifact folder")],
    context: Annotated[Path | None, typer.Option(help="float .npy of n x 5 x dim; golden windows when absent")] = None,
    k: Annotated[int, typer.Option("-k", help="chunks to search for")] = 50,
    threads: Annotated[int | None, typer.Option(help="threads of kernels and search")] = None,
    repeats: Annotated[int, typer.Option(help="timed calls of each stage")] = 2000,
    rerank: Annotated[list[str] | None, typer.Option(help=RERANK)] = None,
    profile: Annotated[bool, typer.Option("--profile", help="what the model spends its time on, by layer")] = False,
    gate: Annotated[list[str] | None, typer.Option(help=GATES)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Time an artifact one context at a time: model, search, and both as a user calls them; exit 1 if a gate fails."""
    from fastlvm import Predictor
    from fastlvm.evaluation import enforce, latency_gate
    from fastlvm.evaluation.latency import measure_predictor

    gates = latency_gate.load_gates(gate or [])
    threads = latency_gate.threads_of(gates, threads)
    if gates and k != latency_gate.K:
        raise InputError(f"-k is {k}, and a gate is of {latency_gate.K} chunks: leave out -k or --gate")
    stages = parse_rerankers(rerank or [])
    predictor = Predictor.load(artifact, threads=threads)
    contexts = predictor.golden_context if context is None else read_array(context, "--context")
    latency = measure_predictor(
        predictor, contexts, min(k, max(1, len(predictor.index))), stages=stages, repeats=repeats, threads=threads
    )
    parts = predictor.profile(contexts, repeats=min(repeats, 500)) if profile else None
    verdicts = latency_gate.judge(gates, latency, predictor.index.recall_at_50)
    print_latency(latency, parts, predictor.nbytes, verdicts, as_json=as_json)
    enforce(verdicts)


@command(app, "predict", "fastlvm predict artifact --context context.npy -k 10 --rerank mmr:0.7 --json")
def predict(
    artifact: Annotated[Path, typer.Argument(help="artifact folder")],
    context: Annotated[Path, typer.Option(help="float .npy of 5 x dim or n x 5 x dim, oldest first")],
    k: Annotated[int, typer.Option("-k", help="chunks to list")] = 50,
    keep_context: Annotated[bool, typer.Option("--keep-context", help="list the context's own chunks too")] = False,
    rerank: Annotated[list[str] | None, typer.Option(help=RERANK)] = None,
    candidates: Annotated[int | None, typer.Option(help="chunks that rerankers see; 50, or -k where more")] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="integer .npy of n x 2: article, chunk of each context's last; found when absent"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a context")] = False,
    threads: Annotated[int | None, typer.Option(help="threads of kernels and search")] = None,
) -> None:
    """List the chunks nearest to the predicted next one."""
    from fastlvm import Predictor

    vectors = read_array(context, "--context")
    stages = parse_rerankers(rerank or [])
    given = {"--candidates": candidates, "--keys": keys}
    idle = [name for name, value in given.items() if value is not None]
    if idle and not stages:
        raise InputError(f"{idle[0]} is for rerankers, and there is none: add --rerank")
    key = read_array(keys, "--keys") if keys else None
    predictor = Predictor.load(artifact, threads=threads)
    exclude = None if keep_context else "context"
    single, most = vectors.ndim == 2, max(1, len(predictor.index))
    k = min(k, most)
    if not stages:
        print_found(predictor.search(vectors, k, exclude), single=single, as_json=as_json)
        return
    if key is not None and single and key.shape == (1, 2):
        key = key[0]
    seen = max(k, 50) if candidates is None else min(candidates, most)
    ranked = predictor.rerank(vectors, stages, k, candidates=seen, exclude=exclude, key=key)
    print_found(ranked.result, ranked, single=single, as_json=as_json)


@command(app, "info", "fastlvm info --model mamba-h")
def info(
    model: Annotated[str | None, typer.Option(help="name of a model: what it is made of, instead")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="a setting of it, such as d_model=256")] = None,
) -> None:
    """Print versions, instruction sets, threads and which backends can run here; or parameters and FLOPs of a model."""
    from fastlvm import workflow

    settings = parse_settings(setting or [], taken={"name"})
    if model is None and settings:
        raise InputError(f"--set {next(iter(settings))} is a model's, and none is named: add --model")
    for name, value in workflow.machine_info() if model is None else workflow.model_info(model, settings):
        typer.echo(f"{name:<20}{value}")


@command(app, "demo", "fastlvm demo --out demo")
def demo(out: Annotated[Path, typer.Option(help="folder for everything the demo makes")] = Path("demo")) -> None:
    """Train on the sample payload, retrieve the next chunks of articles never seen, and compare with the baselines."""
    from fastlvm import demo as steps

    try:
        with TrainingBar() as bar:
            done = steps.run(out, progress=bar, say=note)
    except KeyboardInterrupt:
        raise interrupted(out, "the same command") from None
    for summary in done.summaries:
        typer.echo(f"{summary.path.name}: {training_verdict(summary)}")
    show(done.report.table())
    print_example(steps.example(done))
    for path, what in steps.places(out):
        typer.echo(f"{path!s:<28}{what}")


def main() -> None:
    """Entry point of `fastlvm` and `python -m fastlvm`."""
    for stream in (sys.stdout, sys.stderr):  # a terminal's encoding may lack what a title or a file name holds
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
