"""FAISS is loaded with matrix products for the processor, and the environment stays as it was."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastlvm import _C
from fastlvm.retrieval import blas

CORE = "OPENBLAS_CORETYPE"
SAID = """
import ctypes, os
from pathlib import Path
from fastlvm.retrieval.blas import faiss
maps = Path("/proc/self/maps").read_text().splitlines()
libraries = {line.split()[-1] for line in maps if "faiss" in line and "openblas" in line}
core = ""
for library in libraries:
    name = ctypes.CDLL(library).openblas_get_corename
    name.restype = ctypes.c_char_p
    core = name().decode()
print(core, os.environ.get("OPENBLAS_CORETYPE"), faiss.IndexFlatIP(4).d)
"""


def said(**environment):
    kept = {name: value for name, value in os.environ.items() if name != CORE}
    run = subprocess.run([sys.executable, "-c", SAID], env=kept | environment, check=True, capture_output=True)
    return run.stdout.decode().rstrip("\n").split(" ")


needs_maps = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@needs_maps
def test_the_kernels_are_those_of_the_processor_and_the_environment_stays():
    core, environment, dim = said()
    assert (environment, dim) == ("None", "4")
    if not core:
        pytest.skip("this FAISS brings no OpenBLAS of its own")
    if "avx512" in _C.isas():
        assert core == "SkylakeX"


@needs_maps
def test_kernels_that_are_named_already_are_kept():
    core, environment, _ = said(OPENBLAS_CORETYPE="Haswell")
    assert environment == "Haswell" and core in ("Haswell", "")


def test_nothing_else_is_there():
    with pytest.raises(AttributeError, match="numpy"):
        blas.numpy  # noqa: B018
