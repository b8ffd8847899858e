"""The GPU bench without a GPU: its rows are whole, its parts fit together, its table is drawn, and it refuses."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import gpu
import gpu_table
from gpu_case import MAMBA, OURS, REFERENCE, Target
from gpu_cases import CASES, Conv, Nce, Scan, Ssd, Step
from gpu_rivals import Contender, contenders, passes, versions
from gpu_table import markdown, merged, verdict
from gpu_timing import Device, prepare, rounds

BENCH = Path(gpu.__file__).parent
ROWS = gpu.every_row()


def case_of(kind, **wanted):
    return next(case for case in CASES if type(case) is kind and all(getattr(case, k) == v for k, v in wanted.items()))


def options(*given):
    return gpu.arguments(["--rehearse", "--out", "unused", "--backend", REFERENCE, "--no-compile", *given])


def fabricated():
    """A run that never was: ours take 100 µs, a rival 550."""
    ours = {"name": OURS, "median_us": 100.0, "p10_us": 99.0, "p90_us": 104.0, "launches": 128, "how": "graph"}
    rival = {**ours, "name": MAMBA, "median_us": 550.0, "error": 0.5, "extra_mb": 4000.0}
    target = [vars(one) | {"text": one.text} for one in (Target("faster", 5, MAMBA), Target("bound", 0.6))]
    row = {"id": "scan", "section": "ssm", "title": "a | scan", "dtype": "bf16", "targets": target, "clock_mhz": 1980.0}
    row["contenders"] = [{**ours, "error": 1e-3, "host_us": 30.0, "extra_mb": 12.0}, rival]
    row["contenders"] += [{"name": "fla", "reason": "not built: no module"}]
    row["bound"] = {"memory_us": 4.0, "exponentials_us": 55.0, "us": 55.0, "megabytes": 16.0, "exps": 2e8}
    device = {"name": "Fabricated GPU", "sms": 132, "driver_version": "1", "clocks.max.sm": "2", "clocks.max.mem": "3"}
    limits = {"bytes_per_s": 4e12, "flops_bf16": 8e14, "flops_fp32": 5e13}
    head = {"bench": "gpu", "date": "2000-01-01", "settings": {"rehearsal": True}, "device": device}
    return {**head, "ceilings": limits, "versions": {"torch": "0"}, "rows": [row]}


# --- rows


def test_rows_are_told_apart_and_belong_to_a_section():
    ids = [row.id for row in ROWS]
    assert len(ids) == len(set(ids))
    assert {gpu.section(row) for row in ROWS} == {*gpu.SECTIONS}


def test_every_target_is_of_a_contender_that_is_timed():
    for row in ROWS:
        for target in row.targets:
            assert target.text and target.kind in gpu_table._JUDGES


def test_the_first_step_of_a_scan_needs_no_exponential():
    case = Scan(batch=2, channels=3, length=5, state=7)
    assert case.work().special == 2 * 3 * (4 * 7 + 4 * 5)
    assert Scan(batch=2, channels=3, length=5, state=7, gradient=True).work().special == 2 * case.work().special


@pytest.mark.parametrize("case", (*CASES[:2], *(c for c in CASES if not isinstance(c, Scan))), ids=lambda case: case.id)
def test_the_oracle_knows_the_reference_from_a_wrong_result(case):
    case = case.small()
    given = case.inputs(0, "cpu")
    oracle = case.oracle(given)
    call = passes(case, lambda arrays: case.call(arrays, REFERENCE))
    out, grads = call(case.masked(given))
    assert case.error(oracle, out, grads) < gpu_table.TOLERANCE[case.dtype]
    if grads:
        assert case.error(oracle, out, (grads[0] + 1, *grads[1:])) > gpu_table.TOLERANCE[case.dtype]
    assert case.error(oracle, out + 1, grads) > gpu_table.TOLERANCE[case.dtype]


def test_the_oracle_of_a_part_is_that_of_the_whole():
    case = Scan(batch=3, channels=40, length=4, state=3, gradient=True, dtype="fp32")
    given = case.inputs(0, "cpu")
    out, grads = passes(case, lambda arrays: case.call(arrays, REFERENCE))(case.masked(given))
    assert case.error(case.oracle(given), out, grads) < 1e-5


def test_checking_a_step_leaves_its_state_alone():
    case = case_of(Step).small()
    given = case.inputs(0, "cpu")
    before = given["state"].clone()
    case.oracle(given)
    passes(case, lambda arrays: case.call(arrays, REFERENCE))(case.masked(given))
    assert torch.equal(given["state"], before)


def test_sets_of_inputs_differ():
    case = case_of(Conv).small()
    a, b = (case.inputs(seed, "cpu")["x"] for seed in (0, 1))
    assert not torch.equal(a, b)


# --- contenders and times


def test_a_missing_rival_has_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    monkeypatch.setitem(sys.modules, "fla", None)
    for case in (case_of(Scan), case_of(Ssd), case_of(Step)):
        found = list(contenders(case, REFERENCE, compiled=False))
        assert found[0].name == OURS
        missing = dict(one for one in found if isinstance(one, tuple))
        assert any(reason.startswith("not built: ") for reason in missing.values())


def test_a_reference_that_would_not_fit_is_left_out():
    found = [one for one in contenders(case_of(Scan, state=256), REFERENCE, True) if isinstance(one, tuple)]
    assert "GB" in dict(found)[REFERENCE]


def test_contenders_take_turns():
    order = []
    device, sets = Device("cpu"), [{}, {}]
    timed = [
        prepare(device, Contender(name, lambda given, name=name: order.append(name)), sets, 0.1) for name in ("a", "b")
    ]
    timed[1].rounds = 50
    order.clear()
    rounds(device, timed)
    assert [len(one.milliseconds) for one in timed] == [100, 50]
    assert order[:6] == ["a", "a", "b", "a", "a", "b"]
    assert timed[0].figures()["launches"] == 100


def test_a_rehearsal_of_a_row(monkeypatch):
    monkeypatch.setattr("gpu_timing.LAUNCHES", 5)
    limits = {"bytes_per_s": 1e9, "flops_bf16": 1e9, "flops_fp32": 1e9, "sms": 0}
    for kind in (Scan, Nce):
        row = gpu.measured(case_of(kind, gradient=True).small(), Device("cpu"), options(), limits)
        ours = row["contenders"][0]
        assert ours["name"] == OURS and ours["error"] < 3e-2 and ours["launches"] >= 5
        assert row["bound"]["us"] == max(row["bound"]["memory_us"], row["bound"].get("products_us", 0))
        json.dumps(row, allow_nan=False)


class Stub:
    """Stands for a stream, an event or a graph."""

    at = 0.0

    def __init__(self, *args, **kwargs):
        self.when, self.replayed = 0.0, 0

    def record(self):
        Stub.at += 3.0
        self.when = Stub.at

    def elapsed_time(self, other):
        return other.when - self.when

    def wait_stream(self, other):
        pass

    def replay(self):
        self.replayed += 1


@pytest.fixture
def stubbed(monkeypatch):
    """A device whose calls all take 3 ms by its events, or as many as `Stub.at` is moved on by."""
    none, cuda = contextlib.nullcontext, torch.cuda
    for name in ("Event", "Stream", "CUDAGraph"):
        monkeypatch.setattr(cuda, name, Stub)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(cuda, name, lambda name=name: 5e6 * name.startswith("max"))
    for name in ("graph", "stream"):
        monkeypatch.setattr(cuda, name, lambda *args: none())
    monkeypatch.setattr(cuda, "current_stream", Stub)
    properties = SimpleNamespace(L2_cache_size=60 << 20, name="Stub", major=9, minor=0, multi_processor_count=1)
    properties.total_memory = 1 << 30
    monkeypatch.setattr(cuda, "get_device_properties", lambda index: properties)
    device = Device("cpu")
    device.gpu = True
    return device


@pytest.mark.parametrize("graphed", (True, False))
def test_short_calls_are_timed_as_a_graph_of_all_sets(stubbed, monkeypatch, graphed):
    monkeypatch.setattr("gpu_timing._GRAPHED", 4.0 if graphed else 2.0)
    seen = []
    sets = [{"number": number} for number in range(stubbed.sets(20e6))]
    assert len(sets) == 10
    one = prepare(stubbed, Contender("one", lambda given: seen.append(given["number"])), sets, 1.0)
    rounds(stubbed, [one])
    figures = one.figures()
    assert figures["extra_mb"] == 5.0 and ("host_us" in figures) == graphed
    if graphed:
        assert figures["how"] == "graph of 10 calls" and figures["launches"] == 250 and figures["median_us"] == 300.0
    else:
        assert figures["how"] == "events" and figures["launches"] == 100 and figures["median_us"] == 3000.0
        assert seen[-10:] == list(range(10))


def test_what_cannot_be_captured_is_timed_by_events(stubbed, monkeypatch):
    def refuse(*args):
        raise RuntimeError("not while capturing\nmore")

    monkeypatch.setattr("gpu_timing._GRAPHED", 4.0)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    one = prepare(stubbed, Contender("one", lambda given: None), [{}, {}], 1.0)
    assert one.how == "events; no graph: not while capturing" and one.calls == 1


def test_a_slow_call_has_fewer_launches(stubbed):
    def slow(given):
        Stub.at += 300.0

    one = prepare(stubbed, Contender("one", slow), [{}, {}], 2.0)
    assert one.rounds == 6


def test_a_device_is_described(stubbed):
    assert gpu.describe(stubbed)["capability"] == "sm_90"


def test_packages_have_a_version_or_are_missing():
    assert versions()["torch"] == torch.__version__ and versions()["mamba-ssm"]


# --- runs


class Row:
    section, title, targets = "ssm", "a row", ()

    def __init__(self, id, work):
        self.id, self._work = id, work

    def measured(self, device, given, limits):
        self._work()
        return {"id": self.id, "section": "ssm", "title": self.title, "contenders": []}


def _ends():
    os._exit(7)


def _raises():
    raise ValueError("two\nlines")


def _hangs():
    time.sleep(60)


def test_a_run_goes_on_after_a_row_that_fails_ends_its_process_or_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ceilings", lambda device: {"bytes_per_s": 1e9, "flops_bf16": 1e9, "flops_fp32": 1e9})
    given = options("--patience", "4")
    run = gpu.Run(tmp_path, given)
    rows = [Row("raises", _raises), Row("ends", _ends), Row("hangs", _hangs), Row("fine", lambda: None)]
    gpu.follow(run, rows, given)
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    assert data["settings"]["rehearsal"]
    reasons = {row["id"]: row.get("reason") for row in data["rows"]}
    assert reasons["raises"] == "ValueError: two" and "status 7" in reasons["ends"]
    assert "over the time" in reasons["hangs"] and reasons["fine"] is None
    assert path.with_suffix(".md").read_text() == markdown(data)


def test_rows_that_were_not_reached_say_so(tmp_path):
    given = options("--limit", "0")
    run = gpu.Run(tmp_path, given)
    gpu.follow(run, [Row("late", lambda: None)], given)
    assert run.rows[0]["reason"] == "not reached within 0 s"


def test_without_a_gpu_it_refuses_in_one_sentence():
    done = subprocess.run([sys.executable, BENCH / "gpu.py"], capture_output=True, text=True, env=_blind(), check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("no CUDA device is here") and done.stderr.count("\n") == 1


def _blind():
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("wrong", (["--only", "nothing"], ["--rehearse"]))
def test_wrong_options_are_refused(wrong, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *wrong])
    assert gpu.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- tables


def test_the_table_of_a_fabricated_run(tmp_path):
    path = gpu.save(tmp_path, fabricated())
    assert path.name == "gpu-fabricated-gpu.json"
    text = path.with_suffix(".md").read_text()
    assert text.startswith("**A rehearsal")
    assert "| a \\| scan | ≥ 5 × as fast as mamba_ssm CUDA | 5.50 × | met |" in text
    assert "| a \\| scan | ≥ 60 % of the bound | 55 % | missed |" in text
    assert "wrong: 5.0e-01" in text and "not built: no module" in text and "1980" in text


def test_without_a_rival_a_target_is_not_measured():
    data = fabricated()
    row = data["rows"][0]
    row["contenders"] = row["contenders"][:1]
    assert verdict(row, row["targets"][0]) == ("", "not measured")


def test_a_memory_target():
    row = fabricated()["rows"][0]
    target = vars(Target("memory", 1 / 20, MAMBA))
    assert verdict(row, target) == ("12 MB against 4000 MB", "met")


def test_later_rows_take_the_place_of_earlier_ones():
    first, second = fabricated(), copy.deepcopy(fabricated())
    first["rows"].append({**first["rows"][0], "id": "other"})
    second["rows"][0]["contenders"][0]["median_us"] = 50.0
    second["rows"].append({"id": "other", "title": "other", "reason": "ended", "contenders": []})
    found = {row["id"]: row for row in merged([first, second])["rows"]}
    assert found["scan"]["contenders"][0]["median_us"] == 50.0 and "reason" not in found["other"]
    second["device"]["name"] = "another"
    with pytest.raises(ValueError, match="different devices"):
        merged([first, second])
