"""_C.Model: its products, its errors, its threads. The layers are held to PyTorch in tests/predictor/test_blocks.py."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastlvm import _C
from predictor.natives import PRODUCTS, ROUNDING, pinned

PRECISIONS = ("fp32", "bf16", "int8")
INPUTS = (1, 3, 7, 16, 33, 256, 1537)
OUTPUTS = (1, 4, 15, 16, 17, 70)
ROWS = (1, 2, 3, 4, 5, 6, 7, 13, 70)


@pytest.fixture(params=PRODUCTS, ids=str)
def products(request):
    """What each precision is multiplied with, pinned while the test runs."""
    with pinned(request.param) as names:
        yield names


@pytest.fixture
def threads():
    before = _C.get_num_threads()
    yield
    _C.set_num_threads(before)


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def to_bf16(x):
    """The nearest bfloat16 numbers, ties to even: their bits, and what they are in float32."""
    wide = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    bits = ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def random_int8(outputs, inputs):
    """Weights of every step, and scales."""
    rng = np.random.default_rng((outputs, inputs))
    return rng.integers(-127, 128, (outputs, inputs)).astype(np.int8), rng.uniform(1e-3, 1e-2, outputs).astype(
        np.float32
    )


def matrix(outputs, inputs, precision="fp32", bias=False):
    """A random (weight, scale, bias) whose products are of about the size of their inputs."""
    offsets = 0.1 * normal(outputs) if bias else None
    weight = normal(outputs, inputs, seed=1) / np.float32(np.sqrt(inputs))
    if precision == "int8":
        scale = np.abs(weight).max(axis=1) / np.float32(127)
        return np.rint(weight / scale[:, None]).astype(np.int8), scale, offsets
    return weight if precision == "fp32" else to_bf16(weight)[0], None, offsets


def linear(x, weight, scale=None, bias=None):
    model = _C.Model(1, weight.shape[1], [("linear", {"weight": (weight, scale, bias)}), ("last", {})])
    return run(model, x[:, None])


def run(model, context):
    out = np.full((len(context), model.out_dim), np.nan, np.float32)
    model.run(np.ascontiguousarray(context), out)
    return out


def int8_product(x, weight, scale):
    """Rows in steps of max |x| / 127, ties to even; whole sums; scaled in float32."""
    most = np.abs(x).max(axis=1, keepdims=True)
    empty = most <= np.float32(1e-30)
    inverse = np.where(empty, 0, np.float32(127) / np.where(empty, 1, most)).astype(np.float32)
    steps = np.rint(x * inverse).astype(np.int64)
    step = np.where(empty, 0, most / np.float32(127)).astype(np.float32)
    return (steps @ weight.T.astype(np.int64)).astype(np.float32) * (scale * step)


@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_linear_is_the_matrix_product(precision, inputs, outputs, with_bias, products):
    weight, bias = normal(outputs, inputs, seed=1), normal(outputs)
    given = weight
    if precision == "bf16":
        given, weight = to_bf16(weight)
    for rows in ROWS:
        x = normal(rows, inputs)
        found = linear(x, given, bias=bias if with_bias else None)
        if precision == "bf16" and products["bf16"] in ROUNDING:
            x = to_bf16(x)[1]
        wanted = x.astype(np.float64) @ weight.T.astype(np.float64) + with_bias * bias
        bound = 5e-7 * (np.abs(x) @ np.abs(weight.T) + with_bias * np.abs(bias))
        assert (np.abs(found - wanted) <= bound).all()


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_int8_has_whole_sums_of_whole_steps(inputs, outputs, products):
    for rows in ROWS:
        x = normal(rows, inputs)
        weight, scale = random_int8(outputs, inputs)
        wanted, bias = int8_product(x, weight, scale), normal(outputs)
        assert linear(x, weight, scale).tobytes() == wanted.tobytes()
        bound = 1.2e-7 * (np.abs(wanted) + np.abs(bias))  # sums and biases may be added without rounding in between
        assert (np.abs(linear(x, weight, scale, bias) - (wanted.astype(np.float64) + bias)) <= bound).all()


@pytest.mark.parametrize("inputs", (1, 2, 33, 1537))
def test_int8_loses_nothing_of_whole_numbers(inputs, products):
    rng, outputs = np.random.default_rng(inputs), 17
    x = rng.integers(-127, 128, (7, inputs)).astype(np.float32)
    x[:, 0] = 127
    weight, bias = rng.integers(-128, 128, (outputs, inputs)).astype(np.int8), rng.integers(-99, 99, outputs)
    found = linear(x, weight, np.ones(outputs, np.float32), bias.astype(np.float32))
    assert (np.abs(found) < 1 << 24).all()
    np.testing.assert_array_equal(found, x.astype(np.int64) @ weight.T.astype(np.int64) + bias)


@pytest.mark.parametrize("inputs", (4, 256, 1537, 1 << 16))
@pytest.mark.parametrize("step", (127, -127, -128))
def test_int8_extremes_do_not_saturate(inputs, step, products):
    weight = np.full((16, inputs), step, np.int8)
    weight[1::2] = 127
    x = np.full((3, inputs), 127, np.float32)
    x[1] = -127
    x[2, ::2] = -127
    wanted = (x.astype(np.int64) @ weight.T.astype(np.int64)).astype(np.float32)
    np.testing.assert_array_equal(linear(x, weight, np.ones(16, np.float32)), wanted)


def test_int8_rounds_ties_to_even(products):
    x = np.array([[127, 0.5, 1.5, 2.5, 126.5, -0.5, -1.5, -2.5, -126.5]], np.float32)
    found = linear(x, np.eye(9, dtype=np.int8), np.ones(9, np.float32))
    np.testing.assert_array_equal(found, [[127, 0, 2, 2, 126, 0, -2, -2, -126]])


def test_int8_takes_rows_of_any_size(products):
    weight, scale = random_int8(20, 40)
    x = normal(9, 40) * np.float32(10) ** np.array([[-29, -20, -9, -1, 0, 1, 9, 20, 30]], np.float32).T
    assert linear(x, weight, scale).tobytes() == int8_product(x, weight, scale).tobytes()


@pytest.mark.parametrize("inputs", (1, 33, 70))
def test_int8_rows_of_zeros_and_of_subnormals_give_the_bias(inputs, products):
    weight, scale = random_int8(20, inputs)
    x, bias = normal(6, inputs), normal(20)
    x[1], x[2], x[3], x[4] = 0, -0.0, 1e-40, -1e-45
    found = linear(x, weight, scale, bias)
    assert (found[1:5] == bias).all()
    assert found[::5].tobytes() == linear(x[::5], weight, scale, bias).tobytes()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zero_and_huge_activations_stay_what_they_are(precision, products):
    x = np.zeros((3, 40), np.float32)
    x[1, 7], x[2, 39] = 1e30, -1e30
    weight = matrix(20, 40, precision)
    found = linear(x, *weight)
    assert (found[0] == 0).all() and np.isfinite(found).all()
    wanted = linear(np.sign(x), *weight)
    np.testing.assert_allclose(found[1:], 1e30 * wanted[1:], rtol=5e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(precision, products, threads):
    weight, x = matrix(300, 300, precision, bias=True), normal(70, 300)  # enough work that two threads share it
    _C.set_num_threads(1)
    want = linear(x, *weight)
    for first, count in ((0, 1), (3, 1), (69, 1), (1, 2), (4, 5), (60, 7)):
        assert linear(x[first : first + count], *weight).tobytes() == want[first : first + count].tobytes()
    for count in (2, 3):
        _C.set_num_threads(count)
        assert linear(x, *weight).tobytes() == want.tobytes()


def norm(dim, centred=False):
    return 1 + 0.1 * normal(dim), 0.1 * normal(dim) if centred else None, 1e-5


def mamba_block(precision, dim, inner, state=7, rank=5, width=4):
    return "mamba_block", {
        "norm": norm(dim),
        "in_proj": matrix(2 * inner, dim, precision),
        "conv_weight": normal(inner, width),
        "conv_bias": normal(inner),
        "x_proj": matrix(rank + 2 * state, inner, precision),
        "dt_proj": matrix(inner, rank, precision, bias=True),
        "A": -np.exp(normal(inner, state)),
        "D": normal(inner),
        "out_proj": matrix(dim, inner, precision),
        "d_conv": width,
        "d_state": state,
    }


def mamba2_block(precision, dim, heads, head_dim, groups=2, state=7, width=4):
    inner = heads * head_dim
    channels = inner + 2 * groups * state
    return "mamba2_block", {
        "norm": norm(dim),
        "gate_norm": norm(inner),
        "in_proj": matrix(inner + channels + heads, dim, precision),
        "conv_weight": normal(channels, width),
        "conv_bias": normal(channels),
        "A": -np.exp(normal(heads)),
        "D": normal(heads),
        "dt_bias": normal(heads),
        "out_proj": matrix(dim, inner, precision),
        "n_heads": heads,
        "head_dim": head_dim,
        "n_groups": groups,
        "d_state": state,
        "d_conv": width,
    }


def network(precision, positions=5, dim=420, inner=160):
    """A model of every layer that hands a sequence on; by default wide enough that threads share the work of each."""

    def weight(outputs, inputs):
        return "linear", {"weight": matrix(outputs, inputs, precision, bias=True)}

    def residual(*layers):
        return "residual", {"layers": [("norm", {"norm": norm(dim, centred=True)}), *layers]}

    def cells(kind, gates, inputs):
        parts = (matrix(gates * inner, size, precision, bias=True) for size in (inputs, inner))
        return kind, dict(zip(("input", "recurrent"), parts, strict=True))

    layers = [
        ("l2_norm", {}),
        ("context", {}),
        ("positions", {"context": positions, "dim": dim, "table": normal(positions, dim)}),
        mamba_block(precision, dim, inner),
        mamba2_block(precision, dim, 4, inner // 4, state=32),
        residual(weight(3 * inner, dim), ("attention", {"heads": 4, "window": 3}), weight(dim, inner)),
        residual(weight(inner, dim), ("gelu", {}), weight(dim, inner)),
        cells("gru", 3, dim),
        cells("lstm", 4, inner),
        mamba_block(precision, inner, 2 * inner),
        ("last", {}),
        weight(dim, inner),
        ("recency_mixture", {"logits": np.full(positions, 1 / positions, np.float32)}),
        ("l2_norm", {}),
    ]
    return _C.Model(positions, dim, layers)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_window_does_not_depend_on_its_neighbours_or_on_threads(precision, products, threads):
    model, context = network(precision), normal(66, 5, 420)
    _C.set_num_threads(1)
    want = run(model, context)
    assert np.isfinite(want).all() and len(np.unique(want[:, 0])) == len(want)
    for first, count in ((0, 1), (65, 1), (62, 3)):
        assert run(model, context[first : first + count]).tobytes() == want[first : first + count].tobytes()
    for count in (2, 3):
        _C.set_num_threads(count)
        assert run(model, context).tobytes() == want.tobytes()


def test_instruction_sets_agree_on_a_whole_model():
    model, context = network("fp32", dim=68, inner=20), normal(3, 5, 68)
    before, results = _C.isa(), []
    for isa in _C.isas():
        _C.set_isa(isa)
        results.append(run(model, context))
    _C.set_isa(before)
    for result in results:
        np.testing.assert_allclose(result, results[0], atol=2e-6)


def test_a_model_says_what_it_takes_and_gives():
    weight = np.zeros((9, 8), np.float32)
    model = _C.Model(3, 8, [("last", {}), ("linear", {"weight": (weight, None, None)})])
    assert (model.positions, model.dim, model.out_dim, model.layers) == (3, 8, 9, 2)
    assert (model.streams, model.state_size, model.most_positions) == (True, 0, 0)
    assert model.nbytes >= weight.nbytes
    assert network("int8").nbytes < 0.3 * network("fp32").nbytes
    assert network("fp32", positions=4, dim=68, inner=20).most_positions == 4


def test_a_model_keeps_its_own_weights():
    weight, bias, x = normal(4, 8), normal(4), normal(2, 1, 8)
    model = _C.Model(1, 8, [("last", {}), ("linear", {"weight": (weight, None, bias)})])
    want = run(model, x)
    weight[:], bias[:] = np.nan, np.nan
    assert run(model, x).tobytes() == want.tobytes()


def test_read_only_weights_and_contexts_are_taken():
    weight, x = matrix(4, 8, "int8", bias=True), normal(2, 8)
    want = linear(x, *weight)
    for array in (*weight, x):
        array.flags.writeable = False
    assert linear(x, *weight).tobytes() == want.tobytes()


def test_no_windows_are_no_work():
    assert run(network("fp32", dim=68, inner=20), np.zeros((0, 5, 68), np.float32)).shape == (0, 68)


def test_time_is_added_up_by_layer_and_phase():
    model, context = network("fp32"), normal(2, 5, 420)
    out, nanoseconds = np.zeros((2, 420), np.float32), np.zeros((model.layers, len(_C.PHASES)), np.int64)
    model.run(context, out, nanoseconds=nanoseconds)
    first = nanoseconds.copy()
    assert (first >= 0).all() and first.sum() < 10**10
    assert (first.sum(axis=0) > 0).all(), "a phase that takes no time"
    assert (first.sum(axis=1) > 0).all(), "a layer that takes no time"
    assert out.tobytes() == run(model, context).tobytes()
    model.run(context, out, nanoseconds=nanoseconds)
    assert (nanoseconds >= first).all() and nanoseconds.sum() > first.sum()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_call_may_have_a_number_of_threads_of_its_own(precision, threads):
    _C.set_num_threads(2)
    model, context, out = network(precision), normal(9, 5, 420), np.zeros((9, 420), np.float32)
    want = run(model, context)
    for count in (1, 3, 0, 2):
        model.run(context, out, threads=count)
        assert out.tobytes() == want.tobytes()
        assert _C.get_num_threads() == 2
    for count in (-1, 1025):
        with pytest.raises(ValueError, match=f"threads: got {count}, wants 0 to 1024"):
            model.run(context, out, threads=count)


def test_callers_with_different_numbers_of_threads_do_not_disturb_each_other(threads):
    _C.set_num_threads(2)
    model, context = network("int8"), normal(9, 5, 420)
    want = run(model, context)

    def work(count):
        out = np.zeros_like(want)
        for _ in range(10):
            model.run(context, out, threads=count)
            assert out.tobytes() == want.tobytes()

    with ThreadPoolExecutor(4) as pool:
        for part in [pool.submit(work, count) for count in (1, 2, 3, 0)]:
            part.result(timeout=60)
    assert _C.get_num_threads() == 2


W, VECTOR = np.zeros((8, 8), np.float32), np.zeros(8, np.float32)
LAST: tuple[str, dict] = ("last", {})
INT8 = np.zeros((8, 8), np.int8)


def weighing(weight, scale=None, bias=None):
    return [("linear", {"weight": (weight, scale, bias)}), LAST]


def changed(layer, **fields):
    kind, good = layer
    return [(kind, {**good, **fields}), LAST]


def without(layer, name):
    kind, good = layer
    return [(kind, {key: value for key, value in good.items() if key != name}), LAST]


MAMBA, MAMBA2 = mamba_block("fp32", 8, 20), mamba2_block("fp32", 8, 4, 5)
GRU = ("gru", {"input": matrix(12, 8), "recurrent": matrix(12, 4)})
POSITIONS = ("positions", {"context": 3, "dim": 8, "table": np.zeros((3, 8), np.float32)})
TRIPLE = ("linear", {"weight": matrix(24, 8)})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (weighing(W.astype(np.float64)), "weight: got dtype d, wants float32, uint16 or int8"),
        (weighing(W.astype(">f4")), "weight: got dtype"),
        (weighing(W.astype(np.float16)), "weight: got dtype e"),
        (weighing(VECTOR), "weight: got 1 axes, wants 2"),
        (weighing(W[:, ::2]), "weight: wants a contiguous array"),
        (weighing(np.zeros((8, 16), np.float32).T), "weight: wants a contiguous array"),
        (weighing(np.broadcast_to(np.float32(0), (8, 8))), "weight: wants a contiguous array"),
        (weighing(W[:0]), "weight: got a size of 0"),
        (weighing(W[:, :0]), "weight: got a size of 0"),
        (weighing(np.zeros((1, (1 << 24) + 1), np.int8), VECTOR[:1]), "weight: got a size of 16777217"),
        (weighing(INT8), "weight: wants a scale with int8"),
        (weighing(W, VECTOR), "weight: wants a scale with int8 and only there"),
        (weighing(INT8, VECTOR[:7]), r"weight: got f \[7\], wants float32 \[8\]"),
        (weighing(INT8, VECTOR.astype(np.float64)), "weight: got d"),
        (weighing(INT8, np.zeros(16, np.float32)[::2]), "weight: wants a contiguous array"),
        (weighing(W, None, VECTOR[:7]), r"weight: got f \[7\], wants float32 \[8\]"),
        (weighing(W, None, W), r"weight: got f \[8, 8\], wants float32 \[8\]"),
        (weighing(W, None, VECTOR.astype(np.float16)), "weight: got e"),
        ([("linear", {"weight": (W, None)}), LAST], "weight: wants weight, scale and bias"),
        ([("linear", {}), LAST], "weight is missing"),
        (weighing(matrix(4, 9)[0]), "takes 9 features, and 8 arrive"),
        ([("norm", {"norm": (np.zeros(9, np.float32), None, 1e-5)}), LAST], "takes 9 features, and 8 arrive"),
        ([("norm", {"norm": (VECTOR, VECTOR[:7], 1e-5)}), LAST], r"norm: got f \[7\], wants float32 \[8\]"),
        ([("norm", {"norm": (W, None, 1e-5)}), LAST], "norm: wants a vector"),
        ([("norm", {"norm": (VECTOR, None)}), LAST], "norm: wants weight, bias and eps"),
        (without(MAMBA, "A"), "A is missing"),
        (without(MAMBA, "d_state"), "d_state is missing"),
        (changed(MAMBA, D=VECTOR), r"D: got f \[8\], wants float32 \[20\]"),
        (changed(MAMBA, A=np.zeros((7, 20), np.float32)), r"A: got f \[7, 20\], wants float32 \[20, 7\]"),
        (changed(MAMBA, conv_bias=np.zeros(20)), "conv_bias: got d"),
        (changed(MAMBA, d_conv=3), r"conv_weight: got f \[20, 4\], wants float32 \[20, 3\]"),
        (changed(MAMBA, d_state=0), "d_state: got 0, wants 1"),
        (changed(MAMBA, d_state=-1), "d_state: got -1, wants 1"),
        (changed(MAMBA, d_state=1 << 40), "d_state: got 1099511627776, wants 1"),
        (changed(MAMBA, in_proj=matrix(39, 8)), "matrices that do not fit each other"),
        (changed(MAMBA, x_proj=matrix(18, 20)), "matrices that do not fit each other"),
        (changed(MAMBA, dt_proj=matrix(20, 4)), "matrices that do not fit each other"),
        (changed(MAMBA, out_proj=matrix(9, 20)), "matrices that do not fit each other"),
        (changed(MAMBA, norm=norm(9)), "takes 9 features, and 8 arrive"),
        (changed(MAMBA2, n_groups=3), "conv_weight: got"),
        (
            changed(MAMBA2, n_groups=3, conv_weight=np.zeros((62, 4), np.float32), conv_bias=np.zeros(62, np.float32)),
            "3 groups, which do not divide its 4 heads",
        ),
        (changed(MAMBA2, in_proj=matrix(71, 8)), "matrices that do not fit each other"),
        (changed(MAMBA2, gate_norm=norm(19)), "matrices that do not fit each other"),
        (changed(MAMBA2, A=VECTOR), r"A: got f \[8\], wants float32 \[4\]"),
        ([TRIPLE, ("attention", {"heads": 3, "window": 2}), LAST], "q, k and v of 3 heads, and 24 features arrive"),
        ([("attention", {"heads": 1, "window": 2}), LAST], "q, k and v of 1 heads, and 8 features arrive"),
        ([TRIPLE, ("attention", {"heads": 0, "window": 2}), LAST], "heads: got 0"),
        ([TRIPLE, ("attention", {"heads": 2, "window": 0}), LAST], "window: got 0"),
        ([LAST, TRIPLE, ("attention", {"heads": 2, "window": 2})], "takes a sequence, and one vector arrives"),
        (changed(GRU, recurrent=matrix(12, 5)), "matrices that do not fit each other"),
        (changed(GRU, input=matrix(16, 8)), "matrices that do not fit each other"),
        ([("lstm", GRU[1]), LAST], "matrices that do not fit each other"),
        (changed(POSITIONS, table=np.zeros((3, 9), np.float32)), r"table: got f \[3, 9\], wants float32 \[3, 8\]"),
        (
            changed(POSITIONS, context=2, table=np.zeros((2, 8), np.float32)),
            "2 positions, and the context has 3",
        ),
        ([LAST, MAMBA], "takes a sequence, and one vector arrives"),
        ([LAST, MAMBA2], "takes a sequence, and one vector arrives"),
        ([LAST, GRU], "takes a sequence, and one vector arrives"),
        ([LAST, POSITIONS], "takes a sequence, and one vector arrives"),
        ([LAST, ("context", {})], "takes a sequence, and one vector arrives"),
        ([LAST, LAST], "takes a sequence, and one vector arrives"),
        ([LAST, ("flatten", {})], "takes a sequence, and one vector arrives"),
        ([("flatten", {}), ("linear", {"weight": matrix(9, 8)})], "takes 8 features, and 24 arrive"),
        ([("recency_mixture", {"logits": VECTOR[:3]}), LAST], "adds 3 vectors of the context to one such vector"),
        ([LAST, ("recency_mixture", {"logits": VECTOR[:4]})], "adds 4 vectors of the context to one such vector"),
        ([LAST, ("recency_mixture", {"logits": W})], "logits: wants a vector"),
        (
            [LAST, ("linear", {"weight": matrix(9, 8)}), ("recency_mixture", {"logits": VECTOR[:3]})],
            "adds 3 vectors of the context",
        ),
        ([("context_attention", {"query": matrix(4, 8), "key": matrix(5, 8)})], "matrices that do not fit each other"),
        ([("context_attention", {"query": matrix(4, 8), "key": matrix(4, 9)})], "takes 9 features, and 8 arrive"),
        (
            [LAST, ("context_attention", {"query": matrix(4, 8), "key": matrix(4, 8)})],
            "takes a sequence, and one vector arrives",
        ),
        ([("residual", {"layers": [TRIPLE]}), LAST], "adds vectors of another shape than it takes"),
        ([("residual", {"layers": [LAST]})], "adds vectors of another shape than it takes"),
        ([("convolution", {}), LAST], "kind: got 'convolution', which is no layer"),
        ([("Linear", {}), LAST], "kind: got 'Linear'"),
        ([("last",)], "layers: wants"),
        ([("last", None)], "layers: wants"),
        ([], "leaves a sequence, and one vector is wanted"),
        ([("gelu", {})], "leaves a sequence, and one vector is wanted"),
    ],
)
def test_layers_that_are_no_model_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        _C.Model(3, 8, layers)


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        (weighing([[1.0] * 8] * 8), "weight"),
        (weighing(None), "weight"),
        ([("linear", {"weight": W}), LAST], "weight"),
        ([("norm", {"norm": (VECTOR, None, "small")}), LAST], "norm"),
        (changed(MAMBA, d_state=2.5), "d_state"),
        (changed(MAMBA, d_state="7"), "d_state"),
        (changed(MAMBA, d_state=None), "d_state"),
        ([("residual", {}), LAST], "layers"),
        ([("residual", {"layers": 3}), LAST], "layers"),
        ([(None, {}), LAST], "kind|layers"),
        (["last"], "layers"),
        ([None], "layers"),
    ],
)
def test_objects_of_another_kind_are_named(layers, name):
    with pytest.raises(ValueError, match=name):
        _C.Model(3, 8, layers)


def nested(depth):
    """Branches around each other, which add h once each: (depth + 1) h."""
    layers: list[tuple] = []
    for _ in range(depth):
        layers = [("residual", {"layers": layers})]
    return layers


def test_branches_within_branches():
    x = normal(3, 2, 8)
    np.testing.assert_allclose(run(_C.Model(2, 8, [*nested(5), LAST]), x), 6 * x[:, -1], rtol=1e-6)


BOTTOMLESS = """
import sys
import threading
sys.path[:0] = [{here!r}, {here!r} + '/..']
import test_model as t
layers = []
layers.append(("residual", {{"layers": layers}}))
for bad in (layers, t.nested(50_000)):
    try:
        t._C.Model(2, 8, bad)
    except ValueError:
        pass
    else:
        sys.exit("was taken")
