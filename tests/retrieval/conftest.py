from __future__ import annotations

import pytest

from fastlvm import _C


@pytest.fixture(autouse=True)
def restore():
    isa, threads = _C.isa(), _C.get_num_threads()
    yield
    _C.set_isa(isa)
    _C.set_num_threads(threads)
