"""The emulation finds what a GPU would get wrong, and computes what a GPU computes."""

from __future__ import annotations

import multiprocessing
import signal

import numpy as np
import pytest
import torch

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

from fastlvm.ops import _metal  # noqa: E402
from ops.cases import Scan  # noqa: E402
from ops.mlx_arrays import to_torch  # noqa: E402

from .calls import backward, forward  # noqa: E402
from .emulator import EmulationError  # noqa: E402
from .probe import index_outside, run  # noqa: E402

ILLEGAL = {
    "a read past the end": ("y[me] = x[me + 1];", r"x\[64\] is outside \[0, 64\)"),
    "a read before the start": ("y[me] = x[me - 1];", r"x\[-1\] is outside"),
    "a write past the end": ("y[me + 1] = x[me];", r"y\[64\] is outside"),
    "a shape past its rank": ("y[me] = float(x_shape[1]);", "index 1 of 1"),
    "a write outside what is shared": ("cells[me + 1] = 0.0f; y[me] = 0.0f;", r"memory\[64\] is outside"),
    "a read of what nobody wrote": ("y[me] = cells[me];", "before it is written"),
    "a read without a barrier": ("cells[me] = x[me]; y[me] = cells[63 - me];", "no barrier|before it is written"),
    "a read after the other memory's barrier": (
        "cells[me] = x[me]; BARRIER(device); y[me] = cells[63 - me];",
        "no barrier between",
    ),
    "a write of what others still read": (
        "cells[me] = x[me]; BARRIER(threadgroup); y[me] = cells[63 - me]; cells[me] = 0.0f;",
        "no barrier between",
    ),
    "two writers": ("y[me / 2] = x[me];", "written by threads 0 and 1"),
    "results passed in device memory": ("y[me] = x[me]; y[me] += float(y[63 - me]);", "no barrier between"),
    "results passed by the other memory's barrier": (
        "y[me] = x[me]; BARRIER(threadgroup); const float z = y[63 - me]; BARRIER(device); y[me] = z;",
        "no barrier between",
    ),
    "threads that end before a barrier": ("if (me > 40) return; BARRIER(threadgroup);", "ended before a barrier"),
    "threads at two barriers": ("if (me > 40)\nBARRIER(threadgroup);\nelse\nBARRIER(threadgroup);", "two barriers"),
    "lanes that diverge": ("if (lane > 3) y[me] = metal::simd_sum(x[me]);", "diverge"),
    "lanes at two operations": (
        "if (lane > 3)\ny[me] = metal::simd_sum(x[me]);\nelse\ny[me] = metal::simd_sum(x[me]);",
        "diverge",
    ),
    "a lane beyond the simdgroup": ("y[me] = metal::simd_shuffle(float(x[me]), ushort(lane + 1));", "does not exist"),
}


@pytest.mark.parametrize("what", ILLEGAL)
def test_finds(what):
    sources, says = zip(*ILLEGAL.values(), strict=True)
    which = list(ILLEGAL).index(what)
    with pytest.raises(EmulationError, match=says[which]):
        run(*sources, which=which)


MEETING = [
    ("y[me] = x[me];", "written in threadgroups"),
    ("if (threadgroup_position_in_grid.x == 0) y[me] = 0.0f; else y[me + 64] = y[me];", "written in threadgroup"),
    ("if (threadgroup_position_in_grid.x == 1) y[me] = 0.0f; else y[me + 64] = y[me];", "read in another"),
]


@pytest.mark.parametrize("which", range(len(MEETING)))
def test_finds_threadgroups_that_meet(which):
    with pytest.raises(EmulationError, match=MEETING[which][1]):
        run(*(source for source, _ in MEETING), which=which, groups=2, size=128)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("auto p = me ? x : y;", "does not compile"),
        ("SHARED(float, more, 8193); y[me] = x[me];", "32 kB"),
        ("y[me] = metal::no_such_function(x[me]);", "no_such_function"),
    ],
)
def test_does_not_compile(source, says):
    with pytest.raises(EmulationError, match=says):
        run(source)


def test_no_conversion_to_bfloat16_goes_unsaid():
    with pytest.raises(EmulationError, match="does not compile"):
        run("y[me] = float(x[me]);", dtype=mx.bfloat16)


def test_barriers_order_what_they_are_for():
    y, launch = run(
        """cells[me] = x[me]; BARRIER(threadgroup); y[me] = cells[63 - me];
        BARRIER(device); const float z = y[63 - me]; BARRIER(device); y[me] = z + 1.0f;"""
    )
    assert np.array_equal(y, np.arange(64) + 1)
    assert launch.barriers == 3


