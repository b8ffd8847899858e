"""The snippets of docs/drop-in.md run as they are written: those marked `before` with the stand-ins installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastlvm
from fastlvm.compat import causal_conv1d, mamba_ssm

TEXT = (Path(__file__).parents[2] / "docs" / "drop-in.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python( before)?\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_there_are_snippets():
    assert [bool(before) for before, _ in SNIPPETS] == [True, False, False, False, True, False, False]


@pytest.mark.parametrize("before, code", SNIPPETS, ids=[f"snippet-{i}" for i in range(len(SNIPPETS))])
def test_a_snippet_runs(before, code):
    first = "import fastlvm.compat\nfastlvm.compat.install(force=True)\n" if before else ""
    result = subprocess.run(
        [sys.executable, "-c", first + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_versions_are_those_in_the_text():
    for module in (causal_conv1d, mamba_ssm):
        api = module.__version__.removesuffix(fastlvm.__version__)
        assert f"`{api}" in TEXT
