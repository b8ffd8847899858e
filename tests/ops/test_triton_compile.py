"""Every kernel compiles ahead of time for every GPU, and spills no register where it is tuned for one."""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("triton")

from . import compiled_calls
from .device import ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="needs no GPU, and time on one is dear")

TUNED = [call.name for call in compiled_calls.CALLS if call.tuned]
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a program can have
# Bytes that a thread keeps in local memory all the same. _walk has 16 warps at N = 256, to which 128 registers are all
# there are.
SPILLS = {"_walk": 72, "_long_bwd": 72}
found = functools.cache(compiled_calls.in_a_process)


@pytest.mark.parametrize("target", SHARED)
def test_compiles_and_fits_shared_memory(target):
    rows = found(target)["rows"]
    called = {row["call"] for row in rows}
    assert called == {call.name for call in compiled_calls.CALLS if call.everywhere or target == "sm_90"}
    assert not [row for row in rows if row["shared"] > SHARED[target]]
    assert all(row["registers"] for row in rows)


@pytest.mark.parametrize("call", TUNED)
def test_spills_nothing_where_it_is_tuned(call):
    """But where the launcher itself limits the registers, for more programs beside each other: the table says so."""
    rows = [row for row in found("sm_90")["rows"] if row["call"] == call and row["dtype"] == "bf16"]
    assert rows
    free = [(row["kernel"], row["spilled"]) for row in rows if row["limit"] is None]
    assert not [(name, spilled) for name, spilled in free if spilled > SPILLS.get(name, 0)]


def test_the_table_has_every_call():
    """`python -m ops.compiled_calls --write` in the folder tests makes it anew."""
    text = compiled_calls.TABLE.read_text()
    missing = [call.name for call in compiled_calls.CALLS if f"| {call.name} |" not in text]
    assert not missing
