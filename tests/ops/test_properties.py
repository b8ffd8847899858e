"""Any shape, any strides, any dtype: the kernels read what the array means, never what lies beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastlvm
from fastlvm.ops._extension import _C

from . import oracle
from .cases import ALL, Conv, Scan
from .oracle import relative_error

VIEWS = ("plain", "transposed", "sliced", "reversed", "expanded", "offset", "padded")
HALF = {torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-13}
few = settings(
    max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def view(x: np.ndarray, how: str) -> np.ndarray:
    """The values of `x` in another layout, NaN in the gaps; "expanded" shows the values a 0 stride can."""
    gap = np.nan if x.dtype.kind == "f" else 0x7FC0  # the bits of a bfloat16 NaN
    every_other = tuple(slice(1, None, 2) for _ in x.shape)
    inside = tuple(slice(1, n + 1) for n in x.shape)
    backwards = tuple(slice(None, None, -1) for _ in x.shape)
    if how == "transposed":
        return np.ascontiguousarray(x.T).T
    if how == "sliced":
        wide = np.full([2 * n + 1 for n in x.shape], gap, x.dtype)
        wide[every_other] = x
        return wide[every_other]
    if how == "reversed":
        return np.ascontiguousarray(x[backwards])[backwards]
    if how == "expanded":
        return np.lib.stride_tricks.as_strided(x, x.shape, (*x.strides[:-1], 0))
    if how == "offset":  # one element into the buffer: no vector load is aligned
        flat = np.full(x.size + 1, gap, x.dtype)
        flat[1:] = x.ravel()
        return flat[1:].reshape(x.shape)
    if how == "padded":
        wide = np.full([n + 3 for n in x.shape], gap, x.dtype)
        wide[inside] = x
        return wide[inside]
    return x


def tensor_view(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same for torch, which has no negative strides; numpy carries bfloat16 as its bits."""
    how = "transposed" if how == "reversed" else how
    if x.dtype == torch.bfloat16:
        return torch.from_numpy(view(x.view(torch.int16).numpy(), how)).view(torch.bfloat16)
    return torch.from_numpy(view(x.numpy(), how))


def in_views(inputs: dict, data, *, numpy: bool) -> dict:
    out = {}
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor):
            how = data.draw(st.sampled_from(VIEWS), label=f"{name} is")
            x = view(x.numpy(), how) if numpy else tensor_view(x, how)
        out[name] = x
    return out


layouts = st.sampled_from(["dn", "bnl", "one", "two", "each"])
scans = st.builds(
    lambda batch, pairs, state, length, B, C, options: Scan(
        batch=batch,
        channels=2 * pairs,
        state=state,
        length=length,
        B={"one": 1, "two": 2, "each": 2 * pairs}.get(B, B),
        C={"one": 1, "two": 2, "each": 2 * pairs}.get(C, C),
        options=tuple(sorted(options)),
    ),
    batch=st.integers(0, 3),
    pairs=st.integers(1, 4),
    state=st.one_of(st.integers(0, 40), st.sampled_from([64, 128, 300])),
    length=st.integers(0, 20),
    B=layouts,
    C=layouts,
    options=st.sets(st.sampled_from(ALL)),
)
convs = st.builds(
    Conv,
    batch=st.integers(0, 3),
    channels=st.integers(0, 9),
    width=st.integers(1, 9),
    length=st.integers(0, 40),
    options=st.sets(st.sampled_from(["bias", "activation", "initial_state"])).map(lambda s: tuple(sorted(s))),
)


def _check(op, truth, inputs, tolerance, every_isa):
    wants, _ = oracle.run(truth, inputs)
    for isa in every_isa():
        outputs = op(**inputs, return_final_state=True, backend="cpu")
        for got, want in zip(outputs, wants, strict=True):
            limit = tolerance if str(got.dtype).removeprefix("torch.") != "float32" else 1e-5
            # Values are of order one: where a few of them happen to cancel, that is the scale to measure by.
            floor = max(1.0, want.numel() ** 0.5 / max(float(want.norm()), 1e-30))
            assert relative_error(got, want) <= limit * floor, isa


