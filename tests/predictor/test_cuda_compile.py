"""The kernels of the GPU predictor compile for every GPU, and spill nothing on the one that they are tuned for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def compiled(target):
    """Name, registers, spilled and shared bytes of every kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "predictor.test_cuda_compile", target]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=() if name == "sm_90" else pytest.mark.slow) for name in TARGETS]
)
def test_compiles(target):
    found = compiled(target)
    assert {name for name, *_ in found} == {
        "_linear",
        "_few",
        "_scan",
        "_norms",
        "_mixed",
        "_scores",
        "_best_tiles",
        "_best_rows",
    }
    if target == "sm_90":
        assert not [kernel for kernel in found if kernel[2]], "a kernel spills"
        assert max(shared for *_, shared in found) <= 227 << 10


def main(target):
    import torch
    from fastlvm.kernels.triton import early, layers, rank

    from ops import compiled as compiler

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype)

    dim, inner, states, low, length, k, tile = 768, 1536, 128, 48, 5, 50, 128
    with compiler.compiling(target) as found, early.early():
        conv = layers.Conv(empty(inner, 4), empty(inner))
        for dtype in (torch.bfloat16, torch.float32):
            for n in (1, 8, 40):  # rows in 16, 64 and more
                h = empty(n * length, dim)
                xz = layers.linear(h, empty(2 * inner, dim, dtype=dtype), norm=empty(dim), eps=1e-5)
                x_proj = empty(low + 2 * states, inner, dtype=dtype)
                parts = layers.linear(xz, x_proj, conv=conv, positions=length, splits=4)
                A = empty(inner, states, dtype=torch.float16)
                y = layers.scan(xz, parts, conv, empty(inner, low, dtype=dtype), empty(inner), A, empty(inner), length)
                layers.linear(y, empty(dim, inner, dtype=dtype), residual=h)
        layers.norms(h, ("unit", "l2"), "rms", empty(dim), None, 1e-5)
        layers.mixed(empty(1, length, dim), empty(length), empty(1, dim), True)
        # what other models and spaces want
        layers.linear(h, empty(dim, dim, dtype=torch.float16), empty(dim), gelu=True)
        layers.linear(h[:4], empty(dim, dim), empty(dim))
        layers.norms(h, ("l2",))
        layers.norms(h, ("unit",))
        layers.norms(h, (), "l2")
        layers.norms(h, (), "layer", empty(dim), empty(dim), 1e-5)
        layers.mixed(empty(1, length, dim), empty(length))
        few, dt = empty(36, 2 * 64), empty(64, 5, dtype=torch.bfloat16)
        narrow = layers.Conv(empty(64, 3), empty(64))
        for positions, last in ((18, True), (18, False), (6, True)):
            layers.scan(few, empty(1, 36, 31), narrow, dt, empty(64), empty(64, 13), empty(64), positions, last)
        tiles = torch.empty(-(-584_545 // tile), dtype=torch.int32)
        rank.score_rows(empty(1000, dim, dtype=torch.float16), empty(dim), empty(584_545), tiles, tile)
        rank.best_rows(empty(584_545), tiles, torch.empty(k, dtype=torch.int32), empty(k), tile)
    print(json.dumps([[kernel.name, kernel.registers, kernel.spilled, kernel.shared] for kernel in found]))


if __name__ == "__main__":
    main(*sys.argv[1:])
