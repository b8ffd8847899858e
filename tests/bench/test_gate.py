"""The latency gate's bench: every gate is judged, and a small run is kept and printed."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastlvm
from fastlvm import _C
from fastlvm.evaluation.gate_file import parse_gate

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import bench_predictor
import forward_cases
import forward_rivals
import gate_cases
import gate_rivals
import gate_setup
import make_payload
import test_latency_gate as bench
from gate_results import OURS, GateResults
from gate_rivals import SEEDS, SQ8, USEARCH
from gate_table import markdown
from paired import Plan

BENCH = Path(bench.__file__).parent


@pytest.fixture(autouse=True, scope="module")
def restore():
    from fastlvm.retrieval.blas import faiss

    isa, threads, torch_threads, omp = (
        _C.isa(),
        _C.get_num_threads(),
        torch.get_num_threads(),
        faiss.omp_get_max_threads(),
    )
    yield
    _C.set_isa(isa)
    _C.set_num_threads(threads)
    torch.set_num_threads(torch_threads)
    faiss.omp_set_num_threads(omp)


def gates_of(tables):
    """Latency gates by name, of tables such as {"g": {"threads": 1, "total_p95_ms": 2.0, "recall@50": 0.9}}."""
    return {
        name: parse_gate(
            {
                "about": "a test's",
                **({"threads": table["threads"]} if "threads" in table else {}),
                "limit": [_limit(key, bound) for key, bound in table.items() if key != "threads"],
            },
            name,
            name,
        )
        for name, table in tables.items()
    }


def _limit(key, bound):
    if key == "recall@50":
        return {"search": key, "at_least": bound}
    stage, percentile, _ = key.split("_")
    return {"latency": stage, "percentile": percentile, "at_most": bound}


def test_the_bench_judges_every_gate_of_the_package_that_limits_time_or_recall():
    assert list(bench.GATES) == [
        "deploy",
        "epoch-4",
        "final",
        "ours-latency",
        "ours-latency-1-thread",
        "stretch",
        "target",
    ]


# --- a run


class Benchmark:
    """pytest-benchmark's fixture as far as the gate bench uses it; every timed call takes 2 ms, whatever it does."""

    def __init__(self):
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, call, setup=lambda: None, rounds=1):
        for _ in range(rounds):
            setup()
            result = call()
            self.stats.stats.data.append(2e-3)
        return result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The bench over 1,500 made rows and a small model, with few rivals; and its record."""
    folder = tmp_path_factory.mktemp("gate")
    changes = {
        (make_payload, "BUILD"): folder,
        (make_payload, "ROWS"): 1500,
        (gate_cases, "TUNING"): 48,
        (gate_cases, "CONTEXTS"): 64,
        (gate_setup, "RECALLED"): 40,
        (bench, "RECALLED"): 40,
        (bench, "CHECKED"): 8,
        (bench, "CALLS"): 4,
        (bench, "RERANKED"): 4,
        (bench, "RIVALS"): (SEEDS, SQ8, USEARCH),
        (forward_cases, "model"): lambda: bench_predictor.model(n_layers=1, d_state=4),
        (forward_rivals, "RIVALS"): forward_rivals.RIVALS[:1],
        (gate_rivals.Builder, "_usearch"): absent,
    }
    record = GateResults(Plan(rounds=1, patience=0), [1, 2])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FASTLVM_DATA", raising=False)
        for (where, name), value in changes.items():
            patch.setattr(where, name, value)
        made = gate_setup.Setup(1500, 2)
        contest = bench.Contest(made, SimpleNamespace(gate_kept=False, gate_hnsw=False), folder, record)
        given = {"contest": contest, "threads": [1, 2], "plan": record.plan, "gate_results": record}
        for n in (2, 1):
            for stage in gate_cases.STAGES:
                bench.test_calls(Benchmark(), stage=stage, count=n, **given)
            for name in bench.RERANKERS:
                bench.test_reranker(Benchmark(), name=name, count=n, **given)
            for clients in gate_cases.CLIENTS:
                bench.test_load(Benchmark(), clients=clients, count=n, **given)
        bench.test_rounds(Benchmark(), **given)
        bench.test_batch(Benchmark(), **given)
        yield SimpleNamespace(record=record, contest=contest, made=made, folder=folder, given=given)


def absent(builder):
    raise ModuleNotFoundError("No module named 'usearch'")


def judged(run, monkeypatch, **tables):
    """The record after the gates of these tables were judged, and what the tests of missed ones say."""
    monkeypatch.setattr(bench, "GATES", gates_of(tables))
    record, said = copy.deepcopy(run.record), []
    given = {name: run.given[name] for name in ("contest", "threads")}
    for name in tables:
        try:
            bench.test_gate(Benchmark(), name=name, gate_results=record, **given)
        except AssertionError as error:
            said.append(str(error).partition("\n")[0])
    return record, said


def test_contexts_to_choose_on_and_to_measure_with_are_of_different_articles(run):
    tuning, measuring = gate_cases.windows(run.made.payload)
    articles = run.made.payload.keys[:, 0]
    assert len(tuning) and len(measuring) and not set(articles[tuning].ravel()) & set(articles[measuring].ravel())
    for rows in (tuning, measuring):
        keys = run.made.payload.keys[rows]
        assert (np.diff(keys[..., 0]) == 0).all() and (np.diff(keys[..., 1]) == 1).all()


def test_the_recall_is_that_of_exact_search_for_what_is_predicted(run):
    made = run.made
    queries, rows = made.predicted[:40], np.asarray(made.payload.vectors, np.float32)
    exact = np.argsort(-(queries @ rows.T), axis=1)[:, :50]
    found = made.predictor.search(made.contexts[:40], 50).ids
    share = np.mean([len(set(a) & set(b)) / 50 for a, b in zip(exact, found, strict=True)])
    assert run.record.indexes[OURS]["recall"] == pytest.approx(share, abs=2e-3) and share > 0.9
    assert gate_cases.recall(np.array([[1, 2, -1]]), np.array([[2, 7, 1, -1]])) == pytest.approx(2 / 4)


def test_predictions_lie_where_real_ones_do_and_those_of_the_drawn_head_do_not(run):
    assert run.made.realism >= gate_cases.REAL
    drawn = run.made.reals["predictions with the head as drawn"]
    assert drawn["first"] < 0.5 * run.made.reals["window means"]["first"]


def test_rivals_that_nobody_built_are_left_out_where_those_there_are_suffice(run, monkeypatch, tmp_path):
    monkeypatch.setattr(gate_rivals.Builder, "engine", absent)
    monkeypatch.setattr(run.made, "rivals_folder", tmp_path)
    options = SimpleNamespace(gate_kept=True, gate_hnsw=True)
    for name in (SEEDS, SQ8):
        assert "--gate-kept" in run.contest._load(name, options)
    monkeypatch.undo()
    assert run.contest._load(SEEDS, options) == ""


def test_a_second_setup_builds_nothing(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("built again")

    monkeypatch.setattr(fastlvm.Index, "build", refuse)
    monkeypatch.setattr(gate_setup, "nearest", refuse)
    monkeypatch.setattr(gate_rivals.Builder, "engine", refuse)
    again = gate_setup.Setup(1500, 2)
    assert again.folder == run.made.folder and np.array_equal(again.truth, run.made.truth)
    engine, _ = gate_rivals.load(SQ8, again.rivals_folder, lambda: again.builder)
    assert engine.setting == run.contest.engines[SQ8].setting


def test_a_run_has_every_row_and_says_why_a_rival_has_none(run, monkeypatch):
    record, said = judged(run, monkeypatch, good={"total_p95_ms": 2.0, "recall@50": 0.5})
    assert not said and record.complete()
    assert {(row["name"], row["threads"]) for row in record.paired if row["stage"] == "search"} == {
        (name, n) for name in (OURS, SEEDS, SQ8) for n in (1, 2)
    }
    whole = {row["name"] for row in record.paired if row["stage"] == "end_to_end"}
    assert whole == {OURS, f"PyTorch fp32 + {SEEDS}"}
    assert record.reasons == {USEARCH: "cannot be imported: No module named 'usearch'"}
    assert [row["calls"] for row in record.load_rows[:4]] == [4, 4, 4, 8]
    text = markdown(record.data())
    assert "| good | 2       | total_p95_ms | ≤ 2    | 2.000    | met |" in text
    assert "No module named 'usearch'" in text and "1,500 × 768" in text
    assert [(row["name"], row["threads"], row["uses_keys"]) for row in record.rerankers] == [
        (name, n, stage.uses_keys) for n in (2, 1) for name, stage in bench.RERANKERS.items()
    ]
    row = record.rerankers[0]
    assert row["stage"]["p50_ms"] + row["inputs"]["p50_ms"] < row["end_to_end"]["p50_ms"]
    assert "| sequence-bias " in text
    partial = copy.deepcopy(record)
    partial.load_rows.pop()
    assert not partial.complete()
    monkeypatch.setattr(make_payload, "ROWS", 584_545)
    assert not record.complete()


def test_a_gate_that_is_missed_or_not_measured_fails_and_is_printed(run, monkeypatch):
    tables = {"slow": {"threads": 1, "model_p50_ms": 1.9, "model_p95_ms": 2.1}, "good": {"recall@50": 0.5}}
    record, said = judged(run, monkeypatch, **tables)
    assert said == ["gate slow missed on 1 threads: model_p50_ms is 2.000, and ≤ 1.9 is wanted"]
    assert [row["verdict"] for row in record.verdicts] == ["missed", "met", "met"]
    assert "| missed |" in markdown(record.data())
    run = SimpleNamespace(record=GateResults(Plan(), [1, 2]), given=run.given)
    _, said = judged(run, monkeypatch, early={"search_p95_ms": 1})
    assert said == ["gate early missed on 2 threads: search_p95_ms is not measured, and ≤ 1 is wanted"]


def test_what_a_client_meets_is_raised_where_it_is_seen():
    def search(context, k):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        bench.under_load(SimpleNamespace(search=search), np.zeros((4, 5, 2)), 3, 2)


def test_a_whole_run_is_kept_under_its_own_name(run, monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("bench_conftest", BENCH / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    record, _ = judged(run, monkeypatch, slow={"model_p50_ms": 1.9})  # a missed gate is kept as well
    lines = []
    conftest._keep(SimpleNamespace(section=lines.append, write_line=lines.append), "gate", record, markdown, tmp_path)
    (kept,) = tmp_path.glob("gate-*-2-threads.json")
    data = json.loads(kept.read_text(encoding="utf-8"))
    assert markdown(data) == kept.with_suffix(".md").read_text(encoding="utf-8") and "| missed |" in markdown(data)
