"""`fastlvm eval`: several payloads, indexes, rerankers, interruptions, and models that are none."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from cli.conftest import DIM, TINY, fastlvm, listing, ok, refused
from fastlvm import Index, Payload, Predictor, Space, Windows, training, workflow
from fastlvm.evaluation import Report
from fastlvm.evaluation import pipeline as work
from fastlvm.retrieval.rerank import parse
from fastlvm.training import checkpoint, load_run

REPORT = {"report.json", "report.md", "report.html", "ranks"}


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """No drawings, unless a test asks for `drawn`, and few calls that are timed."""
    monkeypatch.setattr(workflow, "LATENCY_REPEATS", 20)
    if "drawn" not in request.fixturenames:
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def drawn():
    """Asked for by a test that wants drawings."""


def evaluated(made, out, *models, payload=None, windows=None):
    """The arguments of an evaluation of the payload that everything was made of."""
    given = models or (made.run,)
    return ["eval", *given, "--payload", payload or made.payload, "--windows", windows or made.windows, "--out", out]


def report_of(folder):
    return Report.open(folder / "report.json")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, article_walks):
    """Payloads beside the one everything was made of, by what is other about them, with windows."""
    root = tmp_path_factory.mktemp("elsewhere")
    found = {}
    for name, dim, context in (("corpus", DIM, 5), ("wide", DIM + 4, 5), ("short", DIM, 3)):
        vectors, keys = article_walks(articles=6, chunks=12, dim=dim, seed=3)
        payload = Payload.build(root / name, vectors, keys, encoder="walks")
        Windows.build(payload, context=context, split=(0.5, 0.25, 0.25)).save(root / f"{name}.npz")
        found[name] = (payload.path, root / f"{name}.npz")
    return found


@pytest.fixture(scope="module")
def other_run(elsewhere, tmp_path_factory):
    """A run that was made from `elsewhere`'s corpus."""
    payload, windows = elsewhere["corpus"]
    out = tmp_path_factory.mktemp("other") / "away"
    ok("train", "--payload", payload, "--windows", windows, "--out", out, "--epochs", 1, *TINY, "--set", "decay=0.6")
    return out


def test_a_report_of_one_payload(made, tmp_path, drawn):
    result = fastlvm(*evaluated(made, tmp_path / "report"))
    assert result.code == 0
    assert {path.name for path in (tmp_path / "report").iterdir()} == REPORT | {"report.png"}
    report = report_of(tmp_path / "report")
    assert report.text().rstrip() in "\n".join(line.rstrip() for line in result.out.splitlines())
    assert [row.name for row in report.rows if row.kind == "model"] == ["run"]
    assert report.row("run").domain == "in" and report.latency == {} and report.row("run").ann is None
    said = result.err.splitlines()
    assert said[0] == "ranking run" and said[-1].endswith(f"written to {tmp_path / 'report'}")


def test_several_payloads_have_a_folder_each_and_a_domain(made, elsewhere, other_run, tmp_path):
    payload, windows = elsewhere["corpus"]
    again = ["--payload", payload, "--windows", windows]
    result = fastlvm(*evaluated(made, tmp_path / "r", made.artifact, made.run, other_run), *again)
    assert result.code == 0 and {path.name for path in (tmp_path / "r").iterdir()} == {"payload", "corpus"}
    home, away = (report_of(tmp_path / "r" / name) for name in ("payload", "corpus"))
    assert {path.name for path in (tmp_path / "r" / "corpus").iterdir()} == REPORT
    assert home.payload["id"] == Payload.open(made.payload).id and away.payload["id"] == Payload.open(payload).id
    for name, domains in (("artifact", ("in", "out")), ("run", ("in", "out")), ("away", ("out", "in"))):
        assert (home.row(name).domain, away.row(name).domain) == domains
    assert home.row("artifact").ann is not None and away.row("artifact").ann is None  # another corpus is in no index
    assert set(home.latency) == {"artifact"} and away.latency == {}
    assert "artifact (out of domain)" in away.text() and "run (out of domain)" not in home.text()
    assert home.row("whitened mixture").space == Space.load(made.run / "space.safetensors").base.id
    assert away.row("whitened mixture").space == Space.load(other_run / "space.safetensors").base.id


def test_payloads_of_one_name_have_folders_of_their_own(made, copied, elsewhere, tmp_path):
    payload, windows = elsewhere["corpus"]
    same = copied(payload, "deeper/payload")
    args = evaluated(made, tmp_path / "r")
    ok(*args, "--payload", same, "--windows", windows)
    ids = {Payload.open(path).id for path in (made.payload, payload)}
    assert {path.name for path in (tmp_path / "r").iterdir()} == {f"payload-{one}" for one in ids}


