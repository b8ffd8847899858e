"""info_nce against F.cross_entropy over all logits, forward + backward: time in paired rounds, peak memory, the loss.

On as many threads as there are up to 2; 32,768 rows take F.cross_entropy 13 GB. Smaller numbers of rows are where
"auto" changes over, with the loss alone as well.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import contenders
import memory
import nce_losses
from nce_losses import AUTO, CPU, LOSSES, TORCH, Nce
from paired import Contender, measure
from results import figures

PUBLISHED = (256, 4096, 32768)
DTYPES = (torch.float32, torch.bfloat16)
# Of bfloat16, whose logits and losses F.cross_entropy rounds: what it then is off by at most.
HALF_LOSS, HALF_GRADIENT = 2e-2, 1e-1
CROSSING = (64, 512, 1024, 2048)
_DENSE_PEAK = 3.2  # arrays of all logits


def _measured(benchmark: Any, case: Nce, passes: Any, names: list[str], threads: int, plan: Any) -> list[Contender]:
    made = [Contender(name, passes(name, case), threads, contenders.BEST, decisive=True) for name in names]
    first: tuple[Tensor, ...] | None = None
    whole = case.dtype == torch.float32
    limits = (contenders.FORWARD, contenders.GRADIENT) if whole else (HALF_LOSS, HALF_GRADIENT)
    for one in made:
        found = one.trial()
        first = first or found
        for i, (got, wanted) in enumerate(zip(found, first, strict=True)):
            assert contenders.relative(got.float(), wanted.float()) <= limits[min(i, 1)], one.name
        benchmark.extra_info[f"loss by {one.name}"] = float(found[0])
    del first, found
    measure(benchmark, made[0], made[1:], plan)
    return made


def _report(benchmark: Any, lines: list[str], title: str, made: list[Contender], peaks: dict[str, Any]) -> None:
    for one in made:
        if not one.seconds:  # with --benchmark-disable
            continue
        row = figures(one)
        peak = peaks.get(one.name, {})
        weighed = f"{peak['extra'] / 1e6:10,.0f} MB at the peak" if "extra" in peak else peak.get("reason", "")
        loss = benchmark.extra_info[f"loss by {one.name}"]
        times = f"{row['median_ms']:11.2f} ({row['p10_ms']:.2f} to {row['p90_ms']:.2f}), {row['rounds']}"
        lines.append(f"{title:<26} {one.name:<20} {times:<44} loss {loss:.7f} {weighed}")
        benchmark.extra_info[one.name] = {**row, **peak}


@pytest.mark.parametrize("rows", PUBLISHED)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.benchmark(group="info_nce")
def test_with_gradients(rows, dtype, benchmark, threads, plan, lines):
    case, most = Nce(rows, dtype=dtype), threads[-1]
    names = [AUTO, TORCH] if rows > 4096 else list(LOSSES)
    reason = memory.too_large(_DENSE_PEAK * dtype.itemsize * rows * rows)
    if reason:
        names.remove(TORCH)
        lines.append(f"{case}: {TORCH} is left out, {reason}")
    peaks = {name: memory.of_loss(name, case, most) for name in names}
    made = _measured(benchmark, case, nce_losses.with_gradients, names, most, plan)
    _report(benchmark, lines, f"{case}, {most} threads", made, peaks)


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "forward"])
@pytest.mark.parametrize("rows", CROSSING)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.benchmark(group="info_nce, where auto changes over")
def test_where_auto_changes_over(rows, dtype, gradient, benchmark, threads, plan, lines):
    case, passes = Nce(rows, dtype=dtype), nce_losses.with_gradients if gradient else nce_losses.alone
    names = [CPU, "fastlvm, reference"]
    for n in threads:
        if n == threads[-1]:
            made = _measured(benchmark, case, passes, names, n, plan)
        else:
            made = [Contender(name, passes(name, case), n, contenders.BEST) for name in names]
            for one in made:
                benchmark.extra_info[f"loss by {one.name}"] = float(one.trial()[0])
            for _ in range(plan.of(made[0].expected, False)):
                for one in made:
                    one.time(plan)
        kind = "gradient" if gradient else "forward"
        _report(benchmark, lines, f"{case}, {n} threads, {kind}", made, {})
