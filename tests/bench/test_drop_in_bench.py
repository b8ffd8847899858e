"""What bench_drop_in.py times is the same model, and its tables say what was not timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import drop_in_cases as cases
import drop_in_table
from drop_in_cases import CONTENDERS, DTYPES, LLAMA, MAMBAPY, PASSES, PATCHED, SLOW, STEP, TOKEN, WHOLE_STEP, Pass
from paired import Contender, Plan

pytest.importorskip("transformers", minversion="5.16", reason="transformers 5.16 or newer is missing")


@pytest.fixture(autouse=True)
def unpatched():
    yield
    cases.unpatch()


def test_a_training_step_has_the_same_loss_with_and_without_fastlvm():
    small = Pass("small", "small", 2, 6, layers=1, vocabulary=32)
    slow = cases.call_of(small, SLOW, torch.float32)()
    cases.patch()
    assert cases.call_of(small, PATCHED, torch.float32)().item() == pytest.approx(slow.item(), rel=1e-5)


def row(name, milliseconds, threads=2):
    return Contender(name, lambda: None, threads, "avx512", seconds=[milliseconds / 1e3] * 3)


def results():
    record = drop_in_table.DropIn(Plan(), [1, 2])
    record.add(TOKEN, "float32", [row(PATCHED, 10.0), row(SLOW, 25.0)])
    record.refuse(TOKEN, "float32", LLAMA, "cannot be imported: llama_cpp", 2)
    record.memory("float32", {PATCHED: {"extra": 100e6}, SLOW: {"extra": 400e6}, MAMBAPY: {"reason": "was killed"}})
    return record


def test_the_tables_have_ratios_and_the_reasons_of_what_is_missing():
    text = drop_in_table.markdown(results().data())
    assert "| a token | float32 | 2       | 25.0 (25.0 to 25.0) [2.5 x] | 10.0 (10.0 to 10.0)" in text
    assert "cannot be imported: llama_cpp" in text
    assert "100 (0.25 of transformers')" in text and "was killed" in text


def test_a_run_is_complete_with_every_pass_dtype_and_number_of_threads_timed():
    record = results()
    assert record.any and not record.complete()
    for timed in PASSES:
        for dtype in DTYPES:
            for threads in (1, 2):
                record.add(timed, dtype, [row(PATCHED, 1.0, threads)])
    assert not record.complete()
    record.memory("bfloat16", {})
    assert record.complete()


def test_what_a_target_hangs_on_is_timed_beside_the_slow_path():
    assert all(SLOW in CONTENDERS[timed] for timed in PASSES if timed.target is not None)
    assert CONTENDERS[WHOLE_STEP] == (PATCHED,) and STEP.layers < WHOLE_STEP.layers