"""


def test_branches_without_a_bottom_are_refused():
    command = [sys.executable, "-c", BOTTOMLESS.format(here=str(Path(__file__).parent))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"


@pytest.mark.parametrize(
    ("positions", "dim"), [(0, 8), (3, 0), (-1, 8), (3, -8), ((1 << 16) + 1, 8), (3, (1 << 16) + 1), (1 << 62, 1 << 62)]
)
def test_contexts_of_no_size_or_a_huge_one_are_refused(positions, dim):
    with pytest.raises(ValueError, match=f"context: got {positions} of {dim}, wants 1 to 65536"):
        _C.Model(positions, dim, [LAST])


def test_int8_sums_that_could_overflow_are_refused():
    wide = (1 << 16) + 1
    widen = ("linear", {"weight": (np.zeros((wide, 8), np.float32), None, None)})
    layers = [LAST, widen, *weighing(np.zeros((1, wide), np.int8), VECTOR[:1])[:1]]
    with pytest.raises(ValueError, match="at most 65536 features in int8, and 65537 arrive"):
        _C.Model(3, 8, layers)


CONTEXT, OUT = np.zeros((2, 3, 8), np.float32), np.zeros((2, 8), np.float32)
READ_ONLY = OUT.copy()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("context", {"context": CONTEXT[0]}),
        ("context", {"context": CONTEXT[:, :2]}),
        ("context", {"context": CONTEXT[..., :7]}),
        ("context", {"context": np.zeros((2, 8, 3), np.float32).transpose(0, 2, 1)}),
        ("context", {"context": np.zeros((4, 3, 8), np.float32)[::2]}),
        ("context", {"context": np.broadcast_to(np.float32(0), (2, 3, 8))}),
        ("context", {"context": CONTEXT.astype(np.float64)}),
        ("context", {"context": CONTEXT.astype(np.float16)}),
        ("context", {"context": CONTEXT.astype(">f4")}),
        ("context", {"context": CONTEXT.tolist()}),
        ("context", {"context": None}),
        ("out", {"out": OUT[:1]}),
        ("out", {"out": OUT[:, :7]}),
        ("out", {"out": OUT[0]}),
        ("out", {"out": np.zeros((8, 2), np.float32).T}),
        ("out", {"out": OUT.astype(np.float64)}),
        ("out", {"out": READ_ONLY}),
        ("out", {"out": None}),
        ("nanoseconds", {"nanoseconds": np.zeros((1, len(_C.PHASES)))}),
        ("nanoseconds", {"nanoseconds": np.zeros((1, len(_C.PHASES) - 1), np.int64)}),
        ("nanoseconds", {"nanoseconds": np.zeros((2, len(_C.PHASES)), np.int64)}),
        ("nanoseconds", {"nanoseconds": np.zeros(len(_C.PHASES), np.int64)}),
        ("nanoseconds", {"nanoseconds": np.zeros((1, 2 * len(_C.PHASES)), np.int64)[:, ::2]}),
        ("nanoseconds", {"nanoseconds": np.broadcast_to(np.int64(0), (1, len(_C.PHASES)))}),
        ("nanoseconds", {"nanoseconds": 5}),
    ],
)
def test_run_names_what_does_not_fit(name, changes):
    model = _C.Model(3, 8, [LAST])
    arguments = {"context": CONTEXT, "out": OUT, **changes}
    with pytest.raises(ValueError, match=f"^{name}: "):
        model.run(**arguments)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_several_python_threads_at_once(precision, threads):
    _C.set_num_threads(2)
    model = network(precision)
    contexts = [normal(n, 5, 420) for n in (1, 3, 9, 70)]  # workspaces of every size go from hand to hand
    want = [run(model, context) for context in contexts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = list(pool.map(lambda context: run(model, context), contexts * 2))
            assert all(np.array_equal(g, w) for g, w in zip(got, want * 2, strict=True))


def test_the_number_of_threads_may_change_while_another_thread_runs_a_model(threads):
    # Longer than short, so that the scan has memory of its own for every thread.
    layers = [*[mamba_block("fp32", 128, 512) for _ in range(6)], ("last", {})]
    model, context = _C.Model(12, 128, layers), normal(1, 12, 128)
    want, done = run(model, context).tobytes(), threading.Event()

    def change():
        for count in itertools.cycle((1, 2, 3, 4)):
            _C.set_num_threads(count)
            if done.is_set():
                return

    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(change)
        wrong = sum(run(model, context).tobytes() != want for _ in range(100))
        done.set()
        changing.result()
    assert wrong == 0


def test_a_model_may_go_while_another_thread_runs_it():
    contexts = [normal(70, 5, 420) for _ in range(3)]
    model = network("int8")
    want = run(model, contexts[0])
    with ThreadPoolExecutor(3) as pool:
        work = [pool.submit(run, model, context) for context in contexts]
        del model
        assert all(part.result(timeout=60).tobytes() == want.tobytes() for part in work)


FORK = """
import os, sys, threading
sys.path[:0] = [{here!r}, {here!r} + '/..']
import test_model as t
t._C.set_num_threads(2)
model, context = t.network("int8"), t.normal(3, 5, 420)
want = t.run(model, context).tobytes()
other = threading.Thread(target=lambda: [t.run(model, context) for _ in range(100)])
other.start()
for _ in range(8):
    child = os.fork()
    if child == 0:
        same = all(t.run(model, context).tobytes() == want for _ in range(3))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
other.join()
assert t.run(model, context).tobytes() == want
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_runs_the_model_it_was_born_with():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK.format(here=str(Path(__file__).parent))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
