"""The ops that no target hangs on, against their references; the convolution against torch's depthwise one as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import contenders
import fastlvm
from cases import OTHERS, Conv, Ssd, Step, id_of
from paired import Contender, measure


def by_torch(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """F.conv1d with one group a channel, padded on both sides and cut, then F.silu: what a Mamba block does."""
    width = weight.shape[1]
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=x.shape[1])[..., : x.shape[2]])


def pass_of(case: Conv | Ssd | Step, op: Callable[..., Tensor], arguments: dict[str, Any]) -> Callable[[], tuple]:
    """The output and, backward, the gradients of all arguments."""
    if not case.gradient:
        return lambda: (op(**arguments),)
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items() if isinstance(x, Tensor)}
    given = {**arguments, **leaves}
    cotangent = torch.ones_like(op(**given))

    def both() -> tuple:
        out = op(**given)
        return out, *torch.autograd.grad(out, list(leaves.values()), cotangent)

    return both


def apart(found: tuple, wanted: tuple) -> float:
    return max(contenders.relative(a.detach(), b.detach()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("case", OTHERS, ids=id_of)
@pytest.mark.benchmark(group="others")
def test_other(case, benchmark, threads, plan, rows):
    op = getattr(fastlvm, case.op)
    calls = {contenders.OP: op, "reference": lambda **named: op(**named, backend="reference")}
    if isinstance(case, Conv):
        calls["F.conv1d"] = by_torch
    doubles = {k: v.double() if isinstance(v, Tensor) else v for k, v in case.arguments().items()}
    exact = pass_of(case, calls["reference"], doubles)()
    made = []
    for name, call in calls.items():
        for isa in contenders.ISAS if name == contenders.OP else [contenders.BEST]:
            for n in threads:
                made.append(Contender(name, pass_of(case, call, case.arguments()), n, isa))
                # A step changes its state: the first call alone has the exact one's.
                limit = contenders.GRADIENT if case.gradient else contenders.FORWARD
                assert apart(made[-1].trial(), exact) <= limit, made[-1]
    lead = next(
        one for one in made if (one.name, one.isa, one.threads) == (contenders.OP, contenders.BEST, threads[-1])
    )
    measure(benchmark, lead, [one for one in made if one is not lead], plan)
    rows.add(case, made)
