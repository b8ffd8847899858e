"""The snippets of docs/export.md run as they are written, in turn, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python ?([\w ]*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
AFTER = {"model.pt2": 0, "plain.pt2": 2}  # the snippet that writes a file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


def _run(kind, code, folder):
    for name, writer in AFTER.items():
        if f'load("{name}")' in code and not (folder / name).exists():
            _run(*SNIPPETS[writer], folder)
    first = "import sys\nsys.modules['fastlvm'] = None\n" if kind == "without fastlvm" else ""
    run = [sys.executable, "-c", first + code]
    result = subprocess.run(run, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stderr


def test_there_are_snippets():
    assert [kind for kind, _ in SNIPPETS] == ["", "", "", "without fastlvm", "onnx", "slow"]


def _marked(kind):
    return [pytest.mark.slow] if kind == "slow" else []


@pytest.mark.parametrize(
    ("kind", "code"), [pytest.param(*s, marks=_marked(s[0]), id=f"snippet-{i}") for i, s in enumerate(SNIPPETS)]
)
def test_a_snippet_runs(kind, code, folder):
    for package in ("onnx", "onnxscript") if kind == "onnx" else ():
        pytest.importorskip(package, reason=f"{package} is not installed")
    _run(kind, code, folder)
