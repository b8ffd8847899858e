"""The one-token ops on mlx arrays, against the oracle: what they write, and what they leave alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastlvm

from .mlx_arrays import BACKENDS, all_mlx, mx, to_mlx, to_torch
from .oracle import relative_error
from .steps import BASIC, Conv, Ssd, Ssm, truth

CASES = [*BASIC, Ssm(B=4, C="bn", options=()), Ssm(state=128, channels=18), Ssm(batch=0), Ssm(state=0), Ssm(channels=0)]
CASES += [Conv(extra=2), Conv(width=1, options=()), Conv(batch=0), Conv(channels=17), Ssd(whole_D=True), Ssd(batch=0)]
CASES += [Ssd(heads=6, groups=1, state=64, options=("z",))]
DTYPES = [(torch.float64, torch.float64, 1e-12), (torch.float16, torch.float32, 2e-3), (torch.bfloat16,) * 2 + (1e-2,)]

backends = pytest.mark.parametrize("backend", BACKENDS)
steps = pytest.mark.parametrize("case", BASIC, ids=lambda case: case.name)


def _check(case, inputs, backend, tolerance=1e-5):
    arrays = all_mlx(inputs)
    out = case.op(**arrays, backend=backend)
    want, states = truth(case, inputs)
    assert out.dtype == arrays["x"].dtype
    assert relative_error(to_torch(out), want) <= tolerance
    assert relative_error(to_torch(arrays["state"]), states) <= tolerance
    assert arrays["state"].dtype == to_mlx(inputs["state"]).dtype


@backends
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case}")
def test_matches_the_oracle(case, backend):
    _check(case, case.inputs(), backend)


@backends
@pytest.mark.parametrize(("dtype", "weights", "tolerance"), DTYPES, ids=str)
@steps
def test_every_dtype(case, dtype, weights, tolerance, backend):
    # mlx's own exp has the precision of float32 in float64, too.
    _check(case, case.inputs(dtype, weights), backend, max(tolerance, 1e-6 if backend == "reference" else 0))


@backends
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("slots", [(4, 0, 2), (3, -1, 1), (-1, -2, -1)], ids=str)
@steps
def test_rows_advance_the_states_they_name(case, slots, dtype, backend):
    case = dataclasses.replace(case, states=5)
    _check(case, case.inputs() | {"state_indices": torch.tensor(slots, dtype=dtype)}, backend)


@backends
@pytest.mark.parametrize(("slots", "says"), [((0, 1, 5), "5"), ((2, 1, 2), "2 twice")])
@steps
def test_an_index_that_names_no_state_or_one_twice(case, slots, says, backend):
    case = dataclasses.replace(case, states=5)
    arrays = all_mlx(case.inputs())
    before = to_torch(arrays["state"])
    with pytest.raises(ValueError, match=f"state_indices.*{says}"):
        case.op(**arrays, state_indices=mx.array(slots), backend=backend)
    assert torch.equal(to_torch(arrays["state"]), before)


@backends
@steps
def test_what_was_made_of_the_state_before_keeps_what_it_had(case, backend):
    """An mlx array is a value: no copy, view or pending result of the old one may change."""
    arrays = all_mlx(case.inputs())
    state = arrays["state"]
    before = to_torch(state)
    kept = mx.array(state), state.reshape(-1), state[1:], state + 0  # the last is computed after the step
    case.op(**arrays, backend=backend)
    assert not torch.equal(to_torch(state), before)
    for x, want in zip(kept, (before, before.reshape(-1), before[1:], before), strict=True):
        assert torch.equal(to_torch(x), want)


@backends
@steps
def test_views(case, backend):
    """Transposed, reversed, strided and repeated memory."""
    inputs = case.inputs()
    arrays = all_mlx(inputs)
    for name in ("x", "state"):
        swapped = mx.contiguous(mx.swapaxes(arrays[name], 0, 1))
        arrays[name] = mx.swapaxes(swapped, 0, 1)
    for name in ("z", "weight"):
        if name in arrays:
            arrays[name] = mx.repeat(arrays[name], 2, axis=-1)[..., ::2][::-1][::-1]
    out = case.op(**arrays, backend=backend)
    want, states = truth(case, inputs)
    assert relative_error(to_torch(out), want) <= 1e-5
    assert relative_error(to_torch(arrays["state"]), states) <= 1e-5


@backends
@steps
def test_a_gradient_is_refused(case, backend):
    arrays = all_mlx(case.inputs())
    x = arrays.pop("x")
    whole = {"ssm_step": "ssm_scan", "ssd_step": "ssd_scan", "causal_conv1d_step": "causal_conv1d"}[case.name]
    with pytest.raises(ValueError, match=f"{case.name}: a step in place has no gradient; use fastlvm.{whole}"):
        mx.grad(lambda x: case.op(x=x, **arrays, backend=backend).sum())(x)
    with pytest.raises(ValueError, match=f"{case.name}: a step in place has no gradient"):
        mx.jvp(lambda x: case.op(x=x, **arrays, backend=backend), [x], [mx.ones_like(x)])


@backends
@pytest.mark.parametrize("transform", [mx.compile, mx.vmap], ids=["compile", "vmap"])
@steps
def test_a_traced_step_is_refused(case, transform, backend):
    """There the caller's state would stay as it was."""
    arrays = all_mlx(case.inputs())
    x = arrays.pop("x")
    x = x[None] if transform is mx.vmap else x
    with pytest.raises(ValueError, match=f"{case.name}: mlx traces this call .* use fastlvm"):
        transform(lambda x: case.op(x=x, **arrays, backend=backend))(x)


def test_a_step_continues_a_scan():
    rng = torch.Generator().manual_seed(0)
    u, delta, B = (to_mlx(torch.randn(2, 4, 9, generator=rng)) for _ in range(3))
    A = -mx.ones((4, 4))
    want, last = fastlvm.ssm_scan(u, delta, A, B, B, delta_softplus=True, return_final_state=True)
    first, state = fastlvm.ssm_scan(
        *(x[..., :8] for x in (u, delta)),
        A,
        B[..., :8],
        B[..., :8],
        delta_softplus=True,
        return_final_state=True,
    )
    out = fastlvm.ssm_step(state, u[..., 8], delta[..., 8], A, B[..., 8], B[..., 8], delta_softplus=True)
    assert mx.allclose(mx.concatenate([first, out[..., None]], axis=-1), want, rtol=1e-5, atol=1e-6).item()
    assert mx.allclose(state, last, rtol=1e-5, atol=1e-6).item()
