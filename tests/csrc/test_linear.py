"""y = x Wᵀ of the native module: right for every shape and instruction set, the same for any number of threads."""

import numpy as np
import pytest

from fastlvm import _C


@pytest.fixture(params=_C.isas(), autouse=True)
def isa(request):
    before, threads = _C.isa(), _C.get_num_threads()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)
    _C.set_num_threads(threads)


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def linear(x, weight):
    out = np.full((len(x), len(weight)), np.nan, np.float32)
    _C.linear(x, weight, out)
    return out


@pytest.mark.parametrize("inputs", [0, 7, 16, 33, 256])
@pytest.mark.parametrize("outputs", [0, 1, 4, 70])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 13])
def test_is_the_matrix_product(rows, inputs, outputs):
    x, weight = normal(rows, inputs), normal(outputs, inputs)
    bound = 1e-6 * (np.abs(x) @ np.abs(weight.T)) + 1e-30
    assert (np.abs(linear(x, weight) - x.astype(np.float64) @ weight.T.astype(np.float64)) <= bound).all()


def test_a_row_does_not_depend_on_its_neighbours_or_on_threads():
    x, weight = normal(64, 300), normal(300, 300)  # enough work that two threads share it
    _C.set_num_threads(1)
    want = linear(x, weight)
    assert all(linear(x[i : i + 1], weight).tobytes() == want[i : i + 1].tobytes() for i in range(7))
    for threads in (2, 3):
        _C.set_num_threads(threads)
        assert linear(x, weight).tobytes() == want.tobytes()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("weight", {"weight": normal(4, 9)}),
        ("weight", {"weight": normal(8, 8)[:, ::2]}),
        ("weight", {"weight": normal(4, 8).astype(np.float64)}),
        ("x", {"x": normal(8)}),
        ("x", {"x": normal(3, 8).astype(np.float16)}),
        ("out", {"out": np.zeros((3, 5), np.float32)}),
        ("out", {"out": np.zeros((4, 3), np.float32).T}),
    ],
)
def test_names_what_does_not_fit(name, changes):
    arguments = {"x": normal(3, 8), "weight": normal(4, 8), "out": np.zeros((3, 4), np.float32), **changes}
    with pytest.raises(ValueError, match=f"^{name}: "):
        _C.linear(**arguments)
