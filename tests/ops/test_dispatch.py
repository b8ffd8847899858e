"""What runs where, why not, and how to pin it."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastlvm
from fastlvm import _C
from fastlvm.ops import dispatch

from .cases import Conv, Scan

OPS = [(fastlvm.ssm_scan, Scan()), (fastlvm.causal_conv1d, Conv())]
IDS = ["ssm_scan", "causal_conv1d"]


@pytest.fixture(autouse=True)
def no_pin(monkeypatch):
    monkeypatch.delenv("FASTLVM_BACKEND", raising=False)


@pytest.fixture
def chosen(monkeypatch):
    """Names of the backends that ran, in order."""
    ran = []
    for op in IDS:
        for name, module in dispatch._OPS[op].backends.items():

            def run(*args, name=name, original=module.run):
                ran.append(name)
                return original(*args)

            monkeypatch.setattr(module, "run", run)
    return ran


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """As where a user is: Triton's kernels run on a GPU or not at all."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(("op", "case"), OPS, ids=IDS)
def test_auto_takes_the_first_that_can(op, case, chosen, monkeypatch):
    op(**case.inputs())
    monkeypatch.setattr(dispatch._OPS[op.__name__].backends["cpu"], "supports", lambda *args: (False, "on holiday"))
    op(**case.inputs())
    assert chosen == ["cpu", "reference"]


@pytest.mark.parametrize(("op", "case"), OPS, ids=IDS)
def test_a_named_backend_runs_or_says_why_not(op, case, chosen, monkeypatch):
    op(**case.inputs(), backend="reference")
    assert chosen == ["reference"]
    monkeypatch.setattr(dispatch._OPS[op.__name__].backends["cpu"], "supports", lambda *args: (False, "on holiday"))
    with pytest.raises(ValueError, match="backend='cpu' cannot run this call: on holiday"):
        op(**case.inputs(), backend="cpu")
    with pytest.raises(ValueError, match="backend='metal' is unknown; wants auto, cpu, triton, mlx, reference"):
        op(**case.inputs(), backend="metal")
    assert chosen == ["reference"]


def test_no_backend_at_all_gives_every_reason(monkeypatch):
    for name, module in dispatch._OPS["ssm_scan"].backends.items():
        monkeypatch.setattr(module, "supports", lambda *args, name=name: (False, f"{name} is out"))
    with pytest.raises(
        ValueError, match="cpu: cpu is out; triton: triton is out; mlx: mlx is out; reference: reference is out"
    ):
        fastlvm.ssm_scan(**Scan().inputs())


@pytest.mark.parametrize(("op", "case"), OPS, ids=IDS)
def test_environment_pins_auto_and_yields_to_a_name(op, case, chosen, monkeypatch):
    monkeypatch.setenv("FASTLVM_BACKEND", "reference")
    op(**case.inputs())
    op(**case.inputs(), backend="cpu")
    assert chosen == ["reference", "cpu"]
    monkeypatch.setenv("FASTLVM_BACKEND", "gpu")
    with pytest.raises(ValueError, match="FASTLVM_BACKEND=gpu is unknown; wants auto, cpu, triton, mlx, reference"):
        op(**case.inputs())
    monkeypatch.setenv("FASTLVM_BACKEND", "auto")
    op(**case.inputs())
    assert chosen[-1] == "cpu"


def test_a_pinned_backend_that_cannot_run_does_not_fall_back(monkeypatch):
    monkeypatch.setenv("FASTLVM_BACKEND", "cpu")
    inputs = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in Scan().inputs().items()}
    with pytest.raises(ValueError, match="FASTLVM_BACKEND=cpu cannot run this call: arrays are on meta"):
        fastlvm.ssm_scan(**inputs)


@pytest.mark.parametrize(("op", "case"), OPS, ids=IDS)
def test_explain_lists_every_backend(op, case, chosen, isa):
    found = fastlvm.explain(op.__name__, **case.inputs(), return_final_state=True)
    assert [(v.backend, v.ok) for v in found] == [("cpu", True), ("triton", False), ("mlx", False), ("reference", True)]
    assert isa in found[0].reason
    assert str(found).splitlines()[0].split()[:2] == ["cpu", "yes"]
    assert "wants a GPU" in found[1].reason
    assert "wants mlx arrays" in found[2].reason
    backend, ok, reason = found[3]
    assert (backend, ok) == ("reference", True)
    assert "PyTorch" in reason
    assert chosen == []


