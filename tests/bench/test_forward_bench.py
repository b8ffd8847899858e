"""The parts of the forward bench: targets are judged, rivals are checked, a whole run is kept, printed and drawn."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastlvm
from fastlvm import _C

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import bench_forward
import bench_predictor
import bound
import forward_models
import forward_rivals
import paired
import plot_forward
from forward_cases import BATCHES, CHECKED, PRECISIONS, RIVAL_COSINE, TARGETS, TIMED_CALLS, contexts, name_of
from forward_results import COMPUTE, ForwardResults, stream_of
from forward_rivals import RIVALS
from forward_table import ForwardRun, markdown
from forward_twin import Twin
from paired import Contender, Plan
from results import file_name

BENCH = Path(bound.__file__).parent
SMALL = {"d_model": 48, "n_layers": 2, "d_state": 8}
WIDE = {"n_layers": 1, "d_state": 4}  # as wide as a vector, like the model of the bench
OURS = tuple(map(name_of, PRECISIONS))


@pytest.fixture(autouse=True, scope="module")
def restore():
    isa, threads, torch_threads = _C.isa(), _C.get_num_threads(), torch.get_num_threads()
    yield
    _C.set_isa(isa)
    _C.set_num_threads(threads)
    torch.set_num_threads(torch_threads)


def made(**sizes):
    """A model none of whose weights is 0 or 1, so that each of them shows in the prediction."""
    model = bench_predictor.model(**sizes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return model


# --- rivals


@pytest.mark.parametrize("sizes", (SMALL, WIDE), ids=("embedded", "as wide as a vector"))
def test_the_twin_is_the_model(sizes):
    model = made(**sizes)
    given = torch.from_numpy(contexts(7))
    with torch.inference_mode():
        assert float((Twin(model).eval()(given) - model(given)).abs().max()) < 2e-6


def test_a_twin_of_another_model_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(forward_rivals, "Twin", lambda model: Twin(made(**SMALL | {"n_layers": 1})))
    with pytest.raises(AssertionError):
        forward_rivals.Source(made(**SMALL), contexts(1), tmp_path)


def setting_of(model, record):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_forward, "model", lambda: model)
        patch.setitem(bench_forward.COSINES, "int8", (0.99, 0.99))  # smaller models lose more
        return bench_forward.Setting(record)


def both_of(model, folder):
    """The setting and what the rivals are made from."""
    setting = setting_of(model, ForwardResults(Plan(), [1, 2]))
    return setting, forward_rivals.Source(setting.module, contexts(1), folder)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return both_of(made(**WIDE), tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return both_of(made(**SMALL), tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
def test_a_rival_predicts_what_we_predict(rival, wide, monkeypatch):
    setting, source = wide
    runtime = {"ONNX": "onnxruntime", "OpenVINO": "openvino"}.get(rival.name.split()[0])
    for package in ("onnx", "onnxscript", runtime) if runtime else ():
        pytest.importorskip(package, reason=f"{package} is not installed")
    if rival.name == forward_rivals.COMPILED:  # traced as a whole, but not compiled, which takes minutes
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda *a, mode, **k: compile_(*a, backend="aot_eager", **k))
    torch.set_num_threads(1)
    call, reason = forward_rivals.load(rival, source, 1)
    assert call is not None, reason
    assert source.notes == {}
    given = setting.contexts[:8, None]
    found = [call(one) for one in given]  # kept side by side: a result must not be overwritten by the next call
    ours = np.concatenate([setting.ours["fp32"](one) for one in given])
    if rival.name.endswith("fp32"):
        assert np.abs(np.concatenate(found) - ours).max() < 2e-6
    assert setting.compare(np.concatenate(found))[0] >= RIVAL_COSINE


def failing(error, note=None):
    def load(source, threads):
        source.notes |= {BAD: note} if note else {}
        raise error

    return load


def altered(change):
    """Loads, and predicts `change(prediction, threads)`."""
    return lambda source, n: lambda context: change(source.twin(torch.from_numpy(context)).detach().numpy(), n)


GOOD, BAD = RIVALS[0].name, RIVALS[3].name
turn = itertools.count()
FAULTS = {  # what `load` does, and what is said of it
    "no package": (failing(ImportError("No module named 'it'\n\nInstall it")), "cannot be imported: No module"),
    "does not load": (failing(RuntimeError("that failed | too\nmore"), "otherwise"), "RuntimeError: that failed"),
    "one in 64 disagrees on two threads": (
        altered(lambda found, n: -found if n == 2 and next(turn) % CHECKED == 5 else found),
        "falls to -1.0000",
    ),
    "NaN": (altered(lambda found, n: found * np.float32(np.nan)), "falls to nan"),
    "NaN on two threads": (altered(lambda found, n: found * np.float32((1, np.nan)[n - 1])), "falls to nan"),
    "double": (altered(lambda found, n: found.astype(np.float64)), "cannot be run: AssertionError: float64"),
    "cut short": (altered(lambda found, n: found[:, 1:]), "cannot be run: AssertionError: float32 (64, 767)"),
    "fails when called": (altered(lambda found, n: [][0]), "cannot be run: IndexError: list index out of range"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rival_that_fails_or_disagrees_is_named_with_the_reason_and_not_timed(fault, monkeypatch, small):
    (load, reason), (setting, source) = FAULTS[fault], small
    monkeypatch.setattr(forward_rivals, "RIVALS", (dataclasses.replace(RIVALS[3], load=load), RIVALS[0]))
    monkeypatch.setattr(source, "notes", {})
    record = ForwardResults(Plan(), [1, 2])
    found = bench_forward._rivals(source, setting, [1, 2], record)
    assert [(one.name, one.threads) for one in found] == [(GOOD, 1), (GOOD, 2)]
    assert list(record.cosines) == [GOOD] and record.cosines[GOOD][0] > 0.999999
    assert list(record.reasons) == [BAD] and reason in record.reasons[BAD]
    assert record.notes == {}, "says how a rival is timed that is not"
    text = markdown(json.loads(json.dumps(record.data(), allow_nan=False)))
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {BAD}")]
    assert reason in row and row.replace("\\|", "").count("|") == 3


# --- a run


class Clock:
    """A clock that only the calls advance, and every reading of it by a millisecond."""

    now = 0.0

    def perf_counter(self):
        self.now += 1e-3
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Benchmark:
    """pytest-benchmark's fixture as far as the forward bench uses it, on the clock of `paired`."""

    def __init__(self, order=None):
        self.order = [] if order is None else order
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, call, setup=lambda: None, rounds=1):
        for _ in range(rounds):
            setup()
            start = paired.time.perf_counter()
            call()
            self.stats.stats.data.append(paired.time.perf_counter() - start)
            self.order.append("lead")


