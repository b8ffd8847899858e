"""torch.autocast changes nothing: no bit and no dtype, forward or backward, on any backend."""

from __future__ import annotations

import pytest
import torch

import fastlvm

from . import cases, ssd_cases, steps
from .steps import copied

WHOLE = {"ssm_scan": cases.Scan(), "causal_conv1d": cases.Conv(), "ssd_scan": ssd_cases.Ssd()}
STEPS = {case.name: case for case in steps.BASIC}

autocast = pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


def _same(got, want):
    assert [(g.dtype, g.shape) for g in got] == [(w.dtype, w.shape) for w in want]
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def _trained(call, inputs, cast):
    """Results and gradients of `call(**inputs)`, which is made under autocast to `cast` unless that is None."""
    leaves = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in copied(inputs).items()}
    with torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
        outputs = call(**leaves)
        loss = sum(o.float().sin().sum() for o in outputs)
    tensors = [v for v in leaves.values() if torch.is_tensor(v)]
    return [*outputs, *torch.autograd.grad(loss, tensors)]


@autocast
@dtypes
@pytest.mark.parametrize("name", WHOLE)
def test_sequences(name, dtype, cast, backend):
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = WHOLE[name].inputs(dtype, weights)

    def call(**args):
        return getattr(fastlvm, name)(**args, return_final_state=True, backend=backend)

    got = _trained(call, inputs, cast)
    _same(got, _trained(call, inputs, None))
    assert got[0].dtype == dtype
    assert got[1].dtype == (dtype if name == "causal_conv1d" else weights)


@autocast
@dtypes
@pytest.mark.parametrize("name", STEPS)
def test_one_token(name, dtype, cast, backend):
    case = STEPS[name]
    inputs = case.inputs(dtype, dtype)
    want = steps.advance(case, inputs, backend=backend)
    with torch.autocast("cpu", dtype=cast):
        _same(steps.advance(case, inputs, backend=backend), want)


@autocast
@dtypes
@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce(symmetric, dtype, cast, backend):
    g = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(6, 8, generator=g).to(dtype) for name in ("queries", "keys")}

    def call(queries, keys):
        return (fastlvm.info_nce(queries, keys, symmetric=symmetric, backend=backend),)

    _same(_trained(call, inputs, cast), _trained(call, inputs, None))


@pytest.mark.parametrize("name", WHOLE)
def test_second_derivatives(name):
    inputs = WHOLE[name].inputs()

    def call(**args):
        tensors = [v for v in args.values() if torch.is_tensor(v)]
        return torch.autograd.grad(getattr(fastlvm, name)(**args).square().sum(), tensors, create_graph=True)

    _same(_trained(call, inputs, torch.bfloat16), _trained(call, inputs, None))


@pytest.mark.parametrize("name", WHOLE)
def test_compiled_code(name):
    inputs = WHOLE[name].inputs(torch.bfloat16)

    def call(**args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return getattr(fastlvm, name)(**args, return_final_state=True)

    torch._dynamo.reset()
    _same(torch.compile(call, backend="aot_eager", fullgraph=True)(**inputs), call(**inputs))
