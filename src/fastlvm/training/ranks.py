"""Several processes that train one model, as torchrun starts them: torch.distributed does all the talking."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Ranks(NamedTuple):
    """This process among those of the run; alone it is number 0 of 1, and nothing is sent."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def share(self, count: int) -> Tensor:
        """Which of a batch's windows are this process's; where there are fewer than processes, one of no weight."""
        return torch.tensor([*range(self.rank, count, self.size)] or [0])

    def weight(self, count: int) -> float:
        """What makes the mean over processes of their mean losses the mean over a batch's windows."""
        return len(range(self.rank, count, self.size)) * self.size / count

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over the processes."""
        return module if self.size == 1 else DistributedDataParallel(module)

    def sums(self, values: list[float]) -> list[float]:
        """Values added up over the processes."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is set in any process."""
        return self.sums([float(flag)])[0] > 0

    def same(self, value: Any) -> Any:
        """The first process's value, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor of one shape."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return found

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The processes of this run: those that torchrun started, or that joined a group before."""
    started = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if started:
        dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()
    finally:
        if started:
            dist.destroy_process_group()
