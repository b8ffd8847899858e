"""The forward and the backward of one batch: whole or in parts, alone or with other processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlvm.training.negatives import Batch
from fastlvm.training.objective import Loss, Objective
from fastlvm.training.options import TrainOptions
from fastlvm.training.ranks import Ranks


class Step:
    """Leaves the gradients of a batch in the parameters of a model and of its objective."""

    def __init__(self, model: nn.Module, objective: Objective, options: TrainOptions, ranks: Ranks) -> None:
        self.options, self.objective = options, objective
        self.parallel = ranks.parallel(model)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.parallel) if options.compile else self.parallel

    def predict(self, context: Tensor) -> Tensor:
        """float32 [n, dim]"""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.options.precision == "bf16"):
            return self.forward(context).float()

    def __call__(self, context: Tensor, batch: Batch, generator: torch.Generator, weight: float) -> Loss:
        """context [B, L, dim] of this process's windows; weight: of its loss among those of the processes."""
        micro = self.options.micro_batch or len(context)
        if len(context) <= micro:
            loss = self.objective(self.predict(context), batch, generator)
            (weight * loss.total).backward()
            return loss
        return self._in_parts(context.split(micro), batch, generator, weight)

    def _in_parts(self, parts: tuple[Tensor, ...], batch: Batch, generator: torch.Generator, weight: float) -> Loss:
        """GradCache: predictions of all parts without their activations, then each part again with its gradient."""
        states, predicted = [], []
        for part in parts:
            states.append(torch.get_rng_state())
            with torch.no_grad():
                predicted.append(self.predict(part))
        whole = torch.cat(predicted).requires_grad_()
        loss: Loss = self.objective(whole, batch, generator)
        (weight * loss.total).backward()
        assert whole.grad is not None
        after = torch.get_rng_state()
        gradients = whole.grad.split([len(part) for part in parts])
        for i, (part, state, gradient) in enumerate(zip(parts, states, gradients, strict=True)):
            torch.set_rng_state(state)  # the same dropout as before
            with self._unless_last(i + 1 == len(parts)):
                self.predict(part).backward(gradient)
        torch.set_rng_state(after)
        return loss

    def _unless_last(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are averaged over the processes with the last part."""
        if last or not isinstance(self.parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.parallel.no_sync()
