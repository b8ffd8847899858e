"""What the one-token ops have in common: which states they write and where, in any dtype and memory, on any backend."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastlvm
from fastlvm.ops._extension import _C

from .oracle import relative_error
from .steps import BASIC, SSD, SSM, Conv, Ssd, Ssm, advance, as_numpy, copied, truth
from .test_properties import HALF, VIEWS, few, in_views, tensor_view, view

NAMES = [case.name for case in BASIC]
PLACES = tuple(how for how in VIEWS if how != "expanded")  # views with a place for each element
steps = pytest.mark.parametrize("case", BASIC, ids=NAMES)
kinds = pytest.mark.parametrize("kind", ["numpy", "torch"])


def _as(kind, inputs):
    return inputs if kind == "torch" else as_numpy(inputs)


def _bits(x):
    if isinstance(x, torch.Tensor):
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        x = x.detach().clone(memory_format=torch.contiguous_format).view(integers[x.element_size()]).numpy()
    return np.ascontiguousarray(x).tobytes()


# Which states


@steps
@pytest.mark.parametrize(("kind", "dtype"), [("numpy", "int32"), ("torch", "int64")])
@pytest.mark.parametrize("slots", [[4, 0, 2], [-1, 3, -7], [-1, -1, -1], [2, 1, 0]], ids=str)
def test_rows_advance_the_states_they_name(case, kind, slots, dtype, backend):
    case = dataclasses.replace(case, states=5)
    inputs = _as(kind, case.inputs())
    untouched = [s for s in range(5) if s not in slots]
    if 0 not in slots:
        inputs["state"].reshape(-1).view((torch if kind == "torch" else np).int32)[0] = 0x7FC00001  # a NaN to be kept
    indices = torch.tensor(slots, dtype=getattr(torch, dtype))
    inputs["state_indices"] = indices if kind == "torch" else indices.numpy()
    for i, slot in enumerate(slots):
        if slot < 0:
            inputs["x"][i] = float("nan")  # what padding holds is of no account
    true_out, true_state = truth(case, inputs)
    out, state = advance(case, inputs, backend=backend)
    assert relative_error(out, true_out) <= 1e-5
    used = [s for s in slots if s >= 0]
    assert relative_error(state[used], true_state[used]) <= 1e-5
    assert _bits(state[untouched]) == _bits(inputs["state"][untouched])
    assert not out[[i for i, slot in enumerate(slots) if slot < 0]].any()


@kinds
@steps
@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 5, 1], "state_indices: got 5, wants less than 5"),
        ([0, 2**31 - 1, 1], "state_indices: got 2147483647, wants less than 5"),
        ([3, 1, 3], "state_indices: got 3 twice, wants every state at most once"),
        ([-1, 0, 0], "state_indices: got 0 twice"),
    ],
    ids=["out-of-range", "far-out", "twice", "twice-beside-padding"],
)
def test_indices_that_name_no_state_or_one_twice(case, kind, slots, message, backend):
    case = dataclasses.replace(case, states=5)
    inputs = _as(kind, case.inputs())
    indices = torch.tensor(slots)
    inputs["state_indices"] = indices if kind == "torch" else indices.numpy()
    before = _bits(inputs["state"])
    with pytest.raises(ValueError, match=message):
        case.op(**inputs, backend=backend)
    assert _bits(inputs["state"]) == before


@kinds
@steps
def test_indices_may_be_strided_and_rows_none(case, kind, backend):
    case = dataclasses.replace(case, states=5)
    inputs = _as(kind, case.inputs())
    wide = torch.tensor([4, 9, 0, 9, 2, 9])
    plain = {**inputs, "state_indices": torch.tensor([4, 0, 2]) if kind == "torch" else np.array([4, 0, 2])}
    strided = {**inputs, "state_indices": (wide if kind == "torch" else wide.numpy())[::2]}
    for got, want in zip(advance(case, strided, backend=backend), advance(case, plain, backend=backend), strict=True):
        assert _bits(got) == _bits(want)
    nobody = dataclasses.replace(case, batch=0, states=5)
    inputs = _as(kind, nobody.inputs())
    inputs["state_indices"] = torch.zeros(0, dtype=torch.int64) if kind == "torch" else np.zeros(0, np.int64)
    out, state = advance(nobody, inputs, backend=backend)
    assert out.shape[0] == 0
    assert _bits(state) == _bits(inputs["state"])


# Where they lie


@kinds
@steps
@pytest.mark.parametrize("how", PLACES)
def test_a_state_is_written_where_it_lies(case, how, kind, backend):
    """Any strides, and not a bit of the gaps between."""
    inputs = _as(kind, case.inputs())
    want, after = advance(case, inputs, backend=backend)
    state = inputs["state"].numpy() if kind == "torch" else inputs["state"]
    there = tensor_view(inputs["state"].clone(), how) if kind == "torch" else view(state.copy(), how)
    whole = there.numpy() if kind == "torch" else there
    while whole.base is not None and isinstance(whole.base, np.ndarray):
        whole = whole.base
    before = whole.copy()
    out = case.op(**{**inputs, "state": there}, backend=backend)
    assert relative_error(out, want) <= 1e-6
    assert relative_error(there, after) <= 1e-6
    there[...] = inputs["state"]
    assert whole.tobytes() == before.tobytes()


@steps
def test_a_state_that_is_no_whole_number_of_elements_apart(case, backend):
    inputs = as_numpy(case.inputs())
    want, after = advance(case, inputs, backend=backend)
    packed = np.zeros(inputs["state"].shape, np.dtype([("flag", "i1"), ("value", "f4")]))
    packed["value"] = inputs["state"]
    out = case.op(**{**inputs, "state": packed["value"]}, backend=backend)
    assert np.array_equal(out, want)
    assert np.array_equal(packed["value"], after)
    assert not packed["flag"].any()


@kinds
@steps
def test_elements_that_overlap_are_refused(case, kind, backend):
    inputs = _as(kind, case.inputs())
    shape = tuple(inputs["state"].shape)
    flat = np.zeros(200, np.float32)
    itemsize = flat.itemsize
    expanded = np.lib.stride_tricks.as_strided(flat, shape, (*[itemsize * 16] * (len(shape) - 1), 0))
    windows = np.lib.stride_tricks.as_strided(flat, shape, (itemsize * 20, *[itemsize] * (len(shape) - 1)))
    for state, message in ((expanded, "state has stride 0"), (windows, "state: got memory in which elements may over")):
        wrong = torch.from_numpy(state) if kind == "torch" else state
        with pytest.raises(ValueError, match=message):
            case.op(**{**inputs, "state": wrong}, backend=backend)
    assert not flat.any()


@steps
def test_a_read_only_state_is_refused(case, backend):
    inputs = as_numpy(case.inputs())
    inputs["state"].flags.writeable = False
    with pytest.raises(ValueError, match=f"{case.name}: state is read-only; wants an array that can be written"):
        case.op(**inputs, backend=backend)


@steps
def test_other_inputs_are_left_alone(case, backend):
    inputs, before = case.inputs(), case.inputs()
    case.op(**inputs, backend=backend)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(inputs[name], value) == (name != "state"), name


# In which dtype

DTYPES = [(a, w) for a in (torch.float32, torch.float16, torch.bfloat16) for w in (torch.float32, a)]


@steps
@pytest.mark.parametrize("state", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dtype", "weights"), list(dict.fromkeys(DTYPES)), ids=str)
def test_every_dtype(case, dtype, weights, state, backend):
    """float32 arithmetic on what the dtypes hold, one rounding at the end."""
    inputs = case.inputs(dtype, weights)
    inputs["state"] = inputs["state"].to(state)
    true_out, true_state = truth(case, inputs)
    out, after = advance(case, inputs, backend=backend)
    assert (out.dtype, after.dtype) == (dtype, state)
    rounding = {torch.float32: 1e-5, torch.float16: 2.0**-11 * 1.01, torch.bfloat16: 2.0**-8 * 1.01}
    for got, want, limit in ((out, true_out, rounding[dtype]), (after, true_state, rounding[state])):
        torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=limit, atol=1e-5)


@steps
def test_half_precision_numpy(case, backend):
    inputs = as_numpy(case.inputs(torch.float16, torch.float16))
    true_out, true_state = truth(case, inputs)
    out, after = advance(case, inputs, backend=backend)
    assert out.dtype == after.dtype == np.float16
    np.testing.assert_allclose(out, true_out, 1e-3, 1e-5)
    np.testing.assert_allclose(after, true_state, 1e-3, 1e-5)


sizes = st.one_of(st.integers(0, 40), st.sampled_from([64, 128, 300]))
ssms = st.builds(
    lambda pairs, B, C, **rest: Ssm(
        channels=2 * pairs, B={"each": 2 * pairs}.get(B, B), C={"each": 2 * pairs}.get(C, C), **rest
    ),
    batch=st.integers(0, 3),
    pairs=st.integers(1, 40),
    state=sizes,
    B=st.sampled_from(["bn", 1, 2, "each"]),
    C=st.sampled_from(["bn", 1, 2, "each"]),
    options=st.sets(st.sampled_from(SSM)).map(sorted).map(tuple),
)
convs = st.builds(
    Conv,
    batch=st.integers(0, 3),
    channels=st.one_of(st.integers(0, 20), st.just(300)),
    width=st.integers(1, 9),
    extra=st.integers(0, 3),
    options=st.sets(st.sampled_from(["bias", "activation"])).map(sorted).map(tuple),
)
ssds = st.builds(
    lambda pairs, groups, **rest: Ssd(heads=2 * pairs, groups={"each": 2 * pairs}.get(groups, groups), **rest),
    batch=st.integers(0, 3),
    pairs=st.integers(1, 3),
    channels=st.one_of(st.integers(0, 9), st.just(70)),
    state=sizes,
    groups=st.sampled_from([1, 2, "each"]),
    whole_D=st.booleans(),
    options=st.sets(st.sampled_from(SSD)).map(sorted).map(tuple),
)


@pytest.mark.parametrize("cases", [ssms, convs, ssds], ids=NAMES)
class TestAnyInput:
    @few
    @kinds
    @given(data=st.data())
    def test_any_view_of_any_shape(self, cases, kind, data, every_isa):
        """Every argument in a layout of its own, NaN beside it; the state among them, with indices or without."""
        case = data.draw(cases)
        pool = data.draw(st.one_of(st.none(), st.integers(case.batch, 6)))
        case = dataclasses.replace(case, states=pool)
        dtype = data.draw(st.sampled_from([d for d in HALF if kind == "torch" or d != torch.bfloat16]))
        weights = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = case.inputs(dtype, weights, data.draw(st.integers(0, 99)))
        state = inputs.pop("state")
        inputs = in_views(inputs, data, numpy=kind == "numpy")
        how = data.draw(st.sampled_from(PLACES), label="state is")
        inputs["state"] = tensor_view(state, how) if kind == "torch" else view(state.numpy(), how)
        if pool is not None:
            order = data.draw(st.permutations(range(pool)))[: case.batch]
            padding = data.draw(st.lists(st.booleans(), min_size=case.batch, max_size=case.batch))
            slots = torch.tensor([-1 if p else s for s, p in zip(order, padding, strict=True)], dtype=torch.int64)
            inputs["state_indices"] = slots if kind == "torch" else slots.numpy()
        wants, before = truth(case, inputs), copied(inputs)
        for isa in every_isa():
            inputs["state"][...] = before["state"]
            out = case.op(**inputs, backend="cpu")
            for got, want in zip((out, inputs["state"]), wants, strict=True):
                limit = HALF[dtype] if str(got.dtype).removeprefix("torch.") != "float32" else 1e-5
                # Values are of order one: where a few of them happen to cancel, that is the scale to measure by.
                floor = max(1.0, want.size**0.5 / max(float(np.linalg.norm(want)), 1e-30))
                assert relative_error(got, want) <= limit * floor, isa


# On how many threads


LARGE = [
    Ssm(batch=5, channels=531, state=65, B=3, C=9),
    Ssm(batch=130, channels=258, state=4),
    Conv(batch=7, channels=9000),
    Ssd(batch=3, heads=10, channels=70, state=130),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_same_bits_on_any_number_of_threads(case, isa, threads):
    inputs = case.inputs()
    inputs["state_indices"] = torch.randperm(case.batch, generator=torch.Generator().manual_seed(0))
    fastlvm.set_num_threads(1)
    want = [_bits(x) for x in advance(case, inputs, backend="cpu")]
    for count in (2, 3):
        fastlvm.set_num_threads(count)
        assert all([_bits(x) for x in advance(case, inputs, backend="cpu")] == want for _ in range(3))


# Called straight through _C, where nothing else has looked at the arguments


def _raw(case, **changes):
    inputs = {**as_numpy(copied(case.inputs())), **changes}
    inputs.setdefault("out", np.zeros_like(inputs["x"]))
    inputs.setdefault("state_indices", None)
    if "activation" in inputs:
        inputs["silu"] = inputs.pop("activation") is not None
    getattr(_C, case.name)(**inputs)
    return inputs["out"]


WRONG = [(case, name) for case in BASIC for name, x in case.inputs().items() if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(("case", "name"), WRONG, ids=lambda v: v if isinstance(v, str) else v.name)
def test_the_extension_checks_every_shape(case, name):
    want = case.inputs()[name]
    assert np.array_equal(_raw(case), _raw(case, **{name: want.numpy()}))
    for axis in range(want.ndim):
        for change in (-1, 1):
            if case.name == "causal_conv1d_step" and (name, axis) in (("state", 2), ("weight", 1)):
                continue  # held to each other below
            if (name, axis, want.ndim, change) in (("B", 1, 3, -1), ("C", 1, 3, -1)):
                continue  # one group is as good as two
            shape = [n + change * (i == axis) for i, n in enumerate(want.shape)]
            with pytest.raises(ValueError, match=": got "):
                _raw(case, **{name: np.zeros(shape, np.float32)})
    with pytest.raises(ValueError, match=": got "):
        _raw(case, **{name: np.zeros((1,) * 5, np.float32)})
    with pytest.raises(ValueError, match=": got "):
        _raw(case, **{name: want.double().numpy()})


@steps
def test_the_extension_checks_indices_and_memory(case):
    def indices(*values):
        return np.array(values)

    for wrong in (indices(0, 1), indices(0, 1, 2, 3), indices(0, 1, 3), indices(1, 1, 2), indices(0.0, 1.0, 2.0)):
        with pytest.raises(ValueError, match="state_indices: "):
            _raw(case, state_indices=wrong)
    shape = tuple(case.inputs()["state"].shape)
    flat = np.zeros(200, np.float32)
    for strides in ((0, *[64] * (len(shape) - 1)), (80, *[4] * (len(shape) - 1))):
        with pytest.raises(ValueError, match="state: got memory in which elements may overlap"):
            _raw(case, state=np.lib.stride_tricks.as_strided(flat, shape, strides))
    frozen = np.zeros(shape, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="state: cannot be written to"):
        _raw(case, state=frozen)
    with pytest.raises(ValueError, match="without state_indices"):
        _raw(case, state=np.zeros((5, *shape[1:]), np.float32))
    with pytest.raises(ValueError, match="out: got "):
        _raw(case, out=np.zeros(shape[:1], np.float32))


def test_the_extension_checks_the_length_of_a_convolutions_state():
    with pytest.raises(ValueError, match=r"state: got .* wants at least W - 1 = 3 inputs a channel"):
        _raw(Conv(), state=np.zeros((3, 4, 2), np.float32))
    with pytest.raises(ValueError, match=r"weight: got .* W >= 1"):
        _raw(Conv(), weight=np.zeros((4, 0), np.float32))


def test_a_sliding_window_that_does_not_overlap_is_taken():
    """Pages of a pool: a state every other row, each row a page of its own."""
    case = Ssm(batch=2, channels=3, state=4, B="bn", C="bn")
    inputs = as_numpy(case.inputs())
    pool = np.zeros((2, 2, 3, 7), np.float32)
    pages = pool[:, 1, :, 2:6]
    pages[...] = inputs["state"]
    want, after = advance(case, inputs)
    assert np.array_equal(fastlvm.ssm_step(**{**inputs, "state": pages}), want)
    assert np.array_equal(pages, after)
    assert not pool[:, 0].any()
