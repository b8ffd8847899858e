"""`make conformance` on checkouts in miniature: what is rewritten, how tests are judged, and how it ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from textwrap import dedent

import pytest

from . import peers

SCAN_SOURCE = """
    import torch
    import selective_scan_cuda
    from mamba_ssm.ops.triton.ssd_chunk_state import chunk_state
    raise RuntimeError("of the checkout's sources only imports and references are run")

    def selective_scan_ref(u):
        return torch.full_like(u, 7.0)
"""
SCAN_TESTS = """
    import os
    import time

    import pytest
    import torch

    from mamba_ssm import Mamba3
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
    from mamba_ssm.ops.triton.ssd_chunk_state import chunk_state


    def scan(u, A=None):
        A = -torch.ones(2, 3) if A is None else A
        return selective_scan_fn(u, torch.ones(1, 2, 4), A, torch.ones(2, 3), torch.ones(2, 3))


    def test_good():
        device = "cuda"
        assert scan(torch.ones(1, 2, 4, device=device)).device.type == 'cuda'


    def test_reference():
        assert torch.equal(selective_scan_ref(torch.ones(2)), torch.full((2,), 7.0))


    @pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA required")
    def test_cuda_required():
        torch.cuda.synchronize()
        assert torch.nn.Linear(2, 2).cuda()(torch.ones(2).cuda()).shape == (2,)


    @pytest.mark.parametrize("rank", [0, 1])
    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs required")
    def test_two_devices(rank):
        pass


    def test_class():
        with pytest.raises(Exception):
            Mamba3(8)


    def test_function():
        chunk_state(torch.ones(1))


    def test_inside():
        from mamba_ssm.ops.tilelang import mimo


    def test_complex():
        scan(torch.ones(1, 2, 4), -torch.ones(2, 3, dtype=torch.complex64))


    def test_name_of_gpu():
        torch.cuda.get_device_name()


    def test_skip():
        pytest.skip()


    def test_xfail():
        pytest.xfail("saw nothing of it")


    def test_wrong():
        assert torch.equal(scan(torch.ones(1, 2, 4)), torch.zeros(1, 2, 4))


    def test_refused():
        scan(torch.ones(1, 3, 4))


    def test_keyword():
        selective_scan_fn(torch.ones(1, 2, 4), prev_state=None)


    def test_endless():
        time.sleep(600)


    def test_deadly():
        os._exit(3)


    def test_after():
        pass