class Loops:
    """The bound on that clock: 6 ms for the bytes, 3 ms for the arithmetic."""

    isa = _C.isa()

    def __init__(self, clock):
        self.clock = clock

    def read(self, size):
        self.clock.now += 6e-3

    def compute(self, work):
        self.clock.now += 3e-3

    def set_threads(self, threads):
        pass

    def close(self):
        pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole run of the bench on that clock: a small model, rivals of 62.5 ms, no busy processes."""
    clock, record, order, pinned, asked = Clock(), ForwardResults(Plan(rounds=1, patience=0), [1, 2]), [], set(), []
    setting, time_one = setting_of(made(**SMALL), record), Contender.time

    def logged(one, plan):
        order.append((one.name, one.threads))
        time_one(one, plan)

    def slow(prediction, threads):
        pinned.add((threads, torch.get_num_threads(), fastlvm.get_num_threads()))
        clock.now += 0.0625
        return prediction

    def few_contexts(n):
        asked.append(n)
        return contexts(min(n, 4))

    changes = {
        (paired, "time"): clock,
        (bound, "Bound"): lambda isa, folder: Loops(clock),
        (forward_rivals, "RIVALS"): [dataclasses.replace(one, load=altered(slow)) for one in RIVALS[2:]],
        (forward_models, "forward"): lambda name, precision: setting.ours[precision],
        (bench_forward, "hogs"): lambda: contextlib.nullcontext(7),
        (bench_forward, "BUSY_SECONDS"): 0,
        (bench_forward, "LEAST_BUSY"): 3,
        (Contender, "time"): logged,
    }
    with pytest.MonkeyPatch.context() as patch:
        for (where, name), value in changes.items():
            patch.setattr(where, name, value)
        given = {"threads": [1, 2], "plan": record.plan, "forward_results": record}
        bench_forward.test_rounds(Benchmark(order), setting, tmp_path=tmp_path_factory.mktemp("bound"), **given)
        rounds = order[:]
        patch.setattr(bench_forward, "contexts", few_contexts)
        for precision in PRECISIONS:
            for n in (2, 1):
                bench_forward.test_calls(Benchmark(), setting, precision, n, **given)
                bench_forward.test_hogged(Benchmark(), setting, precision, n, **given)
            bench_forward.test_batches(Benchmark(), setting, precision, **given)
        assert asked == 3 * list(BATCHES)
        for name in forward_models.MODELS:
            bench_forward.test_other_models(Benchmark(), name, **given)
    return SimpleNamespace(record=record, order=rounds, pinned=pinned)


def test_paired_rounds_time_everybody_in_turn_on_their_own_threads(whole):
    def both(*names):
        return [(name, n) for name in names for n in (1, 2)]

    quick = [*both(*OURS)[:-1], *both(COMPUTE)]  # the last of ours leads; the arithmetic takes 4 ms with the reading
    slow = both(*map(stream_of, PRECISIONS), *(rival.name for rival in RIVALS[2:]))
    calls = TIMED_CALLS * ["lead"]
    assert whole.order == 3 * [*quick, *calls] + [*quick, *slow, *calls]
    assert whole.pinned == {(1, 1, 1), (2, 2, 2)}


def test_the_figures_of_a_run_are_those_of_its_calls(whole):
    run = ForwardRun(whole.record.data())
    size = run.data["bytes"]
    for n in (1, 2):
        assert [run.ms(name, n) for name in OURS] == pytest.approx([1, 1, 1])
        assert run.ms("OpenVINO bf16", n) == pytest.approx(63.5)
        assert run.ms(stream_of("bf16"), n) == pytest.approx(7)
        assert run.bound("bf16", n) == pytest.approx(4 + 7)
        assert run.bandwidth("bf16", n) == pytest.approx(size["bf16"] / 7e-3)
    assert [run.window("int8", n) for n in BATCHES] == pytest.approx([1 / n for n in BATCHES])
    assert {row["hogs"] for row in run.data["hogged"]} == {7}
    assert size["fp32"] > 1.5 * size["bf16"] and size["bf16"] > 1.5 * size["int8"]
    assert set(run.data["cosines"]) == {*OURS, *(rival.name for rival in RIVALS[2:])}


def test_percentiles_and_medians_are_those_of_the_seconds():
    seconds = np.random.default_rng(0).permutation(np.arange(1, 101)) * 1e-3
    record = ForwardResults(Plan(), [1, 2])
    record.add_calls("int8", 2, seconds)
    record.add_hogged("int8", 2, seconds, seconds[seconds > 0.05], 2)
    record.add_batch("int8", 2, 4, seconds)
    record.add_other("amn", "int8", 2, 7, seconds)
    timed = Contender(OURS[0], None, 2, "", seconds=list(seconds), first=[3e-3, 5e-3, 4e-3])
    record.add_rounds([timed, Contender("untimed", None, 2, "")])
    for found in (record.calls[0], record.hogged[0]["quiet"], record.others[0]):
        wanted = {"calls": 100, "p50_ms": 50.5, "p95_ms": 95.05, "p99_ms": 99.01}  # between two of them, in proportion
        assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert record.hogged[0]["busy"] == pytest.approx({"calls": 50, "p50_ms": 75.5, "p95_ms": 97.55, "p99_ms": 99.51})
    assert record.batches[0]["ms_per_window"] == pytest.approx(50.5 / 4)
    (row,) = record.rounds
    wanted = {"threads": 2, "rounds": 100, "p10_ms": 10.9, "median_ms": 50.5, "p90_ms": 90.1, "first_ms": 4}
    assert {name: row[name] for name in wanted} == pytest.approx(wanted)


# --- what is kept of a run


def keep(record, folder):
    """What bench/conftest.py prints of a run, and the files it leaves in the folder."""
    spec = importlib.util.spec_from_file_location("bench_conftest", BENCH / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    lines = []
    conftest._keep(SimpleNamespace(section=lines.append, write_line=lines.append), "forward", record, markdown, folder)
    return "\n".join(lines), sorted(path.name for path in folder.iterdir())


def rows_of(text, first):
    """The cells of the rows whose first cell is this."""
    rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| "))
    return [row for row in rows if row[0] == first]


def test_a_whole_run_is_kept_and_printed_and_drawn_from_its_file(whole, tmp_path):
    name = file_name("forward", whole.record.data())
    text, files = keep(whole.record, tmp_path)
    assert files == [f"{name}.json", f"{name}.md"]
    kept = (tmp_path / files[1]).read_text(encoding="utf-8")
    data = json.loads((tmp_path / files[0]).read_text(encoding="utf-8"))
    assert kept in text and markdown(data) == kept and "not measured" not in kept
    for one, *cells in (*((ours, "1.000", "1.000", "16") for ours in OURS), ("OpenVINO bf16", "63.5", "–", "4")):
        cosines = [f"{cosine:.7f}" for cosine in data["cosines"][one]]
        assert [one, *cells, *cells, *cosines] in rows_of(kept, one)
    met = "63.50 × (ONNX Runtime fp32, 63.5 ms)", "63.50 × (OpenVINO fp32, 63.5 ms)"  # alike up to rounding
    assert any(["fp32", "2", TARGETS[6].text, one, "met"] in rows_of(kept, "fp32") for one in met)
    assert [row[1:3] for row in rows_of(kept, "amn")] == [["int8", "1"], ["int8", "2"]]
    plot_forward.main([str(tmp_path / files[0]), str(tmp_path / "drawn.png")])
    assert (tmp_path / "drawn.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("part", ("rounds", "calls", "hogged", "batches", "others"))
def test_a_run_that_lacks_a_row_is_printed_but_not_kept(whole, tmp_path, part):
    record = copy.deepcopy(whole.record)
    assert record.complete()
    getattr(record, part).pop(0)
    text, files = keep(record, tmp_path)
    assert not files and f"not written to {tmp_path}: some of it has not been timed" in text
    assert keep(ForwardResults(Plan(), [1, 2]), tmp_path) == ("", [])


def test_a_part_of_the_bench_prints_no_row_of_what_it_did_not_measure(tmp_path):
    command = [sys.executable, "-m", "pytest", "bench/bench_forward.py", "-k", "amn", "--benchmark-only", "-q"]
    options = ["--bench-rounds=1", f"--bench-results={tmp_path}", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=BENCH.parent, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows_of(done.stdout, "amn") and not any(rows_of(done.stdout, name) for name in OURS)
    assert {row[4] for precision in PRECISIONS for row in rows_of(done.stdout, precision)} == {"not measured"}
    assert " M weights" not in done.stdout
    assert f"not written to {tmp_path}" in done.stdout and not list(tmp_path.iterdir())
