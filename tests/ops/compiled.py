"""Compiles what a launcher of Triton kernels would launch, for a GPU that need not be there.

Needs a process without TRITON_INTERPRET: test_triton_compile.py starts `python -m ops.compiled_calls`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Kernel(NamedTuple):
    """What a compiler made of one kernel. `spilled` is in bytes a thread, `shared` in bytes a block.

    `limit` is how many registers the launcher allows, if it says.
    """

    name: str
    registers: int
    spilled: int
    shared: int
    warps: int
    asm: Any
    limit: int | None = None


class _Absent:
    """Stands for the driver of a GPU: says what to compile for."""

    def __init__(self, target: str):
        self.target, self.device = TARGETS[target], 1000 + list(TARGETS).index(target)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(target: str) -> Iterator[list[Kernel]]:
    """Inside, a launch compiles its kernel and does not run it; gives the list of the kernels so far, each once."""
    found: dict[str, Kernel] = {}
    result: list[Kernel] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if TARGETS[target].backend == "hip":  # has no such option; launchers ask torch whether it was built for it
            kwargs.pop("maxnreg", None)
        limit = kwargs.get("maxnreg")
        made = original(self, *args, grid=grid, warmup=True, **kwargs)
        if made.hash not in found:
            found[made.hash] = _described(target, made)._replace(limit=limit)
            result.append(found[made.hash])
        return made

    active = triton.runtime.driver
    before = active._active
    active.set_active(_Absent(target))
    JITFunction.run = run
    try:
        yield result
    finally:
        JITFunction.run = original
        active._active = before


def kernels(target: str, launch: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Kernel]:
    """The kernels that `launch(*args, **kwargs)` launches, compiled for `target`."""
    with compiling(target) as found:
        launch(*args, **kwargs)
    return found


def _described(target: str, made: Any) -> Kernel:
    meta = made.metadata
    if TARGETS[target].backend == "hip":
        text = made.asm["amdgcn"]
        spilled = [int(n) for n in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", text)]
        registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s*(\d+)", text))
        return Kernel(meta.name, registers, 4 * sum(spilled), meta.shared, meta.num_warps, made.asm)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        tool = [_TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    spilled = numbers["STACK"] + numbers["LOCAL"]
    return Kernel(meta.name, numbers["REG"], spilled, meta.shared, meta.num_warps, made.asm)


def versions(target: str) -> dict[str, str]:
    """Of Triton and, for NVIDIA, of its assembler."""
    found = {"triton": triton.__version__}
    if TARGETS[target].backend == "cuda":
        tool = _TOOLS / ("ptxas" if TARGETS[target].arch < 100 else "ptxas-blackwell")
        said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
        found["ptxas"] = re.search(r"\bV([\d.]+)", said)[1]
    return found


def sass(kernel: Kernel) -> str:
    """Machine code of a kernel for NVIDIA."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        return subprocess.run([_TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
