"""How much memory the backward pass takes at its peak, in a process of its own.

    python bench/memory.py BATCH CHANNELS LENGTH STATE THREADS

The peak of the resident set (VmHWM, set back to the present by /proc/self/clear_refs) during torch.autograd.grad, less
the resident set before it, when the inputs and the output are there and the pages the allocator holds have gone back.
The gradients themselves are part of the figure. Linux only.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cases import Scan

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(case: Scan, threads: int) -> dict[str, Any]:
    """extra and arrays (inputs + outputs) in bytes; or the reason why there are none."""
    if not _CLEAR.exists():
        return {"reason": "the peak of a process can be set back on Linux only"}
    command = [sys.executable, __file__, *map(str, case.shape), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"reason": (done.stderr.strip().splitlines() or ["the process was killed"])[-1]}
    return json.loads(done.stdout)


def _backward(case: Scan, threads: int) -> dict[str, Any]:
    import torch

    import fastlvm

    torch.set_num_threads(threads)
    fastlvm.set_num_threads(threads)
    _once(Scan(1, 64, 8, case.state, gradient=True), torch)  # starts threads, loads code
    return _once(case, torch)


def _once(case: Scan, torch: Any) -> dict[str, Any]:
    import fastlvm

    tensors, cotangent = case.tensors(), case.cotangent()
    out = fastlvm.ssm_scan(*tensors, delta_softplus=True)
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    before = _kilobytes("VmRSS")
    gradients = torch.autograd.grad(out, tensors, cotangent)
    extra = _kilobytes("VmHWM") - before
    arrays = sum(4 * t.numel() for t in (*tensors, cotangent, *gradients))
    return {"extra": 1024 * max(0, extra), "arrays": arrays}


def _kilobytes(field: str) -> int:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    *shape, threads = map(int, sys.argv[1:])
    print(json.dumps(_backward(Scan(*shape, gradient=True), threads)))