def test_explain_says_why_not(monkeypatch):
    inputs = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in Scan().inputs().items()}
    cpu, *_, reference = fastlvm.explain("ssm_scan", **inputs)
    assert (cpu.ok, reference.ok) == (False, True)
    assert "meta" in cpu.reason
    monkeypatch.setenv("FASTLVM_BACKEND", "reference")
    cpu, *_, reference = fastlvm.explain("ssm_scan", **Scan().inputs())
    assert (cpu.ok, reference.ok) == (False, True)
    assert "FASTLVM_BACKEND=reference" in cpu.reason


def test_explain_refuses_what_the_op_refuses():
    with pytest.raises(ValueError, match="op 'scan' is unknown; wants one of"):
        fastlvm.explain("scan")
    inputs = Scan().inputs()
    with pytest.raises(ValueError, match="delta has shape"):
        fastlvm.explain("ssm_scan", **{**inputs, "delta": inputs["delta"][:1]})
    with pytest.raises(TypeError, match="missing a required argument"):
        fastlvm.explain("ssm_scan", inputs["u"])


def test_explain_takes_positional_arguments():
    u = np.ones((1, 2, 3), np.float32)
    A = -np.ones((2, 4), np.float32)
    assert [v.ok for v in fastlvm.explain("ssm_scan", u, u, A, A, A)] == [True, False, False, True]


def _python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("isa", _C.isas())
def test_isa_is_pinned_by_the_environment_and_reported(isa):
    code = (
        "import fastlvm, numpy as np; u = np.ones((1, 2, 3), np.float32); A = -np.ones((2, 4), np.float32);"
        "print(fastlvm.explain('ssm_scan', u, u, A, A, A)[0].reason)"
    )
    result = _python(code, FASTLVM_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert isa in result.stdout


@pytest.mark.parametrize(
    "call",
    [
        "fastlvm.ssm_scan(u, u, A, A, A)",
        "fastlvm.explain('ssm_scan', u, u, A, A, A)",
    ],
    ids=["op", "explain"],
)
def test_an_isa_this_machine_lacks_stops_the_call(call):
    """No other backend and no other instruction set steps in."""
    code = "import fastlvm, numpy as np; u = np.ones((1, 2, 3), np.float32); A = -np.ones((2, 4), np.float32)\n"
    result = _python(code + call, FASTLVM_ISA="mmx")
    assert result.returncode == 1
    assert "ValueError: FASTLVM_ISA: got 'mmx', this machine can run scalar" in result.stderr


def test_without_torch_numpy_runs_and_the_reference_says_no():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\n"
        "import fastlvm, numpy as np; u = np.ones((1, 2, 3), np.float32); A = -np.ones((2, 4), np.float32)\n"
        "assert fastlvm.ssm_scan(u, u, A, A, A).shape == (1, 2, 3)\n"
        "assert fastlvm.causal_conv1d(u, A).shape == (1, 2, 3)\n"
        "print(fastlvm.explain('ssm_scan', u, u, A, A, A))\n"
        "try: fastlvm.ssm_scan(u, u, A, A, A, backend='reference')\n"
        "except ValueError as error: print(error)\n"
    )
    result = _python(code)
    assert result.returncode == 0, result.stderr
    assert "reference  no   torch is not installed" in result.stdout
    assert "backend='reference' cannot run this call: torch is not installed" in result.stdout


def test_numpy_on_the_cpu_backend_imports_no_torch():
    code = (
        "import sys, fastlvm, numpy as np; u = np.ones((1, 2, 3), np.float32); A = -np.ones((2, 4), np.float32)\n"
        "fastlvm.ssm_scan(u, u, A, A, A); fastlvm.causal_conv1d(u, A); fastlvm.explain('ssm_scan', u, u, A, A, A)\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = _python(code)
    assert result.returncode == 0, result.stderr
