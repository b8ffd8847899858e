"""The causal convolution against its reference and torch's depthwise convolution. No target hangs on it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import contenders
import fastlvm
from cases import CONVS
from paired import Contender, measure


def by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """F.conv1d with one group a channel, padded on both sides and cut, then F.silu: what a Mamba block does."""
    width = weight.shape[1]
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=x.shape[1])[..., : x.shape[2]])


@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.id)
@pytest.mark.benchmark(group="causal_conv1d")
def test_conv(case, benchmark, threads, plan, rows):
    x, weight, bias = case.tensors()
    calls = {
        contenders.OP: lambda: fastlvm.causal_conv1d(x, weight, bias, "silu"),
        "reference": lambda: fastlvm.causal_conv1d(x, weight, bias, "silu", backend="reference"),
        "F.conv1d": lambda: by_torch(x, weight, bias),
    }
    exact = fastlvm.causal_conv1d(x.double(), weight.double(), bias.double(), "silu", backend="reference")
    made = [
        Contender(name, call, n, isa)
        for name, call in calls.items()
        for isa in (contenders.ISAS if name == contenders.OP else [contenders.BEST])
        for n in threads
    ]
    for one in made:
        assert contenders.relative(one.trial(), exact) <= contenders.FORWARD, one
    lead = next(
        one for one in made if (one.name, one.isa, one.threads) == (contenders.OP, contenders.BEST, threads[-1])
    )
    measure(benchmark, lead, [one for one in made if one is not lead], plan)
    rows.add(case, made)
