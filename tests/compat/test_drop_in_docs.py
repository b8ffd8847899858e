"""The snippets of docs/drop-in.md run as they are written: those marked `before` with the stand-ins installed, where
they import an original, and with the output of the snippet after them."""

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


def _output(before, code):
    if "transformers" in code:
        pytest.importorskip("transformers")
    first = ""
    if before and re.search("mamba_ssm|causal_conv1d", code):
        first = "import fastlvm.compat\nfastlvm.compat.install(force=True)\n"
    result = subprocess.run(
        [sys.executable, "-c", first + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_there_are_snippets():
    assert [bool(before) for before, _ in SNIPPETS] == 3 * [True, False] + 3 * [False]


@pytest.mark.parametrize("i", range(0, 6, 2), ids=["mamba_ssm", "transformers", "training"])
def test_before_and_after_give_the_same(i):
    before, after = (_output(*snippet) for snippet in SNIPPETS[i : i + 2])
    assert before == after != ""


@pytest.mark.parametrize("i", range(6, len(SNIPPETS)))
def test_a_snippet_runs(i):
    _output(*SNIPPETS[i])


def test_the_versions_are_those_in_the_text():
    for module in (causal_conv1d, mamba_ssm):
        api = module.__version__.removesuffix(fastlvm.__version__)
        assert f"`{api}" in TEXT