def test_simd_operations_stay_in_their_simdgroup():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    each = x.view(2, 32)
    nothing = torch.full((2, 2), torch.nan)  # what a lane without a source gets is undefined
    wants = {
        "metal::simd_sum(v)": each.sum(1, keepdim=True).expand(2, 32),
        "metal::simd_shuffle_xor(v, ushort(5))": each[:, torch.arange(32) ^ 5],
        "metal::simd_shuffle(v, ushort(31 - lane))": each.flip(1),
        "metal::simd_broadcast(v, ushort(7))": each[:, 7:8].expand(2, 32),
        "metal::simd_prefix_inclusive_sum(v)": each.cumsum(1),
        "metal::simd_shuffle_up(v, ushort(2))": torch.cat([nothing, each[:, :-2]], dim=1),
        "metal::simd_shuffle_down(v, ushort(2))": torch.cat([each[:, 2:], nothing], dim=1),
    }
    source = "const float v = x[me];\n" + "\n".join(f"y[{64 * i} + me] = {op};" for i, op in enumerate(wants))
    y, launch = run(source, x=mx.array(x.numpy()), size=64 * len(wants))
    assert launch.simd_ops == 2 * len(wants)
    for got, (op, want) in zip(y.reshape(-1, 64), wants.items(), strict=True):
        np.testing.assert_allclose(got, want.reshape(-1).numpy(), rtol=1e-5, atol=1e-6, err_msg=op)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "float16_t"), (torch.bfloat16, "bfloat16_t")], ids=str)
def test_16_bits_are_rounded_as_torch_does(dtype, kind):
    numbers = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    exact = numbers.float()
    ulp = (torch.randn(65536, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1) * exact
    floats = torch.cat([exact, ulp, torch.tensor([65519.0, 65520.0, 1e-8, 5.96e-8, 8.94e-8, 3.4e38, -0.0, torch.inf])])
    y, _ = run(
        f"for (int i = me; i < x_shape[0]; i += 64) y[i] = float({kind}(float(x[i])));",
        x=mx.array(floats.numpy()),
        size=floats.numel(),
    )
    want = floats.to(dtype).float().numpy()
    assert np.array_equal(np.isnan(y), np.isnan(want))
    assert np.array_equal(y[~np.isnan(y)].view(np.int32), want[~np.isnan(y)].view(np.int32))


def test_counts():
    _, launch = run("y[me] = metal::exp(x[0]) + metal::log(float(x[me / 2]) + 1.0f); BARRIER(device);", groups=1)
    assert launch.exps == launch.logs == 64
    assert launch.loads["x"] == (128, 32)
    assert launch.stores["y"] == (64, 64)
    assert launch.loads["y"] == (0, 0)


@pytest.mark.parametrize("ulps", [0, 4])
def test_functions_are_off_by_so_much_and_no_more(ulps):
    x = np.linspace(-3, 3, 64, dtype=np.float32)
    y, _ = run("y[me] = metal::exp2(float(x[me]));", x=mx.array(x), ulps=ulps)
    off = (y.view(np.int32) - np.exp2(x.astype(np.float64)).astype(np.float32).view(np.int32)).tolist()
    assert (min(off), max(off)) == (-ulps, ulps)


def test_an_index_outside_an_array_of_a_thread_ends_the_process():
    process = multiprocessing.get_context("spawn").Process(target=index_outside)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGILL


BROKEN = [
    ("ssm_scan", "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);", "", 5, "no barrier|before it is"),
    ("ssm_scan", "i < steps * N", "i <= steps * N", 5, "outside|written"),
    ("ssm_scan", "mine && k < STEPS && t < end", "mine && k < STEPS", 5, "outside|written"),
    ("ssm_scan_bwd", "in_unit < per_unit", "true", 40, "outside|written"),
    (
        "ssm_scan_bwd",
        "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);",
        "",
        40,
        "no barrier|before it is",
    ),
    ("ssm_scan_bwd_short", "if (lane == 0) {", "{", 5, "written by threads"),
]


@pytest.mark.parametrize(("name", "old", "new", "length", "says"), BROKEN)
def test_finds_a_kernel_that_was_broken(name, old, new, length, says, monkeypatch):
    source = _metal.source
    assert old in source(name)
    monkeypatch.setattr(_metal, "source", lambda n: source(n).replace(old, new) if n == name else source(n))
    case = Scan(length=length, state=16, channels=3)  # one place of a threadgroup's is left over
    with pytest.raises(EmulationError, match=says):
        forward(case.inputs())
        backward(case.inputs(), case.cotangents())


def test_memory_is_that_of_the_arrays():
    """No copy on the way in: a view's strides are what the kernel gets."""
    x = mx.arange(128, dtype=mx.float32).reshape(64, 2)[:, 1]
    y, _ = run("y[me] = x[me * x_strides[0]];", x=x)
    assert np.array_equal(y, to_torch(x).numpy())
