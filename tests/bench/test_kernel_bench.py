"""The parts of the kernel benches: the bound builds, contenders take turns, targets are judged, a run can be drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastlvm import _C

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import bound
import contenders
import memory
import paired
import plot
import rivals
import table
from cases import SCANS, Scan, Target, id_of

CASE, GRADIENT = Scan(2, 48, 7, 16), Scan(2, 48, 7, 16, gradient=True)


@pytest.fixture(autouse=True)
def restore():
    isa, threads, torch_threads = _C.isa(), _C.get_num_threads(), torch.get_num_threads()
    yield
    _C.set_isa(isa)
    _C.set_num_threads(threads)
    torch.set_num_threads(torch_threads)


@pytest.mark.skipif(bound.compiler() is None or sys.platform == "win32", reason="no C++ compiler")
def test_the_bound_is_built_from_the_kernels_own_functions(tmp_path):
    built = bound.Bound(contenders.BEST, tmp_path)
    for threads in (1, 2):
        built.set_threads(threads)
        built.compute(bound.Work.of(GRADIENT))
        built.stream(bound.Work.of(GRADIENT))
    built.close()


def test_the_bound_streams_the_bytes_of_arguments_and_results():
    sizes = sum(t.numel() for t in CASE.tensors())
    output = CASE.tensors()[0].numel()
    forward, both = bound.Work.of(CASE), bound.Work.of(GRADIENT)
    assert (forward.read, forward.written) == (sizes, output)
    assert (both.read, both.written) == (2 * sizes + output, output + sizes)
    assert (forward.exps, both.exps) == (2 * 48 * 6 * 16, 2 * 2 * 48 * 6 * 16)


class Benchmark:
    """pytest-benchmark's fixture as far as `measure` uses it."""

    class stats:
        class stats:
            data = (1.0,)

    def pedantic(self, call, setup, rounds):
        for _ in range(rounds):
            setup()
            call()


def test_contenders_take_turns_and_slow_ones_are_spread_over_the_run():
    order = []

    def contender(name, expected):
        return paired.Contender(name, lambda: order.append(name), 1, _C.isa(), expected)

    lead, quick, slow = contender("lead", 2), contender("quick", 2), contender("slow", 4)
    plan = paired.Plan(rounds=9, patience=12, least=1)
    paired.measure(Benchmark(), lead, [quick, slow], plan)
    assert order == ["quick", "lead", "quick", "slow", "lead"] * 3
    assert (len(quick.seconds), len(slow.seconds)) == (6, 3)


def test_a_round_is_untimed_calls_and_then_timed_ones_unless_they_are_long(monkeypatch):
    order = []
    monkeypatch.setattr(paired, "_SETTLE", 0)
    monkeypatch.setattr(paired, "_WARM", 0)
    lead, quick, slow = (
        paired.Contender(name, lambda name=name: order.append(name), 1, _C.isa(), expected)
        for name, expected in (("lead", 0.01), ("quick", 0.01), ("slow", 0.1))
    )
    paired.measure(Benchmark(), lead, [quick, slow], paired.Plan(rounds=2, warm=3, burst=2))
    assert order == 2 * (["quick"] * 5 + ["slow"] * 2 + ["lead"] * 5)
    assert [(len(one.seconds), len(one.first)) for one in (quick, slow)] == [(4, 2), (4, 0)]


def test_the_plan_gives_long_calls_fewer_rounds():
    plan = paired.Plan(rounds=30, patience=6, least=3)
    found = [plan.of(seconds, decisive) for seconds in (0.001, 0.9, 1.5, 10) for decisive in (False, True)]
    assert found == [120, 120, 30, 30, 4, 4, 1, 3]


@pytest.mark.parametrize("case", (CASE, GRADIENT), ids=("forward", "gradient"))
def test_the_kernel_is_called_again_into_the_arrays_of_the_result(case):
    checked = contenders.Checked(case, [1])
    again, result = contenders.repeated(checked.lead.call)
    for array in result:
        array.zero_()
    again()
    assert checked.difference(result) == 0


