"""How much memory a pass takes at its peak, in a process of its own.

    python bench/memory.py BATCH CHANNELS LENGTH STATE THREADS      the backward of ssm_scan
    python bench/memory.py LOSS ROWS DIM DTYPE THREADS              forward and backward of a loss of nce_losses.py
    python bench/memory.py training NAME DTYPE THREADS      a training step of drop_in_cases.py

The peak of the resident set (VmHWM, set back to the present by /proc/self/clear_refs) during the pass, less the
resident set before it, when the inputs (and for a backward the output) are there and the pages the allocator holds have
gone back. The gradients themselves are part of the figure. Linux only.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from cases import Scan
from nce_losses import Nce, with_gradients
from rivals import available_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(case: Scan, threads: int) -> dict[str, Any]:
    """extra and arrays (inputs + outputs) in bytes; or the reason why there are none."""
    return _in_a_process(*case.shape, threads)


def of_loss(name: str, case: Nce, threads: int) -> dict[str, Any]:
    """extra in bytes, over the inputs; or the reason why there is none."""
    return _in_a_process(name, case.rows, case.dim, str(case.dtype).removeprefix("torch."), threads)


def of_training(name: str, dtype: str, threads: int) -> dict[str, Any]:
    """extra in bytes, over the weights; the gradients are part of it."""
    return _in_a_process("training", name, dtype, threads)


def too_large(wanted: float) -> str | None:
    """Why a call that takes so many bytes is not made here, if it is not."""
    free = available_memory()
    if free is None or wanted < 0.9 * free:
        return None
    return f"it takes {wanted / 2**30:.1f} GiB and {free / 2**30:.1f} are free"


def _in_a_process(*arguments: str | int) -> dict[str, Any]:
    if not _CLEAR.exists():
        return {"reason": "the peak of a process can be set back on Linux only"}
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"reason": (done.stderr.strip().splitlines() or ["the process was killed"])[-1]}
    return json.loads(done.stdout)


def _backward(case: Scan, threads: int) -> dict[str, Any]:
    import fastlvm

    torch.set_num_threads(threads)
    fastlvm.set_num_threads(threads)
    _once(Scan(1, 64, 8, case.state, gradient=True))  # starts threads, loads code
    return _once(case)


def _once(case: Scan) -> dict[str, Any]:
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


def _loss(name: str, case: Nce, threads: int) -> dict[str, Any]:
    import fastlvm

    torch.set_num_threads(threads)
    fastlvm.set_num_threads(threads)
    with_gradients(name, Nce(64, case.dim, case.dtype))()  # starts threads, loads code
    call = with_gradients(name, case)
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    before = _kilobytes("VmRSS")
    call()
    return {"extra": 1024 * max(0, _kilobytes("VmHWM") - before)}


def _training(name: str, dtype: str, threads: int) -> dict[str, Any]:
    import drop_in_cases
    import fastlvm

    torch.set_num_threads(threads)
    fastlvm.set_num_threads(threads)
    if name == drop_in_cases.PATCHED:
        drop_in_cases.patch()
    call = drop_in_cases.call_of(drop_in_cases.STEP, name, drop_in_cases.DTYPES[dtype])
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    before = _kilobytes("VmRSS")
    call()
    return {"extra": 1024 * max(0, _kilobytes("VmHWM") - before)}


def _kilobytes(field: str) -> int:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    *given, threads = sys.argv[1:]
    if given[0].isdigit():
        found = _backward(Scan(*map(int, given), gradient=True), int(threads))
    elif given[0] == "training":
        found = _training(given[1], given[2], int(threads))
    else:
        name, rows, dim, dtype = given
        found = _loss(name, Nce(int(rows), int(dim), getattr(torch, dtype)), int(threads))
    print(json.dumps(found))
