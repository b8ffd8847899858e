"""The sequence ops and the loss on mlx arrays, against the float64 oracles: the kernels, and plain mlx."""

from __future__ import annotations

import functools

import pytest
import torch

import fastlvm

from . import cases, nce_cases, ssd_cases
from .cases import CONVS, SCANS, Conv, Scan
from .mlx_arrays import BACKENDS, all_mlx, gradients, mx, to_mlx, to_torch
from .nce_cases import Nce
from .oracle import relative_error
from .ssd_cases import Ssd
from .test_packed import _alone, _inputs

FORWARD, GRADIENT = 1e-5, 1e-4
HALF = {torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}
OPS = {Scan: fastlvm.ssm_scan, Conv: fastlvm.causal_conv1d, Ssd: fastlvm.ssd_scan}
WHOLE = [("mlx", case) for case in (*SCANS, *CONVS, *ssd_cases.GRID)]
WHOLE += [("reference", case) for case in (*SCANS[::3], *CONVS[::3], *ssd_cases.GRID[::3])]
LOSSES = [("mlx", case) for case in nce_cases.GRID if case.batch <= 130]  # the oracle takes seconds for more
LOSSES += [("reference", case) for case in nce_cases.GRID[::3] if case.batch <= 130]
SOME = [Scan(state=16, length=33, B=2), Scan(state=128, length=5), Conv(length=9), Ssd(length=70, state=16)]

backends = pytest.mark.parametrize("backend", BACKENDS)


def _gradients(case, dtype, weights, backend):
    """Outputs, gradients, and the truth about both."""
    op = functools.partial(OPS[type(case)], return_final_state=True, backend=backend)
    truth = ssd_cases.truth if isinstance(case, Ssd) else cases.truth
    out, state = case.cotangents()
    of_state = dtype if isinstance(case, Conv) else torch.float64 if dtype == torch.float64 else torch.float32
    cotangents = [to_mlx(out.to(dtype)), to_mlx(state.to(of_state))]
    return gradients(op, all_mlx(case.inputs(dtype, weights)), cotangents), truth(case, dtype, weights)


@pytest.mark.parametrize(("backend", "case"), WHOLE, ids=lambda x: f"{type(x).__name__}-{x}")
def test_matches_the_oracle(case, backend):
    ((out, final), grads), ((true_out, true_final), true_grads) = _gradients(
        case, torch.float32, torch.float32, backend
    )
    assert out.dtype == final.dtype == torch.float32
    assert relative_error(out, true_out) <= FORWARD
    assert relative_error(final, true_final) <= FORWARD
    assert grads.keys() == true_grads.keys()
    errors = {name: relative_error(grads[name], true_grads[name]) for name in grads}
    assert max(errors.values()) <= GRADIENT, errors


# mlx's own exp has the precision of float32 in float64, too.
@pytest.mark.parametrize(("backend", "forward", "gradient"), [("mlx", 1e-13, 1e-12), ("reference", 1e-6, 1e-6)])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_float64(case, backend, forward, gradient):
    (outputs, grads), (truths, true_grads) = _gradients(case, torch.float64, torch.float64, backend)
    assert {x.dtype for x in (*outputs, *grads.values())} == {torch.float64}
    assert all(relative_error(x, true) <= forward for x, true in zip(outputs, truths, strict=True))
    errors = {name: relative_error(grads[name], true_grads[name]) for name in grads}
    assert max(errors.values()) <= gradient, errors


@backends
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32-weights", "all-half"])
@pytest.mark.parametrize("dtype", list(HALF), ids=str)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_half_precision(case, dtype, weights, backend):
    ((out, final), grads), ((true_out, true_final), true_grads) = _gradients(case, dtype, weights or dtype, backend)
    rtol, atol = HALF[dtype]
    assert (out.dtype, final.dtype) == (dtype, dtype if isinstance(case, Conv) else torch.float32)
    torch.testing.assert_close(out.double(), true_out, rtol=rtol, atol=atol)
    torch.testing.assert_close(final.double(), true_final, rtol=rtol, atol=atol)
    inputs = case.inputs(dtype, weights or dtype)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert relative_error(grad, true_grads[name]) <= {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype], name


@backends
@pytest.mark.parametrize("lengths", [(), (0,), (6,), (0, 3, 0, 0, 5, 0), (64, 1, 257, 0, 33)], ids=str)
@pytest.mark.parametrize("case", [Scan(state=16), Scan(B=2, C="dn"), Conv(), Conv(width=1)], ids=str)
def test_packed_sequences_are_each_alone(case, lengths, backend):
    op, inputs = OPS[type(case)], _inputs(case, lengths)
    got = op(**all_mlx(inputs), return_final_state=True, backend=backend)
    want = _alone(functools.partial(op, return_final_state=True, backend="cpu"), **inputs)
    assert all(relative_error(to_torch(x), true) <= FORWARD for x, true in zip(got, want, strict=True))


@backends
@pytest.mark.parametrize(("offsets", "says"), [([1, 6], "begins with 1"), ([0, 4, 3, 6], "falls"), ([0, 5], "ends")])
@pytest.mark.parametrize("op", [fastlvm.ssm_scan, fastlvm.causal_conv1d])
def test_packed_sequences_that_do_not_fit(op, offsets, says, backend):
    case = Scan(batch=1, options=()) if op is fastlvm.ssm_scan else Conv(batch=1, options=())
    with pytest.raises(ValueError, match=says):
        op(**all_mlx(case.inputs()), cu_seqlens=mx.array(offsets), backend=backend)


@pytest.mark.parametrize(("backend", "case"), LOSSES, ids=str)
def test_the_loss_matches_the_oracle(case, backend):
    op = functools.partial(fastlvm.info_nce, backend=backend)
    want, true_grads = nce_cases.truth(case)
    [loss], grads = gradients(op, all_mlx(case.inputs()), [to_mlx(case.cotangent())])
    assert loss.dtype == torch.float32
    assert relative_error(loss, want) <= FORWARD
    assert all(relative_error(grads[name], true_grads[name]) <= GRADIENT for name in grads)


@backends
@pytest.mark.parametrize("dtype", list(HALF), ids=str)
def test_the_loss_in_half_precision(dtype, backend):
    case = Nce(70, 70, 16, mask=2, symmetric=True)
    want, true_grads = nce_cases.truth(case, dtype)
    op = functools.partial(fastlvm.info_nce, backend=backend)
    [loss], grads = gradients(op, all_mlx(case.inputs(dtype)), [to_mlx(case.cotangent())])
    assert loss.dtype == torch.float32
    assert relative_error(loss, want) <= FORWARD
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert relative_error(grad, true_grads[name]) <= 4 * torch.finfo(dtype).eps


@backends
def test_the_mean_over_no_query_is_nan(backend):
    assert mx.isnan(fastlvm.info_nce(mx.zeros((0, 4)), mx.zeros((3, 4)), backend=backend)).item()


@backends
def test_a_sum_over_no_element_comes_back(backend):
    """mlx may go on for ever over an empty result of a custom function."""
    empty, A = mx.zeros((0, 4, 3)), -mx.ones((4, 2))

    def total(u):
        return fastlvm.ssm_scan(u, u, A, A, A, backend=backend).sum()

    for _ in range(200):
        mx.eval(mx.random.normal((3, 4, 5, 6, 2)).sum((0, 2)))  # leaves something in memory
        value, grad = mx.value_and_grad(total)(empty)
        assert value.item() == 0 and grad.sum().item() == 0
