"""The figures of the forward bench: targets are judged, the fastest rival is found, bars are drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import plot
import plot_forward
from forward_cases import BATCHES, DIM, PRECISIONS, TARGETS, name_of
from forward_results import COMPUTE, stream_of
from forward_table import ForwardRun, verdict

OURS = tuple(map(name_of, PRECISIONS))
BY_TARGET = pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.kind}-{t.precision}-{t.threads}")


def empty(**parts):
    """Data of a run on 1 and 2 threads that measured only `parts`."""
    head = {"date": "2000-01-01", "machine": "AMD EPYC, 2 cores, Linux x86_64", "load": None, "isas": [], "isa": "avx2"}
    rest = {"threads": [1, 2], "rounds": 30, "versions": {}, "timed": {}, "bytes": {}, "cosines": {}, "reasons": {}}
    lists = {part: [] for part in ("paired", "calls", "hogged", "batches", "others")}
    model = {"name": "mamba-s", "context": 5, "dim": DIM, "parameters": 0}
    return head | rest | {"notes": {}, "model": model} | lists | parts


def faked(target, found, other):
    """A run in which the target's figure is `found`, and that of every other precision and threads `other`."""
    paired, calls, hogged, batches = [], [], [], []
    for n in (1, 2):
        here = n == target.threads
        # The fastest one that counts has `found`: of fp32 where that is asked for.
        rivals = {"PyTorch fp32": 2, "OpenVINO fp32": 1, "OpenVINO bf16": 1e-4 if target.precision == "fp32" else 3}
        times = {COMPUTE: 0.25} | {name: times * found for name, times in rivals.items()}
        paired += [{"name": name, "threads": n, "median_ms": ms if here else other} for name, ms in times.items()]
        for precision in PRECISIONS:
            this = here and precision == target.precision
            row, value = {"name": name_of(precision), "threads": n}, found if this else other
            ours = other if target.kind == "ms" else 1.0 if target.kind == "rivals" and this else value
            paired.append(row | {"median_ms": ours})
            paired.append({"name": stream_of(precision), "threads": n, "median_ms": 0.75 if this else other})
            p50, p95 = (value, other) if target.kind == "ms" else (1.0, value)
            calls.append(row | {"p50_ms": p50, "p95_ms": p95, "p99_ms": other})
            hogged.append(row | {"quiet": {"p50_ms": 1.0}, "busy": {"p50_ms": value, "p95_ms": other}})
    for precision in PRECISIONS:
        windows = dict.fromkeys(BATCHES, 0.5 * found) | {1: 1.0, 4: other, 64: found}  # 4 windows do not count
        this = precision == target.precision
        row = {"name": name_of(precision), "threads": 2}
        batches += [row | {"n": n, "ms_per_window": ms if this else other} for n, ms in windows.items()]
    return empty(paired=paired, calls=calls, hogged=hogged, batches=batches)


@BY_TARGET
def test_a_target_is_met_up_to_its_limit_and_missed_past_it(target):
    past = 0.9999 if target.kind == "rivals" else 1.0001
    for other in (1e-3, 1e3):
        for times, expected in ((past**-100, "met"), (1, "met"), (past, "missed"), (past**100, "missed")):
            shown, judged = verdict(ForwardRun(faked(target, times * target.limit, other)), target)
            assert judged == expected, (times, other, shown)
            read = float(shown.split()[0])
            met = read >= target.limit if target.kind == "rivals" else read <= target.limit
            assert met == (judged == "met"), f"{shown} is printed, and {judged} beside it"


@BY_TARGET
def test_a_target_whose_figure_is_missing_is_not_measured(target):
    data = faked(target, 1.0, 1.0)
    for part in ("paired", "calls", "hogged", "batches"):
        data[part] = [row for row in data[part] if row["name"] != name_of(target.precision)]
    assert verdict(ForwardRun(data), target) == verdict(ForwardRun(empty()), target) == ("", "not measured")


def test_the_fastest_rival_is_one_of_fp32_for_fp32_and_never_ours():
    times = {"OpenVINO bf16": (9, 4), "ONNX Runtime int8": (8, 5), "OpenVINO fp32": (12, 7), "PyTorch fp32": (11, 9)}
    times |= dict.fromkeys((*OURS, COMPUTE), (1, 1))
    rows = [{"name": name, "threads": n, "median_ms": ms[n - 1]} for name, ms in times.items() for n in (1, 2)]
    run = ForwardRun(empty(paired=rows))
    assert [run.fastest("fp32", n) for n in (1, 2)] == [("PyTorch fp32", 11), ("OpenVINO fp32", 7)]
    for precision in ("bf16", "int8"):
        assert [run.fastest(precision, n) for n in (1, 2)] == [("ONNX Runtime int8", 8), ("OpenVINO bf16", 4)]
    left = [row for row in rows if row["name"] not in ("OpenVINO fp32", "PyTorch fp32")]
    assert ForwardRun(empty(paired=left)).fastest("fp32", 2) is None


def test_bars_are_the_medians_the_quickest_first_in_a_panel_for_each_number_of_threads(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, *rest: drawn.append(figure))
    times = {"fastlvm fp32": (9, 5), "fastlvm int8": (3, 2), "OpenVINO bf16": (8, 6), COMPUTE: (1, 1)}
    rows = [{"name": name, "threads": n, "median_ms": ms[n - 1]} for name, ms in times.items() for n in (1, 2)]
    for threads in ([1, 2], [1]):
        plot_forward.draw(empty(paired=rows, threads=threads), tmp_path / "drawn.png")
    two, one = drawn
    widths = [[bar.get_width() for bar in axis.patches] for axis in (*two.axes, *one.axes)]
    assert widths == [[2, 5, 6], [3, 9, 8], [3, 8, 9]]
    named = [label.get_text() for label in two.axes[0].get_yticklabels()]
    assert named == ["fastlvm int8", "fastlvm fp32", "OpenVINO bf16"]
    titles = [axis.get_title(loc="left").rpartition(", ")[2] for axis in (*two.axes, *one.axes)]
    assert titles == ["2 threads", "1 thread", "1 thread"]