def test_a_wrong_result_is_not_timed(monkeypatch):
    wrong = rivals.Rival("wrong", "", lambda: lambda *tensors: tensors[0] + 1, (1, 1))
    absent = rivals.Rival("absent", "", lambda: __import__("no_such_package"), (1, 1))
    large = rivals.Rival("large", "", lambda: pytest.fail("was loaded"), (1e12, 1e12))
    long = rivals.Rival("long", "", lambda: pytest.fail("was loaded"), (1, 1), (6, 6), "it unrolls")
    monkeypatch.setattr(rivals, "RIVALS", (wrong, absent, large, long))
    found, reasons = contenders.rivals_of(contenders.Checked(CASE, [1]))
    assert found == []
    assert "away from ours" in reasons["wrong"] and "no_such_package" in reasons["absent"]
    assert reasons["long"] == "it unrolls; not run above 6 steps"
    if rivals.available_memory() is not None:
        assert "GiB are free" in reasons["large"]


def test_an_op_that_is_wrong_stops_the_bench(monkeypatch):
    monkeypatch.setattr(contenders.Checked, "_op", staticmethod(lambda u, *rest: u * 1.0))
    with pytest.raises(AssertionError):
        contenders.Checked(CASE, [1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_the_peak_memory_of_a_backward_holds_the_gradients():
    case = Scan(8, 512, 256, 4, gradient=True)
    tensors = case.tensors()
    found = memory.measure(case, 1)
    gradients = 4 * sum(t.numel() for t in tensors)
    assert found["arrays"] == 2 * gradients + 4 * tensors[0].numel()
    assert 0.8 * gradients < found["extra"] < 4 * gradients + 64e6


def run(**milliseconds):
    """Data of a run of the first case with the op at 1 ms, the kernel at 0.5 and the bound at 0.25 on 2 threads."""
    case = next(iter(SCANS))
    about = {"op": "ssm_scan", "title": case.title, "shape": case.shape, "gradient": False, "exps": 1, "megabytes": 1.0}
    figures = {"fastlvm": 1, "kernel": 0.5, "bound: compute": 0.25, "bound: stream": 0.1, **milliseconds}
    rows = [
        {"case": id_of(case), "name": name, "isa": isa, "threads": n, "rounds": 30, "median_ms": ms * (3 - n) * times}
        for name, ms in figures.items()
        for isa, times in (("avx2", 2), ("avx512", 1))
        for n in (1, 2)
    ]
    rows.append({"case": id_of(case), "name": "mambapy", "reason": "not installed"})
    about["memory"] = {"extra": 100e6, "arrays": 24e6}
    head = {"date": "2000-01-01", "machine": "a machine", "load": None, "isas": ["avx2", "avx512"], "isa": "avx512"}
    rest = {"threads": [1, 2], "rounds": 30, "versions": {}, "timed": {}}
    return head | rest | {"cases": {id_of(case): about}, "rows": rows}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target("ms", 1.0), "met"),
        (Target("ms", 0.9), "missed"),
        (Target("reference", 40), "met"),
        (Target("reference", 41), "missed"),
        (Target("mambapy", 1), "not measured"),
        (Target("torch.compile", 1), "not measured"),
        (Target("bound", 2), "met"),
        (Target("bound", 1.9), "missed"),
        (Target("threads", 2), "met"),
        (Target("threads", 2.1), "missed"),
        (Target("avx2", 2), "met"),
        (Target("avx2", 1.9), "missed"),
        (Target("memory", 1.5), "met"),
        (Target("memory", 1.4), "missed"),
    ],
)
def test_targets_are_judged(target, expected):
    found = table.Run(run(reference=40))
    assert table.verdict(found, id_of(next(iter(SCANS))), target)[1] == expected


def test_an_avx2_kernel_that_is_hardly_slower_misses_its_target():
    data = run()
    for row in data["rows"]:
        if row.get("isa") == "avx2" and row["name"] == "kernel":
            row["median_ms"] *= 0.7
    assert table.verdict(table.Run(data), id_of(next(iter(SCANS))), Target("avx2", 3))[1] == "missed"


def test_a_run_is_printed_and_drawn(tmp_path):
    data = run(reference=40)
    data["rows"][3]["rounds"] = 3
    text = table.markdown(data)
    assert "| ≥ 40 × reference" in text and "not installed" in text and "[3]" in text
    plot.draw(data, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes()[:4] == b"\x89PNG"