def test_a_gate_may_want_another_corpus(made, elsewhere, tmp_path):
    gate = tmp_path / "both.toml"
    limit = '[[limit]]\nmetric = "R@5"\nat_least = 0.0\ndomain = "{}"\n'
    gate.write_text('about = "x"\n' + limit.format("in") + limit.format("out"))
    payload, windows = elsewhere["corpus"]
    args = [*evaluated(made, tmp_path / "r"), "--payload", payload, "--windows", windows]
    ok(*args, "--gates", gate)
    rows = json.loads((tmp_path / "r" / "gates.json").read_text())
    figures = [report_of(tmp_path / "r" / name).row("run").excluded["R@5"].value for name in ("payload", "corpus")]
    assert [row["value"] for row in rows] == figures


REFUSED = {
    "a payload without windows": (["--payload", "corpus"], "2 --payload and 1 --windows are given"),
    "windows without a payload": (["--windows", "corpus"], "1 --payload and 2 --windows are given"),
    "a payload given twice": (["--payload", "home", "--windows", "home"], "is given twice"),
    "other dimensions": (
        ["--payload", "wide", "--windows", "wide"],
        f"takes vectors of {DIM} dimensions, and WIDE has {DIM + 4}",
    ),
    "another context": (
        ["--payload", "short", "--windows", "short"],
        "takes contexts of 5 chunks, and the windows of SHORT have 3",
    ),
    "windows of another payload": (["--payload", "corpus", "--windows", "home"], "do not come from payload CORPUS"),
    "a split without windows": (["--payload", "corpus", "--windows", "train"], "have none in split 'test'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_is_written(made, elsewhere, tmp_path, case):
    options, said = REFUSED[case]
    known = {**elsewhere, "home": (made.payload, made.windows)}
    args = evaluated(made, tmp_path / "r")
    for option, name in zip(options[::2], options[1::2], strict=True):
        if name == "train":
            Windows.build(Payload.open(elsewhere["corpus"][0]), split=(1, 0, 0)).save(tmp_path / "train.npz")
            args += [option, tmp_path / "train.npz"]
        else:
            args += [option, known[name][option == "--windows"]]
    for name, (payload, _) in elsewhere.items():
        said = said.replace(name.upper(), str(payload))
    before = listing(tmp_path)
    assert said in refused(*args)
    assert listing(tmp_path) == before


def test_a_model_of_none_of_the_payloads_is_refused(made, elsewhere, other_run, tmp_path):
    line = refused(*evaluated(made, tmp_path / "r", made.run, other_run))
    assert line.startswith(f"{other_run} belongs to payload ") and str(made.payload) in line
    assert not (tmp_path / "r").exists()


def wrong(tmp_path):
    (tmp_path / "some.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    return tmp_path / "some.txt", tmp_path / "folder", tmp_path / "absent"


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--payload", "absent", "absent does not exist"),
        ("--payload", "some.txt", "some.txt is a file"),
        ("--payload", "folder", "folder is not a payload"),
        ("--windows", "absent", "absent does not exist"),
        ("--windows", "some.txt", "some.txt is not an .npz file"),
        ("--windows", "other.npz", "do not come from payload"),
        ("--out", "some.txt", "some.txt is a file, and a folder is wanted"),
        ("--gates", "nonsense", "nonsense"),
        ("--gates", "absent.toml", "absent.toml"),
        ("--index", "absent", "absent"),
        ("--index", "folder", "folder holds no index"),
        ("--out-of-domain", "absent", "absent does not exist"),
        ("--limit", 0, "limit is 0"),
        ("--limit", -3, "limit is -3"),
        ("--seed", -1, "seed is -1"),
        ("--split", "nonsense", "split is 'nonsense'"),
    ],
)
def test_wrong_arguments_are_one_line(made, elsewhere, tmp_path, monkeypatch, option, value, said):
    wrong(tmp_path)
    Windows.open(elsewhere["corpus"][1]).save(tmp_path / "other.npz")
    monkeypatch.chdir(tmp_path)
    given = {"--payload": made.payload, "--windows": made.windows, "--out": "out"} | {option: value}
    before = listing(tmp_path)
    assert said in refused("eval", made.run, *(part for pair in given.items() for part in pair))
    assert listing(tmp_path) == before


def test_one_of_several_folders_is_a_file(made, elsewhere, tmp_path):
    (tmp_path / "corpus").write_text("x")
    payload, windows = elsewhere["corpus"]
    args = [*evaluated(made, tmp_path), "--payload", payload, "--windows", windows]
    assert f"{tmp_path / 'corpus'} is a file" in refused(*args)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.fixture(scope="module")
def indexes(made, elsewhere, tmp_path_factory):
    """Index folders: of few lists in the model's space, in the payload's own, and of other payloads."""
    root = tmp_path_factory.mktemp("indexes")
    payload, corpus = Payload.open(made.payload), Payload.open(elsewhere["corpus"][0])
    space = load_run(made.run)[2]
    Index.build(payload, space=space, kind="ivf_flat", nlist=12, nprobe=1).save(root / "few")
    Index.build(payload).save(root / "raw")
    Index.build(corpus, space=space).save(root / "foreign")
    Index.build(payload, space=space).save(root / "grown")
    grown = Index.open(root / "grown")
    grown.add(np.eye(DIM, dtype=np.float32), np.stack([np.full(DIM, 99), np.arange(DIM)], axis=1))
    grown.remove(np.array([[0, 0]]))
    grown.close()
    return root


@pytest.mark.parametrize("model", ["run", "artifact"])
def test_an_index_that_is_named_is_searched(made, indexes, tmp_path, model):
    ok(*evaluated(made, tmp_path, getattr(made, model)), "--index", indexes / "few")
    report = report_of(tmp_path)
    row = report.row(model)
    assert (row.ann["index"], row.ann["k"]) == ("ivf_flat nlist 12, nprobe 1", 50)
    assert set(row.ann["target_recall"]) == {"R@1", "R@5", "R@10", "R@50"} and row.ann["target_recall"]["R@1"] == 1
    assert row.ann["loss"]["Contain@50"].value < 0
    for name, figure in row.ann["metrics"].items():
        assert row.ann["loss"][name].value == pytest.approx(figure.value - row.excluded[name].value)
    assert set(report.latency[model].stages) == {"model", "search", "total"}
    assert "what the index loses" in report.text()


def test_an_artifacts_own_index_is_exact_here(made, tmp_path):
    ok(*evaluated(made, tmp_path, made.artifact))
    row = report_of(tmp_path).row("artifact")
    assert row.ann["index"] == "flat" and all(figure.value == 0 for figure in row.ann["loss"].values())
    assert row.ann["target_recall"] == dict.fromkeys(("R@1", "R@5", "R@10", "R@50"), 1.0)


@pytest.mark.parametrize("model", ["run", "artifact"])
@pytest.mark.parametrize(("index", "said"), [("raw", "the index is in space"), ("foreign", "the index is of payload")])
def test_an_index_of_something_else_is_refused(made, indexes, tmp_path, model, index, said):
    line = refused(*evaluated(made, tmp_path / "r", getattr(made, model)), "--index", indexes / index)
    assert line.startswith(said) and str(getattr(made, model)) in line
    assert not (tmp_path / "r").exists()


def test_an_index_that_grew_since_is_not_taken_for_what_it_was(made, indexes, tmp_path):
    """Rows that came to it are others; and what was kept of a search before is not taken."""
    for name in ("plain", "grown"):
        if name == "plain":
            Index.build(Payload.open(made.payload), space=load_run(made.run)[2]).save(tmp_path / "plain")
        ok(*evaluated(made, tmp_path / "r"), "--index", tmp_path / "plain" if name == "plain" else indexes / "grown")
        row = report_of(tmp_path / "r").row("run")
        assert row.ann["index"] == {"plain": "flat", "grown": f"flat, {DIM} rows added, 1 rows removed"}[name]


def test_rerankers_have_rows_of_their_own(made, tmp_path):
    args = [*evaluated(made, tmp_path, made.artifact), "--rerank", "mmr:0.7"]
    printed = ok(*args)
    report = report_of(tmp_path)
    row = report.row("artifact + mmr:0.7")
    assert (row.kind, row.keys, row.domain) == ("reranked", False, "in")
    assert [one.name for one in report.rows[:2]] == ["artifact", row.name] and row.name in printed
    predictor, payload = Predictor.load(made.artifact), Payload.open(made.payload)
    rows = Windows.open(made.windows).rows("test")
    ids = predictor.rerank(payload.take(rows[:, :-1]), [parse("mmr:0.7")], 50, candidates=50, exclude=rows[:, :-1])
    hit = ids.result.ids == rows[:, -1:]
    for name, k in (("R@1", 1), ("R@5", 5), ("R@10", 10), ("Contain@50", 50)):
        assert row.excluded[name].value == pytest.approx(hit[:, :k].any(axis=1).mean())
    assert list(report.latency["artifact"].stages) == ["model", "search", "inputs", "mmr", "total"]
    assert "artifact: mmr" in printed


@pytest.mark.parametrize("stages", [["sequence-bias:9:0.5"], ["mmr:0.9", "shard-assist:5"]])
def test_rerankers_that_use_keys_stand_under_the_ceiling_of_keys(made, tmp_path, stages):
    ok(*evaluated(made, tmp_path, made.artifact), *(part for stage in stages for part in ("--rerank", stage)))
    report = report_of(tmp_path)
    row = report.row(f"artifact + {' + '.join(stages)}")
    assert row.kind == "reranked" and row.keys
    assert set(report.latency["artifact"].stages) >= {stage.partition(":")[0] for stage in stages}
    tables = {table.columns[0].header: [*table.columns[0].cells] for table in report.table().renderables[1:4]}
    assert row.name not in tables["vectors alone"]
    assert tables["with keys (next by key is the ceiling)"] == [row.name, "next by key"]
    ceiling = report.row("next by key").excluded["R@1"].value
    assert row.excluded["R@1"].value <= ceiling
    if stages[0].startswith("sequence"):
        assert row.excluded["R@1"].value == row.excluded["Contain@50"].value  # what was found at all is first


def test_rerankers_want_an_artifact_and_its_own_index(made, indexes, tmp_path):
    args = evaluated(made, tmp_path / "r")
    assert refused(*args, "--rerank", "mmr").startswith(f"{made.run} is a run, and rerankers work on")
    args = evaluated(made, tmp_path / "r", made.artifact)
    assert "nonsense" in refused(*args, "--rerank", "nonsense")
    assert "leave out one of them" in refused(*args, "--rerank", "mmr", "--index", indexes / "few")
    assert not (tmp_path / "r").exists()


def test_an_evaluation_goes_on_where_it_was_interrupted(made, tmp_path, monkeypatch):
    models = (made.run, made.artifact)
    ok(*evaluated(made, tmp_path / "whole", *models))
    ranked, real = [], work.rank_with_impostors

    def broken(*args):
        ranked.append(len(ranked))
        if len(ranked) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(work, "rank_with_impostors", broken)
    args = evaluated(made, tmp_path / "r", *models)
    result = fastlvm(*args)
    assert result.code == 130 and "Traceback" not in result.err
    last = result.err.splitlines()[-1]
    assert last == f"fastlvm: interrupted; the same command goes on from what {tmp_path / 'r'} holds"
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["ranks"]
    assert [path.suffix for path in (tmp_path / "r" / "ranks").iterdir()] == [".npz"]
    resumed = fastlvm(*args)
    assert resumed.code == 0 and len(ranked) == 3
    assert "ranking run" not in resumed.err and "ranking artifact" in resumed.err
    one, other = (report_of(tmp_path / name).to_dict() | {"latency": {}} for name in ("whole", "r"))
    assert one == other
    assert "ranking" not in fastlvm(*args).err


def test_an_interruption_before_anything_is_kept_says_no_more(made, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "rank_with_impostors", broken)
    result = fastlvm(*evaluated(made, tmp_path / "r"))
    assert (result.code, result.err.splitlines()[-1]) == (130, "fastlvm: interrupted")
    assert not (tmp_path / "r").exists()


def test_a_retrained_model_is_ranked_anew(made, copied, tmp_path):
    run = copied(made.run)
    args = evaluated(made, tmp_path / "r", run)
    before = fastlvm(*args)
    assert "ranking run" in before.err
    change(run, lambda tensors: {name: tensor * 1.5 for name, tensor in tensors.items()})
    after = fastlvm(*args)
    assert "ranking run" in after.err and "fitting the baselines" not in after.err


def change(run, how):
    """Give a run other weights, as if it had been trained to them."""
    tensors, meta = checkpoint.load(run / "best.safetensors")
    checkpoint.save(run / "best.safetensors", how(tensors), meta)


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """Runs of models that are simple enough to be made into something else."""
    root = tmp_path_factory.mktemp("simple")
    for name in ("mixture", "mlp"):
        small = ["--set", "d_model=32", "--set", "n_layers=1"] if name == "mlp" else []
        given = ["--payload", made.payload, "--windows", made.windows, "--epochs", 1, "--batch", 16]
        ok("train", "--model", name, "--out", root / name, *given, *small)
    return root


def the_last(tensors):
    logits = torch.full_like(tensors["mixture.logits"], -60.0)
    logits[-1] = 0.0
    return {**tensors, "mixture.logits": logits}


def a_constant(tensors):
    return {name: tensor + (1e6 if name.endswith("bias") else 0) for name, tensor in tensors.items()}


FAULTS = {
    "copies the last": ("mixture", the_last, "suspect equals copy-last: cosine 1.0000"),
    "gives a constant": ("mlp", a_constant, "suspect gives the same vector for every context"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_is_none_exits_2_after_the_report_is_written(made, trained, copied, tmp_path, fault):
    model, how, said = FAULTS[fault]
    run = copied(trained / model, "suspect")
    change(run, how)
    gate = tmp_path / "gate.toml"
    gate.write_text('about = "x"\n[[limit]]\nmetric = "R@5"\nat_least = 1.0\n')
    result = fastlvm(*evaluated(made, tmp_path / "r", made.run, run), "--gates", gate)
    assert result.code == 2 and said in " ".join(result.out.split())
    assert result.err.splitlines()[-1].startswith(f"fastlvm: {said}")
    assert {path.name for path in (tmp_path / "r").iterdir()} == REPORT  # and no gate was judged
    assert [one["level"] for one in report_of(tmp_path / "r").findings] == ["fault"]


def test_a_model_that_is_given_the_truth_exits_2(made, tmp_path, monkeypatch):
    payload, rows = Payload.open(made.payload), Windows.open(made.windows).rows("test")
    space = load_run(made.run)[2]
    last, truth = (space.apply(payload.take(rows[:, at])) for at in (-2, -1))

    def knowing(_):
        return lambda contexts: truth[np.argmin(((contexts[:, -1][:, None] - last) ** 2).sum(axis=2), axis=1)]

    monkeypatch.setattr(training, "predict_with", knowing)
    result = fastlvm(*evaluated(made, tmp_path / "r"))
    assert result.code == 2 and "run returns the truth: cosine 1.0000" in result.err.splitlines()[-1]
    assert report_of(tmp_path / "r").row("run").excluded["R@1"].value == 1


def test_weights_that_are_not_finite_are_named_and_nothing_is_written(made, trained, copied, tmp_path):
    run = copied(trained / "mixture", "broken")
    change(run, lambda tensors: {name: tensor * float("nan") for name, tensor in tensors.items()})
    result = fastlvm(*evaluated(made, tmp_path / "r", run))
    assert result.code == 2 and "Traceback" not in result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("fastlvm: ") and "broken" in last and "NaN" in last
    assert not (tmp_path / "r").exists()


def test_a_model_named_like_a_baseline_is_refused(made, copied, tmp_path):
    run = copied(made.run, "ridge")
    assert "two rankers are named 'ridge'" in refused(*evaluated(made, tmp_path / "r", run))


def test_models_of_one_folder_name_are_called_by_their_paths(made, copied, tmp_path, monkeypatch):
    copied(made.run, "other/run")
    monkeypatch.chdir(tmp_path)
    ok(*evaluated(made, "r", made.run, "other/run"))
    assert [row.name for row in report_of(tmp_path / "r").rows[:2]] == [str(made.run), "other/run"]


def test_a_gate_is_judged_for_every_model_and_split(made, tmp_path):
    gate = tmp_path / "easy.toml"
    gate.write_text('about = "x"\n[[limit]]\nmetric = "R@5"\nat_least = 0.0\n')
    args = evaluated(made, tmp_path / "r", made.run, made.artifact)
    ok(*args, "--gates", gate, "--gates", gate)
    rows = json.loads((tmp_path / "r" / "gates.json").read_text())
    assert [(row["model"], row["passed"]) for row in rows] == [("run", True), ("artifact", True)]
    gate.write_text('about = "x"\nsplit = "validation"\n[[limit]]\nmetric = "R@5"\nat_least = 1.0\n')
    missed = fastlvm(*evaluated(made, tmp_path / "v"), "--gates", gate, "--split", "val")
    assert missed.code == 1 and missed.err.splitlines()[-1].startswith("fastlvm: gate easy missed by run: R@5 ")


def test_a_report_without_matplotlib(made, tmp_path):
    result = fastlvm(*evaluated(made, tmp_path / "r"))
    assert result.code == 0 and "no charts: drawing needs matplotlib" in result.err
    assert {path.name for path in (tmp_path / "r").iterdir()} == REPORT
    assert "matplotlib is not installed" in (tmp_path / "r" / "report.html").read_text()