"""
ROWS = {  # passed, failed, not applicable, not run
    "mamba/tests/benchmark_scan.py": [0, 0, 1, 0],
    "mamba/tests/ops/test_scan.py": [4, 4, 9, 1],
    "mamba/tests/test_mimo.py": [0, 0, 1, 0],
    "all": [4, 4, 11, 1],
}
MISSING = "which fastlvm does not have"
NOT_APPLICABLE = [
    (2, "the test skips it: two GPUs required"),
    (1, f"needs mamba_ssm.Mamba3, {MISSING}"),
    (1, f"needs mamba_ssm.ops.triton.ssd_chunk_state.chunk_state, {MISSING}"),
    (1, f"needs mamba_ssm.ops.tilelang, {MISSING}"),
    (1, "selective_scan_fn: A is complex; fastlvm has the real scan only, pass a real A"),
    (1, "needs a GPU: "),
    (1, "the test skips it"),
    (1, "the test expects to fail: saw nothing of it"),
    (1, "needs tilelang_of_nobody, which is not installed"),
    (1, "a script, no tests in it"),
]
FAILED = {
    "test_wrong": "assert torch.equal(scan(torch.ones(1, 2, 4)), torch.zeros(1, 2, 4)): AssertionError",
    "test_refused": "ValueError: ssm_scan: delta has shape (1, 2, 4)",
    "test_keyword": "TypeError: selective_scan_fn() got an unexpected keyword argument 'prev_state'",
    "test_deadly": "the process died: exit code 3",
}


def _write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
    return folder


def _run(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, peers.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    """A checkout of mamba, and what running its tests gave."""
    folder = tmp_path_factory.mktemp("peers") / "mamba"
    _write(
        folder,
        {
            "mamba_ssm/__init__.py": "raise RuntimeError('the original was imported')",
            "mamba_ssm/ops/selective_scan_interface.py": SCAN_SOURCE,
            "mamba_ssm/ops/triton/ssd_chunk_state.py": "",
            "tests/ops/test_scan.py": SCAN_TESTS,
            "tests/test_mimo.py": "import tilelang_of_nobody\n\n\ndef test_mimo():\n    pass\n",
            "tests/benchmark_scan.py": "raise RuntimeError('a script was run')",
        },
    )
    return folder, _run(folder, "--limit", 4)


def _rows(text):
    rows = re.findall(r"^(\S+) +(\d+) +(\d+) +(\d+) +(\d+)$", text, flags=re.MULTILINE)
    return {name: list(map(int, counts)) for name, *counts in rows}


def _reasons(text, title):
    """Number of tests, reason and named tests of every line below a title."""
    lines = text.partition(f"\n{title}:\n")[2].split("\n\n")[0].splitlines()
    found = []
    for line in lines:
        if line.startswith("      "):
            found[-1][2].append(line.rpartition("::")[2])
        else:
            number, _, rest = line.strip().partition(" of ")
            found.append((int(number), rest.partition(": ")[2], []))
    return found


@pytest.mark.slow
def test_every_test_is_counted_where_it_belongs(mamba):
    _, result = mamba
    assert _rows(result.stdout) == ROWS, result.stdout + result.stderr
    assert result.returncode == 1


@pytest.mark.slow
def test_what_does_not_apply_has_its_reason(mamba):
    found = _reasons(mamba[1].stdout, "not applicable")
    assert len(found) == len(NOT_APPLICABLE)
    for number, reason in NOT_APPLICABLE:
        exact = [entry for entry in found if entry[0] == number and entry[1].startswith(reason)]
        assert exact, reason


@pytest.mark.slow
def test_what_fails_has_its_line_and_its_name(mamba):
    found = {name: reason for _, reason, names in _reasons(mamba[1].stdout, "failed") for name in names}
    assert found.keys() == FAILED.keys()
    for name, reason in FAILED.items():
        assert reason in found[name]
    line = 1 + dedent(SCAN_TESTS).splitlines().index(
        "    assert torch.equal(scan(torch.ones(1, 2, 4)), torch.zeros(1, 2, 4))"
    )
    assert found["test_wrong"].startswith(f"line {line}, ")


@pytest.mark.slow
def test_what_takes_too_long_is_not_run(mamba):
    assert [entry[:2] for entry in _reasons(mamba[1].stdout, "not run")] == [(1, "over 4 s")]


@pytest.mark.slow
def test_the_checkout_stays_as_it_is(mamba):
    folder, _ = mamba
    assert (folder / "tests/ops/test_scan.py").read_text(encoding="utf-8") == dedent(SCAN_TESTS)
    assert not list(folder.rglob("*.pyc"))


@pytest.mark.slow
def test_a_folder_of_checkouts_is_run_and_nothing_failed_is_0(tmp_path):
    good = "from causal_conv1d import causal_conv1d_fn\n\n\ndef test_good():\n    assert causal_conv1d_fn\n"
    files = {"causal_conv1d/__init__.py": "", "tests/test_good.py": good, "tests/speed.py": ""}
    _write(tmp_path / "causal-conv1d", files)
    _write(tmp_path, {"notes/tests/test_notes.py": "def test_bad():\n    assert False\n"})
    result = _run(tmp_path, tmp_path / "nowhere")
    assert _rows(result.stdout) == {
        "causal-conv1d/tests/speed.py": [0, 0, 1, 0],
        "causal-conv1d/tests/test_good.py": [1, 0, 0, 0],
        "all": [1, 0, 1, 0],
    }
    assert "nowhere is not there" in result.stdout
    assert result.returncode == 0


@pytest.mark.parametrize("arguments, says", [([], "no checkout is given"), (["nowhere"], "nowhere is not there")])
def test_without_a_checkout_there_is_nothing_to_do(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert peers.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("skipped: ") and says in out


@pytest.mark.parametrize("files", [{}, {"mamba_ssm/__init__.py": ""}, {"tests/test_x.py": ""}], ids=str)
def test_a_folder_that_is_no_checkout_is_refused(files, tmp_path, capsys):
    _write(tmp_path, files)
    assert peers.main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_checkouts_of_one_name_are_refused(tmp_path, capsys):
    for place in ("a", "b"):
        _write(tmp_path / place / "mamba", {"mamba_ssm/__init__.py": "", "tests/test_x.py": ""})
    assert peers.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "two checkouts are called mamba" in capsys.readouterr().err


@pytest.mark.parametrize("source, wanted", [
    ('device = "cuda"\n', 'device = "cpu"\n'),
    ("x.to('cuda:0'); y = f('cuda', \"cuda\")\n", "x.to('cpu'); y = f('cpu', \"cpu\")\n"),
    ('"""cuda"""\nx = "cuda is here"  # "cuda"\n', None),
    ("torch.cuda.synchronize()\ncuda = 'CUDA'\n", None),
    ('broken = ("cuda"\n', None),
])  # fmt: skip
def test_the_literal_of_the_device_is_rewritten_and_nothing_else(source, wanted):
    assert peers.rewritten(source, "cpu") == (source if wanted is None else wanted)
