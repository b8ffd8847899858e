"""Every test of this folder runs its Metal kernels in the emulation."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    """In the place of `mx.fast.metal_kernel`; its `launches` are what the test ran."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    from fastlvm.ops import _metal

    from . import emulator

    if emulator.COMPILER is None:
        pytest.skip("no g++, which compiles the kernels for the host")
    if sys.platform != "linux":
        pytest.skip("the emulation's fibers want glibc; elsewhere bench/apple.py checks the kernels on a GPU")
    recorder = emulator.Recorder()
    monkeypatch.setattr(mx.fast, "metal_kernel", recorder.metal_kernel)
    _metal.kernel.cache_clear()
    yield recorder
    _metal.kernel.cache_clear()