@pytest.mark.parametrize(
    ("op", "truth", "cases"),
    [(fastlvm.ssm_scan, oracle.ssm_scan, scans), (fastlvm.causal_conv1d, oracle.causal_conv1d, convs)],
    ids=["ssm_scan", "causal_conv1d"],
)
class TestAnyInput:
    @few
    @given(data=st.data())
    def test_numpy(self, op, truth, cases, data, every_isa):
        case = data.draw(cases)
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.float64]))
        weights = torch.float64 if dtype == torch.float64 else data.draw(st.sampled_from([torch.float32, dtype]))
        inputs = in_views(case.inputs(dtype, weights, data.draw(st.integers(0, 99))), data, numpy=True)
        _check(op, truth, inputs, HALF[dtype], every_isa)

    @few
    @given(data=st.data())
    def test_torch(self, op, truth, cases, data, every_isa):
        case = data.draw(cases)
        dtype = data.draw(st.sampled_from(list(HALF)))
        weights = torch.float64 if dtype == torch.float64 else data.draw(st.sampled_from([torch.float32, dtype]))
        inputs = in_views(case.inputs(dtype, weights, data.draw(st.integers(0, 99))), data, numpy=False)
        _check(op, truth, inputs, HALF[dtype], every_isa)

    @few
    @given(data=st.data())
    def test_gradients_of_any_view(self, op, truth, cases, data, every_isa):
        """Strided inputs and cotangents give the gradients of their contiguous copies."""
        case = data.draw(cases)
        inputs = in_views(case.inputs(), data, numpy=False)
        cotangents = [tensor_view(g, data.draw(st.sampled_from(VIEWS))) for g in case.cotangents()]

        def grads(copy):
            leaves = {k: copy(v).requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
            outputs = op(**{**inputs, **leaves}, return_final_state=True, backend="cpu")
            return torch.autograd.grad(outputs, list(leaves.values()), [copy(g) for g in cotangents])

        for isa in every_isa():
            strided = grads(lambda x: x.detach())
            contiguous = grads(lambda x: x.detach().contiguous())
            assert all(relative_error(s, c) <= 1e-5 for s, c in zip(strided, contiguous, strict=True)), isa


def test_views_show_what_they_say():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for how in VIEWS:
        want = np.broadcast_to(x[..., :1], x.shape) if how == "expanded" else x
        assert np.array_equal(view(x, how), want), how
        assert np.array_equal(tensor_view(torch.from_numpy(x).bfloat16(), how).float().numpy(), want), how
    assert view(x, "transposed").strides == (4, 8, 24)
    assert min(view(x, "reversed").strides) < 0
    assert view(x, "expanded").strides[-1] == 0


def test_memory_that_is_no_whole_number_of_elements_apart():
    """A field of a packed record is 5 bytes from the next: read right, by a copy."""
    inputs = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in Scan().inputs().items()}
    want = fastlvm.ssm_scan(**inputs, backend="cpu")
    packed = np.zeros(inputs["u"].shape, np.dtype([("flag", "i1"), ("value", "f4")]))
    packed["value"] = inputs["u"]
    got = fastlvm.ssm_scan(**{**inputs, "u": packed["value"]}, backend="cpu")
    assert np.array_equal(got, want)


def test_read_only_and_mapped_arrays(tmp_path, backend):
    inputs = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in Scan().inputs().items()}
    want = fastlvm.ssm_scan(**inputs, backend=backend)
    np.save(tmp_path / "u.npy", inputs["u"])
    mapped = np.load(tmp_path / "u.npy", mmap_mode="r")
    got = fastlvm.ssm_scan(**{**inputs, "u": mapped}, backend=backend)
    assert type(got) is np.ndarray
    assert np.array_equal(got, want)


def test_every_compiled_isa_is_known():
    assert set(_C.isas()) <= set(_C.compiled_isas()) <= {"scalar", "avx2", "avx512", "neon"}
    assert _C.isas()[0] == "scalar"
    with pytest.raises(ValueError, match="scalar"):
        _C.set_isa("mmx")
