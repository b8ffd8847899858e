"""What a run learns: the model, and where it has them a projection head and a payload tower; and their average."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlvm.models.tower import Tower, arrays
from fastlvm.training import checkpoint
from fastlvm.training.options import TrainOptions

TOWER = "tower"  # before the names of a tower's weights


class Learned:
    """The modules of a run by name, the names of their parameters, and with `ema` an average of what is kept."""

    def __init__(
        self, model: nn.Module, projection: nn.Module | None, tower: Tower | None, options: TrainOptions
    ) -> None:
        self.model, self.tower, self.options = model, tower, options
        parts = {"model": model, "projection": projection, TOWER: tower}
        self.modules = nn.ModuleDict({name: module for name, module in parts.items() if module is not None})
        self.names = {parameter: name for name, parameter in self.modules.named_parameters()}
        self.average = copy.deepcopy(self.weights()) if options.ema else None

    def weights(self) -> dict[str, Tensor]:
        """What predicts and searches, as it is now: the model's weights, and the tower's behind `tower.`"""
        towers = {} if self.tower is None else self.tower.state_dict()
        return {**self.model.state_dict(), **checkpoint.prefixed(TOWER, towers)}

    def kept(self) -> dict[str, Tensor]:
        """The weights that would be kept."""
        return self.weights() if self.average is None else self.average

    def follow(self, step: int) -> None:
        """Take the weights after optimizer step `step` into the average."""
        if self.average is None:
            return
        decay = min(self.options.ema, step / (step + 10))
        for name, weight in self.weights().items():
            self.average[name].lerp_(weight, 1 - decay)

    @contextlib.contextmanager
    def judged(self) -> Iterator[None]:
        """Meanwhile the modules are in eval mode, and have the weights that would be kept."""
        self.modules.eval()
        now = {} if self.average is None else copy.deepcopy(self.weights())
        self._put(self.average or {})
        try:
            yield
        finally:
            self._put(now)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        here = self.weights()
        for name, weight in weights.items():
            here[name].copy_(weight)

    @torch.no_grad()
    def towered(self, vectors: Tensor) -> Tensor:
        """Vectors of the space where the tower puts them; it is the keys' gradients that teach it."""
        return vectors if self.tower is None else self.tower(vectors)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {**self.modules.state_dict(), **checkpoint.prefixed("average", self.average or {})}

    def restore(self, tensors: dict[str, Tensor], path: Path) -> None:
        for name, module in self.modules.items():
            checkpoint.load_weights(module, checkpoint.pick(tensors, name), path)
        if self.average is not None:
            self.average = checkpoint.pick(tensors, "average")

    def groups(self) -> list[dict[str, Any]]:
        """Parameters for AdamW: matrices decay; norms, biases, A_log, D, the mixture's logits and other vectors do not.

        `share` of a group is its learning rate in units of the options' lr.
        """
        options = self.options
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter, name in self.names.items():
            share = options.head_lr if name.startswith(("model.head.", f"{TOWER}.down.")) else 1.0
            decay = options.weight_decay if parameter.ndim > 1 and not name.endswith("A_log") else 0.0
            groups.setdefault((share, decay), []).append(parameter)
        return [
            {"params": found, "share": share, "weight_decay": decay, "lr": share * options.lr}
            for (share, decay), found in groups.items()
        ]


def split_tower(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, np.ndarray] | None]:
    """Kept weights as the model's, and the tower as `fastlvm.Space` takes it; None where there is none."""
    towers = checkpoint.pick(weights, TOWER)
    own = {name: weight for name, weight in weights.items() if not name.startswith(f"{TOWER}.")}
    return own, arrays(towers) if towers else None
