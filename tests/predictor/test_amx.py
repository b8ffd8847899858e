"""AMX: whole models with it and without, and what it asks of the system."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fastlvm import _C

from .natives import L2_NORM, LAST, Case, Products, forward, linear, mamba, pinned, random_contexts, random_weights

# A tile of weights is 64 inputs in int8 and 32 in bfloat16: whole ones, a rest, and a dt_proj of 64 groups.
SIZES = ((256, 512, 256), (300, 610, 40))  # dim, inner, rank
WITH, WITHOUT = Products("avx512", 2), Products("avx512", 1)

_PERMITTED = """
import ctypes, sys
import numpy as np
from fastlvm import _C
isa, level = sys.argv[1], int(sys.argv[2])
_C.set_isa(isa)
_C.set_extension_level(level)
weight = np.ones((16, 256), np.int8), np.ones(16, np.float32), None
out = np.empty((1, 16), np.float32)
_C.Model(1, 256, [("linear", {"weight": weight}), ("last", {})]).run(np.ones((1, 1, 256), np.float32), out)
state = ctypes.c_uint64(0)
assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(state)) == 0  # arch_prctl(ARCH_GET_XCOMP_PERM)
print(state.value >> 18 & 1)
"""


def _has_amx():
    if "avx512" not in _C.isas():
        return False
    with pinned(WITH) as names:
        return names["int8"] == "avx512_amx"


pytestmark = pytest.mark.skipif(not _has_amx(), reason="no AMX here, or the system keeps its registers back")


def case_of(sizes):
    dim, inner, rank = sizes
    blocks = [mamba(f"m{i}", dim=dim, inner=inner, state=24, rank=rank) for i in range(2)]
    return Case([*blocks, LAST, linear("head", dim, dim), L2_NORM], dim=dim)


@pytest.mark.parametrize("windows", (1, 2, 3, 7, 70))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_int8_predictions_are_those_of_vnni_to_the_bit(sizes, windows):
    case = case_of(sizes)
    model, contexts = forward(case, random_weights(case.plan), "int8"), random_contexts(windows, case)
    with pinned(WITHOUT):
        wanted = model(contexts)
    with pinned(WITH):
        np.testing.assert_array_equal(model(contexts), wanted)


@pytest.mark.parametrize("precision", ("int8", "bf16"))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_window_has_the_same_bits_alone_and_among_others(sizes, precision):
    case = case_of(sizes)
    model, contexts = forward(case, random_weights(case.plan), precision), random_contexts(70, case)
    with pinned(WITH):
        together = model(contexts)
        for w in (0, 31, 69):
            np.testing.assert_array_equal(model(contexts[w : w + 1])[0], together[w])


@pytest.mark.parametrize(
    ("isa", "level", "asks"), (("scalar", 2, "0"), ("avx2", 2, "0"), ("avx512", 1, "0"), ("avx512", 2, "1"))
)
def test_its_registers_are_asked_for_where_it_is_used_alone(isa, level, asks):
    done = subprocess.run(
        [sys.executable, "-c", _PERMITTED, isa, str(level)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == asks
