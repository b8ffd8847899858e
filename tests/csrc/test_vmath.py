"""The vector functions stay within their bounds of float64 on every instruction set that runs here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastlvm import _C

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="make and its shell")
def test_every_float_of_the_range_is_within_the_bound(tmp_path):
    """exp and exp2 over every float, the others over every 11th; beyond their ranges by samples."""
    compiler = os.environ.get("CXX", "g++")
    missing = [tool for tool in ("make", compiler) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not found")
    program = tmp_path / "vmath/vmath_accuracy"
    make = ["make", "-f", "tests/csrc/native.mk", "-j2", f"OUT={tmp_path}", f"CXX={compiler}", program]
    built = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program, "quick"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for name in ("exp ", "exp2 "):
        assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith(name)] == _C.isas()
