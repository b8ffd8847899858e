"""From arrays to a report by the commands alone."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from cli.conftest import TINY, fastlvm, listing, ok, refused
from fastlvm import Index, Payload, Predictor, Windows
from fastlvm.models import names
from fastlvm.retrieval.rerank import Mmr


def test_payload(made):
    for printed in (made.built, ok("payload", "info", made.payload)):
        assert "112 x 32 float32" in printed and "walks" in printed and "seed 0" in printed
    assert Payload.open(made.payload).text(15) == "chunk 1 of 1"
    assert "ok: 112 rows" in ok("payload", "verify", made.payload)


def test_windows(made):
    assert [line.split()[:2] for line in made.cut.splitlines()[1:4]] == [
        ["train", "36"],
        ["validation", "18"],
        ["test", "18"],
    ]
    for printed in (made.cut, ok("windows", "verify", made.windows, "--payload", made.payload)):
        assert "context cosine 1.0000" in printed and "random pairs" in printed
        assert "articles in two splits 0" in printed


def test_windows_round_trip_through_the_predecessor(made, tmp_path):
    old, again = tmp_path / "old.npz", tmp_path / "again.npz"
    printed = ok("windows", "export", made.windows, "--payload", made.payload, "--split", "test", "--out", old)
    assert printed == f"18 windows written to {old}\n"
    ok("windows", "import", old, "--payload", made.payload, "--out", again, "--split", "0,0,1")
    np.testing.assert_array_equal(Windows.open(again).rows("test"), Windows.open(made.windows).rows("test"))


def test_payload_import(made, tmp_path):
    payload = Payload.open(made.payload)
    old = tmp_path / "old.npz"
    np.savez(
        old,
        vectors=payload.vectors,
        article_indices=payload.keys[:, 0],
        chunk_indices=payload.keys[:, 1],
        concept_texts=np.array([payload.text(row) for row in range(len(payload))]),
    )
    ok("payload", "import", old, "--encoder", "walks", "--out", tmp_path / "new")
    assert Payload.open(tmp_path / "new").id == payload.id


def test_index_with_and_without_a_space(made, tmp_path):
    assert Index.open(made.index).space.id != Index.open(made.index).payload_id
    assert "flat index of 112 rows (exact)" in made.indexed
    plain = tmp_path / "plain"
    printed = ok("index", "build", made.payload, "--kind", "ivf_flat", "--nlist", 4, "--nprobe", 2, "--out", plain)
    assert "ivf_flat index of 112 rows (nlist 4, nprobe 2)" in printed
    assert "recall@50" in printed and "0.9" not in made.indexed  # flat without measuring
    vector = Payload.open(made.payload).take([3])
    assert Index.open(plain).search(vector, 1).ids[0, 0] == 3
    by_file = ok("index", "build", made.payload, "--space", made.run / "space.safetensors", "--out", tmp_path / "same")
    assert "flat" in by_file and Index.open(tmp_path / "same").id == Index.open(made.index).id


@pytest.mark.parametrize("kind, option", [("ivf_sq8", "nprobe"), ("hnsw", "ef_search")])
def test_index_says_what_was_measured(made, tmp_path, kind, option):
    printed = ok("index", "build", made.payload, "--kind", kind, "--recall", 0.9, "--out", tmp_path / "index")
    index = Index.open(tmp_path / "index")
    assert index.recall_at_50 >= 0.9 and f"{option} {getattr(index, option)}) written to" in printed
    for point in index.curve:
        assert any(kind in line and f"{point.recall_at_50:.4f}" in line for line in printed.splitlines())
    assert [f"{index.recall_at_50:.4f}" in line for line in printed.splitlines() if "taken" in line] == [True]


def test_train_prints_what_was_kept_and_resumes(made, tmp_path):
    assert "validation R@5" in made.trained and str(made.run) in made.trained
    train = ["train", "--payload", made.payload, "--windows", made.windows, "--out", tmp_path / "run", "--epochs", 1]
    first = fastlvm(*train, *TINY)
    assert first.code == 0 and [line.split()[1] for line in first.err.splitlines()] == ["0", "1"]
    for name in ("config.json", "best.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (made.run / name).read_bytes(), name

    before = listing(tmp_path)
    assert "--resume" in refused(*train, *TINY)
    assert listing(tmp_path) == before
    again = fastlvm(*train, *TINY, "--resume")
    assert again.code == 0 and not again.err  # nothing was left to do
    assert "lr" in refused(*train, *TINY, "--resume", "--lr", 0.5)


def test_a_gate_missed_in_training_exits_1_and_the_run_goes_on_without_it(made, tmp_path):
    for name, bound in (("easy", 0.0), ("hard", 1.0)):
        (tmp_path / f"{name}.toml").write_text(f'about = "x"\n[[limit]]\nmetric = "MRR"\nat_least = {bound}\n')
    args = [
        "train",
        "--payload",
        made.payload,
        "--windows",
        made.windows,
        "--out",
        tmp_path / "run",
        "--epochs",
        2,
        *TINY,
    ]
    gates = ["--gate", f"{tmp_path / 'easy.toml'}@1", "--gate", f"{tmp_path / 'hard.toml'}@1"]
    for resume in ([], ["--resume"]):
        missed = fastlvm(*args, *gates, *resume)
        assert missed.code == 1 and str(tmp_path / "run") in missed.out
        assert missed.err.splitlines()[-1].startswith("fastlvm: after epoch 1, gate hard missed: MRR is ")
    first = fastlvm(*[arg if arg != tmp_path / "run" else tmp_path / "other" for arg in args], *gates[:2])
    assert first.code == 0 and "gate easy: MRR " in first.err and "wanted ≥ 0: met" in first.err
    assert fastlvm(*args, *gates[:2], "--resume").code == 0
    for file in ("best.safetensors",):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_train_ar(made, tmp_path):
    ok(
        *("train", "--model", "mamba-s", "--objective", "ar", "--space", "none", "--seed", 3, "--lr", 0.01),
        *("--payload", made.payload, "--windows", made.windows, "--out", tmp_path / "ar", *TINY, "--set", "epochs=1"),
    )
    config = json.loads((tmp_path / "ar" / "config.json").read_text())
    wanted = {"objective": "ar", "space": "none", "seed": 3, "lr": 0.01, "epochs": 1, "batch_size": 16}
    assert {key: config["training"][key] for key in wanted} == wanted


def test_export_builds_the_index_itself(made, tmp_path):
    ok("export", made.run, "--payload", made.payload, "--windows", made.windows, "--out", tmp_path / "artifact")
    assert Predictor.load(tmp_path / "artifact").index.id == Index.open(made.index).id


def test_predict_one_context(made):
    lines = ok("predict", made.artifact, "--context", made.context, "-k", 7).splitlines()
    assert lines[0].split() == ["row", "article", "chunk", "score"] and len(lines) == 8
    rows = [int(line.split()[0]) for line in lines[1:]]
    expected = Predictor.load(made.artifact).search(np.load(made.context), 7, exclude="context")
    assert rows == expected.ids.tolist() and not set(rows) & set(range(5))
    [row, article, chunk, score] = lines[1].split()
    assert (int(article), int(chunk)) == divmod(int(row), 14)
    assert float(score) == pytest.approx(expected.scores[0], abs=1e-4)


def test_predict_keeps_the_context_when_asked(made):
    shown = ok("predict", made.artifact, "--context", made.context, "-k", 3, "--keep-context", "--json")
    assert json.loads(shown)["results"][0]["row"] in range(5)


def test_predict_a_batch(made):
    args = ["predict", made.artifact, "--context", made.batch, "-k", 4, "--threads", 1]
    shown = ok(*args, "--json")
    found = [json.loads(line) for line in shown.splitlines()]
    assert [one["context"] for one in found] == [0, 1] and [len(one["results"]) for one in found] == [4, 4]
    assert found[0]["results"][0].keys() == {"row", "article", "chunk", "score"}
    assert sum(line.startswith("context ") for line in ok(*args).splitlines()) == 2


def test_predict_reranks_and_says_what_it_cost_and_whether_it_used_keys(made, tmp_path):
    given = ("predict", made.artifact, "--context", made.context, "-k", 6, "--rerank", "mmr:0.5")
    predictor, context = Predictor.load(made.artifact), np.load(made.context)
    lines = ok(*given).splitlines()
    wanted = predictor.rerank(context, [Mmr(0.5)], 6, exclude="context")
    assert [int(line.split()[0]) for line in lines[1:7]] == wanted.result.ids.tolist()
    assert lines[7].startswith("inputs ") and ", mmr 0." in lines[7] and lines[7].endswith("; vectors alone")
    np.save(tmp_path / "keys.npy", np.array([[3, 7]]))
    both = (*given, "--rerank", "shard-assist:9", "--candidates", 112, "--keys", tmp_path / "keys.npy", "--json")
    found = json.loads(ok(*both))
    assert {row["article"] for row in found["results"]} == {3}
    assert found["label"].startswith("uses keys") and list(found["ms"]) == ["inputs", "mmr", "shard-assist"]


def test_predict_asks_for_more_than_there_is(made):
    for k in (112, 10**20):
        shown = ok("predict", made.artifact, "--context", made.context, "-k", k, "--json")
        assert len(json.loads(shown)["results"]) == 112 - 5


@pytest.mark.parametrize("precision", ("bf16", "int8"))
def test_export_in_a_lower_precision(made, tmp_path, precision):
    ok("export", made.run, "--index", made.index, "--precision", precision, "--out", tmp_path / "a")
    assert json.loads((tmp_path / "a/config.json").read_text())["precision"] == precision
    line = ok("predict", tmp_path / "a", "--context", made.context, "-k", 3, "--json")
    assert len(json.loads(line)["results"]) == 3


def test_bench_latency(made):
    given = ("bench", "latency", made.artifact, "--threads", 1, "--repeats", 5)
    shown = ok(*given, "--profile")
    assert "median" in shown and "search" in shown and "mamba_block" in shown and "packed weights" in shown
    found = json.loads(ok(*given, "--context", made.batch, "--profile", "--json"))
    assert set(found["stages"]) == {"model", "search", "total"} and found["threads"] == 1 and found["repeats"] == 5
    assert found["packed_bytes"] > 0
    block = next(layer for layer in found["profile"] if layer["layer"] == "mamba_block")
    assert set(block["microseconds"]) == {"elementwise", "in_proj", "x_proj", "scan", "out_proj"}
    assert "profile" not in json.loads(ok(*given, "--json"))


def test_bench_latency_with_rerankers(made):
    given = ("bench", "latency", made.artifact, "--repeats", 5, "--rerank", "mmr:0.7", "--rerank", "shard-assist")
    stages = json.loads(ok(*given, "--json"))["stages"]
    assert list(stages) == ["model", "search", "inputs", "mmr", "shard-assist", "total"]
    assert stages["total"]["p50"] > stages["mmr"]["p50"] > 0


@pytest.fixture(scope="module")
def gates(tmp_path_factory):
    """Files of gates that this machine meets and misses, however busy it is."""
    total = '[[limit]]\nlatency = "total"\npercentile = "p95"\nat_most = 1e6\n'
    recall = '[[limit]]\nsearch = "recall@50"\nat_least = 0.95\n'
    model = '[[limit]]\nlatency = "model"\npercentile = "p50"\nat_most = 1e-6\n'
    search = '[[limit]]\nlatency = "search"\npercentile = "p99"\nat_most = 1e6\n'
    metric = '[[limit]]\nmetric = "R@5"\nat_least = 0.99\n'
    content = {
        "lax": "threads = 1\n" + total + recall,
        "strict": "threads = 1\n" + total + model,
        "other": "threads = 2\n" + total,
        "anywhere": search + metric,
    }
    folder = tmp_path_factory.mktemp("gates")
    for name, text in content.items():
        (folder / f"{name}.toml").write_text(f'about = "a test\'s"\n{text}')
    return SimpleNamespace(**{name: folder / f"{name}.toml" for name in content})


def test_a_gate_that_is_met(made, gates):
    given = ("bench", "latency", made.artifact, "--repeats", 5, "--gate", gates.lax, "--gate", gates.anywhere)
    shown = ok(*given)
    assert "total_p95_ms ≤ 1e+06" in shown and "1.000 (exact)" in shown and "missed" not in shown
    assert "not judged" in shown
    assert "on 1 threads" in shown  # those of the gate
    found = json.loads(ok(*given, "--json"))
    assert [(row["gate"], row["metric"], row["passed"]) for row in found["gates"]] == [
        ("lax", "total_p95_ms", True),
        ("lax", "recall@50", True),
        ("anywhere", "search_p99_ms", True),
        ("anywhere", "R@5", None),
    ]
    assert found["gates"][0]["value"] == found["stages"]["total"]["p95"]


def test_a_gate_that_is_missed_exits_1_and_says_by_what(made, gates):
    given = ("bench", "latency", made.artifact, "--repeats", 5, "--gate", gates.lax, "--gate", gates.strict)
    result = fastlvm(*given)
    assert result.code == 1 and "missed" in result.out
    assert result.err.startswith("fastlvm: gate strict missed: model_p50_ms is ") and "≤ 1e-06" in result.err
    assert "lax" not in result.err and "total" not in result.err
    assert json.loads(fastlvm(*given, "--json").out)["gates"][-1]["passed"] is False


def test_the_recall_of_lists_is_the_one_on_record(made, gates, tmp_path):
    ok("index", "build", made.payload, "--space", made.run, "--kind", "ivf_flat", "--out", tmp_path / "i")
    ok("export", made.run, "--index", tmp_path / "i", "--out", tmp_path / "a")
    found = ok("bench", "latency", tmp_path / "a", "--repeats", 5, "--gate", gates.lax, "--json")
    row = json.loads(found)["gates"][1]
    assert (
        row["value"] == Index.open(tmp_path / "i").recall_at_50 and row["note"] == "recorded when the index was built"
    )


def test_gates_that_cannot_be_judged_in_one_run_are_refused(made, gates):
    given = ("bench", "latency", made.artifact, "--gate", gates.lax)
    assert "choose one of deploy, " in refused("bench", "latency", made.artifact, "--gate", "nonsense")
    assert "fastlvm eval --gates judges it" in refused("bench", "latency", made.artifact, "--gate", "epoch-2")
    assert refused(*given, "--threads", 2) == "gate lax is for threads 1, and not 2: run it by itself"
    assert refused(*given, "--gate", gates.other) == "gate other is for threads 2, and not 1: run it by itself"
    assert refused(*given, "-k", 10).startswith("-k is 10, and a gate is of 50 chunks")


def test_eval(made, tmp_path):
    result = fastlvm(
        *("eval", made.run, made.artifact, "--payload", made.payload, "--windows", made.windows),
        *("--split", "test", "--out", tmp_path / "report", "--limit", 12),
    )
    assert result.code == 0
    assert "whitened copy-last" in result.out and "latency, batch 1" in result.out
    assert "written" in result.err and "written" not in result.out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    figures = {row["name"]: row["excluded"] for row in report["rankers"]}
    assert figures["run"]["R@5"] == figures["artifact"]["R@5"]
    assert figures["run"]["median_rank"] == figures["artifact"]["median_rank"]
    assert report["windows"]["evaluated"] == 12 and list(report["latency"]) == ["artifact"]
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_gate_missed(made, tmp_path):
    args = ["eval", made.run, "--payload", made.payload, "--windows", made.windows, "--out", tmp_path / "report"]
    missed = fastlvm(*args, "--gates", "final")
    assert missed.code == 1 and "gate final, run: R@5" in missed.out and "not measured" in missed.out
    assert missed.err.splitlines()[-1].startswith("fastlvm: gate final missed by run: ")
    assert "Traceback" not in missed.err and (tmp_path / "report" / "report.json").exists()
    rows = json.loads((tmp_path / "report" / "gates.json").read_text())
    assert [(row["gate"], row["model"], row["metric"]) for row in rows] == [
        ("final", "run", name) for name in ("Contain@50", "Eff@5", "R@5", "total_p95_ms")
    ]
    assert rows[-1]["passed"] is False and rows[-1]["value"] is None


def test_a_gate_of_another_split_is_refused_before_the_work(made, tmp_path):
    args = ["eval", made.run, "--payload", made.payload, "--windows", made.windows, "--out", tmp_path / "report"]
    assert refused(*args, "--gates", "epoch-2").startswith("gate epoch-2 is about split validation, and not test")
    assert not (tmp_path / "report").exists()


def test_a_gate_passed(made, tmp_path):
    args = ["eval", made.run, "--payload", made.payload, "--windows", made.windows, "--out", tmp_path / "report"]
    result = fastlvm(*args, "--gates", "epoch-2", "--split", "validation")
    assert result.code == 0 and "gate epoch-2, run: cosine" in result.out and "passed" in result.out
    assert (tmp_path / "report" / "gates.json").exists()


@pytest.mark.parametrize("name", names())
def test_info_of_a_model(name):
    lines = dict(line.split(None, 1) for line in ok("info", "--model", name).splitlines())
    assert lines["model"] == name and lines["takes"] == "5 × 768"
    count = int(lines["parameters"].replace(",", ""))
    small = dict(line.split(None, 1) for line in ok("info", "--model", name, "--set", "vector_dim=64").splitlines())
    assert 0 < int(small["parameters"].replace(",", "")) <= count


def test_info_of_a_model_counts_two_operations_for_each_weight_of_a_product():
    """A GRU of one layer over 5 positions: 3 gates of 2 products each, and a head on the last."""
    given = ("--set", "vector_dim=64", "--set", "d_model=64", "--set", "n_layers=1")
    assert f"FLOPs a context     {2 * (5 * 6 * 64 * 64 + 64 * 64):,}" in ok("info", "--model", "gru", *given)


def test_sweep(made, tmp_path):
    tiny = [part for pair in ("epochs=1", "batch_size=16") for part in ("--set", pair)]
    given = ("sweep", "--model", "mixture", "--model", "gru", "--payload", made.payload, "--windows", made.windows)
    shown = ok(*given, "--out", tmp_path / "s", "--seeds", "0,1", "--vary", "lr=1e-3,1e-2", *tiny)
    assert all(
        f"{model}-lr={lr}-seed{seed}" in shown
        for model in ("mixture", "gru")
        for lr in ("0.001", "0.01")
        for seed in (0, 1)
    )
    assert len(json.loads((tmp_path / "s/sweep.json").read_text())) == 8
    assert ok(*given, "--out", tmp_path / "s", "--seeds", "0,1", "--vary", "lr=1e-3,1e-2", *tiny) == shown


def test_info():
    printed = ok("info")
    for word in ("fastlvm", "instruction set", "threads", "numpy", "ssm_scan cpu", "ssm_scan reference"):
        assert word in printed
