"""Training windows a second: `python bench/training_steps.py`, Mamba-S of two sizes, a batch of 1,024 windows.

A step is what `fastlvm train` does with a batch: forward, InfoNCE over the batch's targets, backward, clipping, AdamW.
Beside it the same step where the scan is the PyTorch reference's, and where it costs nothing: its input passes through,
and every projection before it still gets a gradient, of zeros. Steps are taken in turn, after one that is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlvm
from fastlvm.evaluation.latency import machine
from fastlvm.files import write_json
from fastlvm.models import create, names, ssm
from fastlvm.predictor.forward import Forward
from fastlvm.training.learned import Learned
from fastlvm.training.negatives import Batch, Negatives
from fastlvm.training.objective import Objective
from fastlvm.training.options import TrainOptions
from fastlvm.training.ranks import Ranks
from fastlvm.training.step import Step
from forward_models import forward

SIZES = {
    "d 256, 4 layers, N 64": {"d_model": 256, "n_layers": 4, "d_state": 64},
    "d 768, 8 layers, N 128": {"d_model": 768, "n_layers": 8, "d_state": 128},
}
OURS, BF16, FREE, REFERENCE = "fastlvm", "fastlvm, bf16 autocast", "a scan that costs nothing", "reference scan"
DIM, CONTEXT = 768, 5


class Free(torch.autograd.Function):
    """u, of all that a scan is given; gradients of the rest are zeros."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, *rest: Tensor) -> Tensor:
        ctx.shapes = [(x.shape, x.dtype) for x in rest]
        return u.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad,) = grads
        return grad, *(grad.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.shapes)


@contextlib.contextmanager
def scanning(name: str) -> Iterator[None]:
    """What Mamba blocks call for a scan meanwhile."""
    kept = ssm.ssm_scan
    swapped: dict[str, Callable[..., Tensor]] = {
        FREE: lambda u, delta, A, B, C, D, z, bias, **flags: Free.apply(u, delta, A, B, C, D, z, bias),
        REFERENCE: functools.partial(fastlvm.ssm_scan, backend="reference"),
    }
    ssm.ssm_scan = swapped.get(name, kept)  # type: ignore[assignment]
    try:
        yield
    finally:
        ssm.ssm_scan = kept


class Training:
    """One step after the other of a model from its start."""

    def __init__(self, name: str, size: dict[str, int], batch: int, preset: str = "mamba-s") -> None:
        self.name, self.seconds = name, list[float]()
        torch.manual_seed(0)
        options = TrainOptions(negatives="batch", precision="bf16" if name == BF16 else "fp32")
        model = create(preset, vector_dim=DIM, **size).train()
        rows = torch.arange(batch * (CONTEXT + 1)).reshape(batch, CONTEXT + 1)
        vectors = F.normalize(torch.randn(rows.numel(), DIM), dim=-1)
        own = torch.arange(len(vectors))
        objective = Objective(options, vectors, Negatives(options, own, own, own))
        self.batch, self.context = Batch(rows), vectors[rows[:, :-1]]
        learned = Learned(model, None, None, options)
        self.parameters = list(learned.names)
        self.optimizer = torch.optim.AdamW(learned.groups(), lr=options.lr, fused=True)
        self._step = Step(model, objective, options, Ranks())
        self._generator, self._clip = torch.Generator(), options.clip

    def step(self) -> float:
        """Its loss."""
        with scanning(self.name):
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._step(self.context, self.batch, self._generator, 1.0)
            torch.nn.utils.clip_grad_norm_(self.parameters, self._clip)
            self.optimizer.step()
            return loss.total.item()

    def time(self) -> None:
        start = time.perf_counter()
        self.step()
        self.seconds.append(time.perf_counter() - start)


def run(size: dict[str, int], batch: int, rounds: int, threads: int, reference: bool) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    fastlvm.set_num_threads(threads)
    found, losses = [], []
    contenders = [Training(name, size, batch) for name in (OURS, BF16, FREE, *[REFERENCE] * reference)]
    for one in contenders:
        losses.append(one.step())
    assert abs(losses[0] - losses[1]) < 0.05 and all(abs(losses[0] - loss) < 1e-3 for loss in losses[3:]), losses
    for number in range(rounds):
        for one in contenders:
            if one.name != REFERENCE or number < max(2, rounds // 3):  # it takes most of the time
                one.time()
    ours = float(np.median(contenders[0].seconds))
    for one in contenders:
        median = float(np.median(one.seconds))
        row = {"name": one.name, "steps": len(one.seconds), "seconds": median, "windows_per_s": batch / median}
        found.append(row | {"times_ours": median / ours, "spread": [min(one.seconds), max(one.seconds)]})
    return found


def every_preset(batch: int, rounds: int, threads: int) -> None:
    """Prints of every preset as it is: parameters, windows a second in bf16, and the native predictor's one context."""
    torch.set_num_threads(threads)
    fastlvm.set_num_threads(threads)
    print(f"{'':<16}{'parameters':>12}{'windows/s':>11}{'int8, ms':>10}{'bf16, ms':>10}")
    for name in names():
        training = Training(BF16, {}, batch, name)
        training.step()
        for _ in range(rounds):
            training.time()
        count = sum(parameter.numel() for parameter in training.parameters)
        latencies = [_milliseconds(forward(name, precision)) for precision in ("int8", "bf16")]
        rate = batch / float(np.median(training.seconds))
        print(f"{name:<16}{count:>12,}{rate:>11.0f}" + "".join(f"{ms:>10.3f}" for ms in latencies), flush=True)


def _milliseconds(run: Forward, calls: int = 300) -> float:
    """The median of consecutive calls with one context."""
    context, seconds = np.zeros((1, CONTEXT, DIM), np.float32) + np.float32(DIM**-0.5), []
    for _ in range(calls):
        start = time.perf_counter()
        run(context)
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds[calls // 10 :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=fastlvm.get_num_threads())
    parser.add_argument("--size", choices=SIZES, action="append", help="one of the sizes; both when absent")
    parser.add_argument("--no-reference", action="store_true", help="leave out the reference scan, which takes minutes")
    parser.add_argument("--presets", action="store_true", help="every preset as it is instead, its latency beside it")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    print(f"{machine()}; {given.threads} threads; batch {given.batch}; {date.today().isoformat()}")
    if given.presets:
        return every_preset(given.batch, given.rounds, given.threads)
    tables = {}
    for name in given.size or SIZES:
        tables[name] = run(SIZES[name], given.batch, given.rounds, given.threads, not given.no_reference)
        print(f"\n{name}\n{'':<28}{'windows/s':>10}{'s a step':>10}{'÷ ours':>8}{'steps':>7}")
        for row in tables[name]:
            figures = f"{row['windows_per_s']:>10.0f}{row['seconds']:>10.3f}{row['times_ours']:>8.2f}{row['steps']:>7}"
            print(f"{row['name']:<28}{figures}", flush=True)
    if given.out:
        about = {"machine": machine(), "threads": given.threads, "batch": given.batch, "date": date.today().isoformat()}
        write_json(given.out, {**about, "torch": torch.__version__, "tables": json.loads(json.dumps(tables))})


if __name__ == "__main__":
    main()
