"""Every backend that can run here, each instruction set of the cpu backend in turn."""

from __future__ import annotations

import os

import pytest
import torch

from fastlvm.ops._extension import _C

if not torch.cuda.is_available():  # before the first import of a kernel, which decides
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _let_scalars_be_numbers():
    """Triton 3.6 calls int() on arrays of one element, its scalars, as numpy 2.4 no longer allows."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


_let_scalars_be_numbers()


ISAS = _C.isas() if _C else []  # none on a machine for the tests of the GPU


@pytest.fixture(params=["reference", *(f"cpu-{isa}" for isa in ISAS)])
def backend(request):
    """Name of a backend; the instruction set in the parameter is pinned while the test runs."""
    name, _, isa = request.param.partition("-")
    if not isa:
        yield name
        return
    before = _C.isa()
    _C.set_isa(isa)
    yield name
    _C.set_isa(before)


@pytest.fixture(params=ISAS)
def isa(request):
    """An instruction set of the cpu backend, pinned while the test runs."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def every_isa():
    """every_isa() goes through the instruction sets of the cpu backend, each pinned in its turn."""
    before = _C.isa()

    def turns():
        for name in _C.isas():
            _C.set_isa(name)
            yield name

    yield turns
    _C.set_isa(before)


@pytest.fixture
def every_backend(every_isa):
    """every_backend() goes through the backends as `every_isa` does."""

    def turns():
        yield "reference"
        for _ in every_isa():
            yield "cpu"

    return turns


@pytest.fixture
def threads():
    """Number of threads to start from; put back afterwards."""
    before = _C.get_num_threads()
    yield before
    _C.set_num_threads(before)
