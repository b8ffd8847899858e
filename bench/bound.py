"""The bound of bound.cpp: built with the system's compiler for one instruction set, loaded with ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import shlex
import shutil
import subprocess
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from cases import Scan

ROOT = Path(__file__).parents[1]
# As in CMakeLists.txt.
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
FLAGS = {
    "scalar": (),
    "neon": ("-DFASTLVM_VECTOR_NEON",),
    "avx2": (*_AVX2, "-DFASTLVM_VECTOR_AVX2"),
    "avx512": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-DFASTLVM_VECTOR_AVX512"),
}


@dataclass(frozen=True)
class Work:
    """How much a scan has to do at least, in elements.

    first, later: pairs of channel and state at the token before which the state is zero, and at all others. Only a
    later one costs an exp. elements: pairs of channel and token, a softplus and a SiLU each. The same again for the
    backward pass, which recomputes the states. read, written: float32 values that go in and out.
    """

    first: int
    later: int
    elements: int
    first_back: int
    later_back: int
    elements_back: int
    read: int
    written: int

    @classmethod
    def of(cls, case: Scan) -> Work:
        batch, channels, length, state = case.shape
        elements = batch * channels * length  # of u, delta, z and the output
        first, later = batch * channels * state, batch * channels * state * (length - 1)
        projections = 2 * batch * state * length
        parameters = channels * (state + 2)  # A, D and delta_bias
        read, written = 3 * elements + projections + parameters, elements
        if not case.gradient:
            return cls(first, later, elements, 0, 0, 0, read, written)
        # The backward pass reads the inputs once more and the gradient of the output, and writes all gradients.
        return cls(first, later, elements, first, later, elements, 2 * read + elements, written + read)

    @property
    def exps(self) -> int:
        return self.later + self.later_back

    @property
    def megabytes(self) -> float:
        return 4e-6 * (self.read + self.written)


class Bound:
    """`compute(work)` and `stream(work)` of one instruction set, on `set_threads` threads."""

    def __init__(self, isa: str, folder: Path) -> None:
        self.isa = isa
        self._library = ctypes.CDLL(str(build(isa, folder)))
        for name, kinds in {
            "bound_threads": [ctypes.c_int],
            "bound_compute": [ctypes.c_int64] * 6,
            "bound_stream": [ctypes.c_void_p, ctypes.c_int64] * 2,
            "bound_read": [ctypes.c_void_p, ctypes.c_int64],
        }.items():
            getattr(self._library, name).argtypes = kinds
            getattr(self._library, name).restype = None
        self._arrays: dict[Work, tuple[np.ndarray, np.ndarray]] = {}
        self._large: dict[int, np.ndarray] = {}

    def set_threads(self, threads: int) -> None:
        self._library.bound_threads(threads)

    def compute(self, work: Work) -> None:
        self._library.bound_compute(*astuple(work)[:6])

    def stream(self, work: Work) -> None:
        if work not in self._arrays:
            self._arrays = {work: (np.ones(work.read, np.float32), np.zeros(work.written, np.float32))}
        source, target = self._arrays[work]
        self._library.bound_stream(source.ctypes.data, work.read, target.ctypes.data, work.written)

    def read(self, size: int) -> None:
        """Read an array of `size` bytes once, on huge pages where the system gives them."""
        if size not in self._large:
            self._large[size] = _on_huge_pages(size)
        array = self._large[size]
        self._library.bound_read(array.ctypes.data, array.size)

    def close(self) -> None:
        self._large.clear()
        self._library.bound_close()


def _on_huge_pages(size: int) -> np.ndarray:
    """float32 ones of `size` bytes."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.float32, size // 4)
    array[:] = 1
    return array


def compiler() -> str | None:
    """The command of the C++ compiler, as `make` looks for it."""
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)


def build(isa: str, folder: Path) -> Path:
    """The shared library of one instruction set.

    Raises:
        RuntimeError: no compiler, or it fails; the message says why.
    """
    command = compiler()
    if command is None or platform.system() == "Windows":
        raise RuntimeError("the bound is built with c++, g++ or clang++, and none is installed")
    library = folder / f"bound-{isa}.so"
    flags = ["-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"]
    names = [f"-DFASTLVM_ISA={isa}", f"-I{ROOT / 'csrc'}", *FLAGS[isa]]
    sources = [ROOT / "bench/bound.cpp", ROOT / "csrc/common/threads.cpp", ROOT / "csrc/common/cores.cpp"]
    done = subprocess.run(
        [*shlex.split(command), *flags, *names, *sources, "-o", library], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the bound could not be built for {isa}: {done.stderr.strip()[-400:]}")
    return library
