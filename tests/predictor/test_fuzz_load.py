"""A few hundred damaged artifacts; `make fuzz-load` loads thousands under AddressSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_damaged_artifacts_load_or_say_what_is_wrong():
    command = [sys.executable, "-m", "predictor.fuzz_load", "200"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 artifacts" in done.stdout and "findings: 0" in done.stdout
