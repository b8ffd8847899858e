"""The Metal kernels of the one-token ops, emulated, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

from fastlvm.ops import _metal  # noqa: E402
from fastlvm.ops.causal_conv1d_step import metal as convolution  # noqa: E402
from fastlvm.ops.ssm_step import metal as scan  # noqa: E402
from ops.mlx_arrays import to_torch  # noqa: E402
from ops.oracle import relative_error  # noqa: E402
from ops.steps import SSM, Conv, Ssm, truth  # noqa: E402

from .calls import CONV_STEP, FORWARD, HALF, STEP, arguments  # noqa: E402

CASES = [Ssm(state=n, channels=6) for n in (0, 1, 3, 16, 128, 300)]
CASES += [Ssm(B=b, C=c) for b, c in [("bn", "bn"), (1, 4), (4, 2)]]
CASES += [Ssm(options=o) for o in [(), *((name,) for name in SSM)]]
CASES += [Ssm(batch=b, channels=d) for b, d in [(0, 4), (2, 0), (1, 2), (5, 130)]]
CASES += [Conv(), Conv(width=1), Conv(width=2, extra=3), Conv(width=1, extra=2), Conv(options=())]
CASES += [Conv(batch=b, channels=d) for b, d in [(0, 4), (2, 0), (3, 270)]]


def run(case, inputs):
    """Output and states after it, as torch tensors."""
    step, names = (convolution.step, CONV_STEP) if isinstance(case, Conv) else (scan.step, STEP)
    return [to_torch(x) for x in step(*arguments(names, inputs))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case}")
def test_matches_the_oracle(case):
    inputs = case.inputs()
    for got, want in zip(run(case, inputs), truth(case, inputs), strict=True):
        assert got.dtype == torch.float32
        assert relative_error(got, want) <= FORWARD


@pytest.mark.parametrize("state", [torch.float32, None], ids=["float32-state", "all-half"])
@pytest.mark.parametrize("dtype", list(HALF), ids=str)
@pytest.mark.parametrize("case", [Ssm(state=16), Conv()], ids=lambda case: case.name)
def test_half_precision(case, dtype, state):
    inputs = case.inputs(dtype, state or dtype)
    out, after = run(case, inputs)
    assert (out.dtype, after.dtype) == (dtype, state or dtype)
    rtol, atol = HALF[dtype]
    for got, want in zip((out, after), truth(case, inputs), strict=True):
        torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", [Ssm(batch=4, states=6), Conv(batch=4, states=6)], ids=lambda case: case.name)
def test_a_pool_of_states_with_padding(case, kind):
    inputs = case.inputs() | {"state_indices": torch.tensor([5, -1, 0, 3], dtype=kind)}
    for got, want in zip(run(case, inputs), truth(case, inputs), strict=True):
        assert relative_error(got, want) <= FORWARD


@pytest.mark.parametrize("case", [Ssm(batch=3, states=2), Conv(batch=3, states=2)], ids=lambda case: case.name)
def test_an_index_of_no_state_gives_nan_and_moves_nothing(case):
    inputs = case.inputs() | {"state_indices": torch.tensor([2, 1, 99])}
    out, after = run(case, inputs)
    assert bool(out[[0, 2]].isnan().all())
    assert bool(out[1].isfinite().all())
    assert torch.equal(after[0], inputs["state"][0])
    assert not torch.equal(after[1], inputs["state"][1])


@pytest.mark.parametrize("case", [Ssm(state=16, channels=40), Conv(channels=40)], ids=lambda case: case.name)
def test_any_strides(case):
    step, names = (convolution.step, CONV_STEP) if isinstance(case, Conv) else (scan.step, STEP)
    inputs = case.inputs()
    named = dict(zip(names, arguments(names, inputs), strict=True))
    for key in ("state", "x", "delta", "z", "B", "C"):
        if named.get(key) is not None:
            named[key] = mx.contiguous(named[key].swapaxes(0, -1)).swapaxes(0, -1)
    for got, want in zip(step(*(named[key] for key in names)), truth(case, inputs), strict=True):
        assert relative_error(to_torch(got), want) <= FORWARD


def test_a_threadgroup_takes_rows_in_turn(monkeypatch, recorder):
    monkeypatch.setattr(_metal, "GROUPS", 1)
    case = Ssm(batch=19)
    inputs = case.inputs()
    for got, want in zip(run(case, inputs), truth(case, inputs), strict=True):
        assert relative_error(got, want) <= FORWARD
    assert recorder.launches[-1].grid[1] == 2  # 16 of them, and 3


def test_the_state_given_is_left_alone():
    case = Ssm()
    args = arguments(STEP, case.inputs())
    before = np.array(args[0])
    scan.step(*args)
    assert np.array_equal(before, np.array(args[0]))
