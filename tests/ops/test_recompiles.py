"""torch.compile sees few graphs however many sizes come, and its modes run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastlvm

from . import steps
from .cases import Conv, Scan
from .ssd_cases import Ssd

WHOLE = {"ssm_scan": Scan(), "causal_conv1d": Conv(), "ssd_scan": Ssd()}
SIZES = [(2, 6), (2, 9), (2, 17), (3, 17), (5, 100), (2, 33), (7, 65), (4, 200), (6, 32), (3, 2)]


def _compiled(op, **options):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(op, backend=counter, fullgraph=True, **options), counter


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_three_graphs_do_for_all_sizes(name, trained):
    """One of known sizes, one for any length, one for any batch; lengths on both sides of every chunk in a kernel."""
    op = getattr(fastlvm, name)
    compiled, counter = _compiled(op)
    for batch, length in SIZES:
        inputs = dataclasses.replace(WHOLE[name], batch=batch, length=length).inputs()
        leaves = {k: v.requires_grad_(trained) if torch.is_tensor(v) else v for k, v in inputs.items()}
        got, want = compiled(**leaves), op(**leaves)
        assert torch.equal(got, want)
        if trained:
            tensors = [v for v in leaves.values() if torch.is_tensor(v)]
            pairs = zip(*(torch.autograd.grad(y.square().sum(), tensors) for y in (got, want)), strict=True)
            assert all(torch.equal(g, w) for g, w in pairs)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", WHOLE)
def test_one_graph_does_if_sizes_are_dynamic_from_the_start(name):
    compiled, counter = _compiled(getattr(fastlvm, name), dynamic=True)
    for batch, length in [(7, 65), *SIZES]:  # what is equal in the first call torch takes for one symbol
        compiled(**dataclasses.replace(WHOLE[name], batch=batch, length=length).inputs())
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", steps.BASIC, ids=lambda case: case.name)
def test_tokens_come_without_another_graph(case):
    compiled, counter = _compiled(case.op)
    for batch in (2, 2, 2, 3, 5, 6, 9, 2):
        compiled(**dataclasses.replace(case, batch=batch).inputs())
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_of_inductor_change_nothing(mode):
    torch._dynamo.reset()
    compiled = torch.compile(fastlvm.ssm_scan, mode=mode, fullgraph=True)
    inputs = Scan().inputs()
    assert torch.equal(compiled(**inputs), fastlvm.ssm_scan(**inputs))
