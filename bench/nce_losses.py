"""InfoNCE as the op computes it and as one writes it by hand; timed by bench_info_nce.py, weighed by memory.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlvm

TEMPERATURE = 0.07


@dataclass(frozen=True)
class Nce:
    """Queries and keys [rows, dim] of length 1, each query near its own key."""

    rows: int
    dim: int = 768
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.rows} x {self.dim}{'' if self.dtype == torch.float32 else ', bfloat16'}"

    def tensors(self) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(0)
        keys, noise = (F.normalize(torch.randn(self.rows, self.dim, generator=g), dim=1) for _ in range(2))
        queries = F.normalize(keys + 2 * noise, dim=1)
        return queries.to(self.dtype).requires_grad_(), keys.to(self.dtype).requires_grad_()


def by_torch(queries: Tensor, keys: Tensor) -> Tensor:
    return F.cross_entropy(queries @ keys.T / TEMPERATURE, torch.arange(len(queries)))


def by(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda queries, keys: fastlvm.info_nce(queries, keys, TEMPERATURE, backend=backend)


AUTO, CPU, TORCH = "fastlvm", "fastlvm, cpu", "F.cross_entropy"
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    AUTO: by("auto"),
    CPU: by("cpu"),
    "fastlvm, reference": by("reference"),
    TORCH: by_torch,
}


def with_gradients(name: str, case: Nce) -> Callable[[], tuple[Tensor, ...]]:
    """A call that gives the loss and the gradients of queries and keys."""
    tensors, loss = case.tensors(), LOSSES[name]

    def both() -> tuple[Tensor, ...]:
        value = loss(*tensors)
        return value.detach(), *torch.autograd.grad(value, tensors)

    return both


def alone(name: str, case: Nce) -> Callable[[], tuple[Tensor, ...]]:
    """A call that gives the loss, without a gradient."""
    tensors, loss = [x.detach() for x in case.tensors()], LOSSES[name]
    return lambda: (loss(*tensors),)
