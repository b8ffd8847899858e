"""Programs of torch.export, and what AOTInductor makes of them, keep the ops, in the process that loads them, too."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from torch.export import Dim, export

import fastlvm

from . import steps
from .cases import Conv, Scan
from .ssd_cases import Ssd

NAMES = {Scan: "ssm_scan", Conv: "causal_conv1d", Ssd: "ssd_scan"} | {type(c): c.name for c in steps.BASIC}
SEQUENCES = (Scan(), Conv(), Ssd())


class _Block(torch.nn.Module):
    def __init__(self, name, **flags):
        super().__init__()
        self.name, self.flags = name, flags

    def forward(self, inputs):
        return getattr(fastlvm, self.name)(**inputs, **self.flags)


def _id(case):
    return NAMES[type(case)]


def _block(case):
    return (
        _Block(NAMES[type(case)], return_final_state=True) if type(case) in map(type, SEQUENCES) else _Block(case.name)
    )


def _holds(program, name):
    return any(str(node.target) == f"fastlvm.{name}.default" for node in program.graph.nodes)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("sizes", ["known", "named", "any"])
@pytest.mark.parametrize("case", SEQUENCES, ids=_id)
def test_a_program_keeps_the_op(case, sizes, strict):
    """With sizes of one and none beside those that it was exported with, and after torch's own decompositions."""
    torch._dynamo.reset()
    inputs, time = case.inputs(), 1 if isinstance(case, Ssd) else 2
    batch, length = (Dim("batch"), Dim("length")) if sizes == "named" else (Dim.DYNAMIC, Dim.DYNAMIC)
    shapes = {name: {0: batch, time: length} for name in ("u", "x", "delta", "dt", "B", "C", "z")}
    shapes |= {"initial_state": {0: batch}}
    dynamic = None if sizes == "known" else ({name: shapes.get(name) for name in inputs},)
    program = export(_block(case), (inputs,), dynamic_shapes=dynamic, strict=strict)
    others = [(2, 6)] if dynamic is None else [(2, 6), (3, 70), (1, 1), (2, 0), (0, 3)]
    for kept in (program, program.run_decompositions()):
        assert _holds(kept, NAMES[type(case)])
        run = kept.module()
        for b, n in others:
            given = type(case)(batch=b, length=n).inputs()
            for got, want in zip(run(given), _block(case)(given), strict=True):
                assert torch.equal(got, want)


def _in_a_new_process(code, folder):
    start = f"import pathlib, torch, fastlvm\nfolder = pathlib.Path({str(folder)!r})\nfastlvm.ops.register()\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_program_runs_in_the_process_that_loads_it(tmp_path):
    cases = (*SEQUENCES, *steps.BASIC)
    for case in cases:
        name, inputs = NAMES[type(case)], case.inputs()
        torch.export.save(export(_block(case), (steps.copied(inputs),)), tmp_path / f"{name}.pt2")
        torch.save((steps.copied(inputs), _block(case)(inputs), inputs.get("state")), tmp_path / f"{name}.pt")
    code = """
for path in sorted(folder.glob("*.pt2")):
    inputs, want, state = torch.load(path.with_suffix(".pt"))
    got = torch.export.load(path).module()(inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert state is None or torch.equal(inputs["state"], state)
    print(path.stem)
"""
    assert _in_a_new_process(code, tmp_path).split() == sorted(NAMES.values())


def test_every_op_is_registered():
    code = """
names = [schema.name for schema in torch._C._jit_get_all_schemas()]
print(*(name.removeprefix("fastlvm::") for name in names if name.startswith("fastlvm::")))
"""
    assert set(_in_a_new_process(code, ".").split()) >= set(fastlvm.ops.dispatch.known())


class _Model(torch.nn.Module):
    """A convolution, a scan and a step in one."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.filters = torch.nn.Parameter(torch.randn(4, 3, generator=g))
        self.A = torch.nn.Parameter(-torch.rand(4, 5, generator=g))

    def forward(self, u, B, state):
        x = fastlvm.causal_conv1d(2 * u, self.filters, activation="silu")
        y, last = fastlvm.ssm_scan(x, u.abs(), self.A, B, B, initial_state=state, return_final_state=True)
        token = fastlvm.ssm_step(state, y[..., -1], u[..., -1].abs(), self.A, B[..., -1], B[..., -1])
        return y + 1, last, token, state

    @staticmethod
    def inputs(batch, length):
        g = torch.Generator().manual_seed(batch + length)
        return tuple(torch.randn(batch, n, m, generator=g) for n, m in ((4, length), (5, length), (4, 5)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="wants a C++ compiler")
def test_aot_inductor_gives_the_same(tmp_path):
    batch, length = Dim("batch", min=1), Dim("length", min=1)
    shapes = ({0: batch, 2: length}, {0: batch, 2: length}, {0: batch})
    with torch.no_grad():
        program = export(_Model(), _Model.inputs(2, 6), dynamic_shapes=shapes)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        calls = {sizes: _Model.inputs(*sizes) for sizes in [(2, 6), (3, 70), (1, 1)]}
        wants = {sizes: _Model()(*steps.copied(dict(enumerate(args))).values()) for sizes, args in calls.items()}
        torch.save([(calls[sizes], wants[sizes]) for sizes in calls], tmp_path / "calls.pt")
    code = f"""
run = torch._inductor.aoti_load_package({package!r})
for inputs, want in torch.load(folder / "calls.pt"):
    torch.testing.assert_close(tuple(run(*inputs)), want, rtol=1e-6, atol=1e-6)
print("done")
"""
    assert _in_a_new_process(code, tmp_path).strip() == "done"
