"""What MLX is given: the files' own text, calls that MLX takes, and limits that Metal sets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

import fastlvm.kernels  # noqa: E402

from fastlvm.ops import _metal  # noqa: E402
from fastlvm.ops.causal_conv1d import metal as convolution  # noqa: E402
from fastlvm.ops.causal_conv1d_step import metal as convolution_step  # noqa: E402
from fastlvm.ops.ssm_scan import metal as scan  # noqa: E402
from fastlvm.ops.ssm_step import metal as scan_step  # noqa: E402
from ops.cases import Conv, Scan  # noqa: E402
from ops.steps import Conv as ConvStep  # noqa: E402
from ops.steps import Ssm  # noqa: E402

from . import emulator  # noqa: E402
from .calls import CONV, CONV_STEP, SCAN, STEP, arguments, backward, forward  # noqa: E402

REAL = mx.fast.metal_kernel
FOLDER = Path(fastlvm.kernels.__path__[0]) / "metal"
NAMES = {path.stem for path in FOLDER.glob("*.metal")} - {"common"}


def _run_all():
    """A call of every kernel."""
    for case in (Scan(length=40), Scan(length=5), Conv()):
        forward(case.inputs())
        backward(case.inputs(), case.cotangents())
    scan_step.step(*arguments(STEP, Ssm().inputs()))
    convolution_step.step(*arguments(CONV_STEP, ConvStep().inputs()))


def test_mlx_gets_the_files_and_the_emulation_compiles_them(recorder, monkeypatch):
    compiled = []
    library = emulator._library
    monkeypatch.setattr(
        emulator, "_library", lambda *parts: (compiled.append(emulator.translation_unit(*parts)), library(*parts))[1]
    )
    _run_all()
    assert {launch.name for launch in recorder.launches} == {f"fastlvm_{name}" for name in NAMES}
    header = (FOLDER / "common.metal").read_text()
    for launch, text in zip(recorder.launches, compiled, strict=True):
        source = (FOLDER / f"{launch.name.removeprefix('fastlvm_')}.metal").read_text()
        assert launch.source == source
        assert launch.header == header
        assert header in text
        assert source in text


def _traced():
    """Calls of every kernel as functions of their arrays alone, and those arrays."""
    out, state = (mx.array(g.numpy()) for g in Scan(length=5).cotangents())
    scans, short = arguments(SCAN, Scan(length=40).inputs()), arguments(SCAN, Scan(length=5).inputs())
    wide, _ = (mx.array(g.numpy()) for g in Scan(length=40).cotangents())
    convs = arguments(CONV, Conv().inputs())
    grads = [mx.array(g.numpy()) for g in Conv().cotangents()]
    return {
        "ssm_scan": (lambda *args: scan.scan(*args, True)[:2], scans),
        "ssm_scan_bwd": (scan.scan_bwd, [wide, state, *scans]),
        "ssm_scan_bwd_short": (scan.scan_bwd, [out, state, *short]),
        "causal_conv1d": (lambda *args: convolution.conv(*args, True), convs),
        "causal_conv1d_bwd": (convolution.conv_bwd, [*grads, *convs]),
        "ssm_step": (scan_step.step, arguments(STEP, Ssm().inputs())),
        "causal_conv1d_step": (convolution_step.step, arguments(CONV_STEP, ConvStep().inputs())),
    }


@pytest.mark.parametrize("name", sorted(NAMES))
def test_mlx_takes_the_call_and_writes_the_signature_the_emulation_has(name, monkeypatch, recorder, capfd, tmp_path):
    """Without a GPU, MLX still puts the kernel's text together where it traces a function for export."""
    function, args = _traced()[name]

    def verbose(**built):
        kernel, emulated = REAL(**built), recorder.metal_kernel(**built)
        calls.append((built, emulated))
        return lambda **call: kernel(**call, verbose=True)

    def exported(*arrays):
        each = iter(arrays)
        results = function(*(next(each) if isinstance(x, mx.array) else x for x in args))
        return [x for x in results if x is not None]

    calls = []
    monkeypatch.setattr(mx.fast, "metal_kernel", verbose)
    monkeypatch.setattr(_metal, "contiguous", lambda x: x)  # which MLX does not export
    try:
        mx.export_function(str(tmp_path / "call.mlxfn"), exported, *(x for x in args if isinstance(x, mx.array)))
    except RuntimeError as error:
        if "No Metal back-end" in str(error):
            pytest.skip("this version of mlx makes no kernel without a GPU")
        raise
    text = capfd.readouterr().out
    ((built, _),) = calls
    assert (FOLDER / f"{name}.metal").read_text() in text
    assert (FOLDER / "common.metal").read_text() in text
    signature = re.search(r"\[\[kernel\]\] void \w+\((.*?)\)\s*\{", text, re.DOTALL).group(1)
    theirs = re.findall(r"(\w+) \[\[\w+(?:\(\d+\))?\]\]", signature)
    pairs = [[(key, "float") for key in built[names]] for names in ("input_names", "output_names")]
    assert theirs == [key for _, key, _ in emulator.parameters(built["source"], *pairs)]
    assert signature.count("[[buffer(") <= emulator.MOST_BUFFERS


def test_the_bits_of_a_plan_are_those_of_the_kernels():
    found = dict(re.findall(r"\b([A-Z]\w*) = (\d+)[,;]", _metal.source("common")))
    assert len(found) == 14
    assert {key: int(value) for key, value in found.items()} == {key: getattr(_metal, key) for key in found}


def test_no_atomics():
    assert not any("atomic" in _metal.source(name) for name in NAMES)


@pytest.mark.parametrize("state", [128, 512])
def test_launches_stay_within_the_limits_of_a_threadgroup(state, recorder):
    """Whole simdgroups, at most 256 threads; what is shared, at most 32 kB, would not compile otherwise."""
    for length in (5, 40):
        case = Scan(batch=1, channels=8, state=state, length=length, options=())
        backward(case.inputs(), case.cotangents())
    for launch in recorder.launches:
        assert launch.threadgroup[0] % _metal.LANES == 0
        assert launch.threadgroup[0] <= _metal.THREADS
        assert launch.threadgroup[1:] == (1, 1)
