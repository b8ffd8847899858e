"""AdamW as the options ask for it, and its state as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_unflatten

from fastlvm.errors import IntegrityError
from fastlvm.training.options import TrainOptions

_HEAD = "head."
_MOMENTS = ("m", "v")

Kind = tuple[bool, bool]


class Optimizer:
    """mlx's AdamW: matrices decay; norms, biases, A_log, D, the mixture's logits and other vectors do not.

    A head's learning rate is `head_lr` of the others'.
    """

    def __init__(self, model: nn.Module, options: TrainOptions) -> None:
        self.model, self.options = model, options
        weights = _flat(model.trainable_parameters())
        self._kinds = {name: _kind(name, weight) for name, weight in weights.items()}
        self._each: dict[Kind, optimizers.AdamW] = {}
        for kind in sorted(set(self._kinds.values())):
            decay = options.weight_decay if kind[1] else 0.0
            self._each[kind] = optimizers.AdamW(options.lr, weight_decay=decay, bias_correction=True)
            self._each[kind].init(self._of(kind, weights))

    def _of(self, kind: Kind, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        return {name: array for name, array in arrays.items() if self._kinds.get(name) == kind}

    def __call__(self, gradients: dict[str, Any], lr: float) -> None:
        """Clip the gradients and take one step."""
        clipped, _ = optimizers.clip_grad_norm(_flat(gradients), self.options.clip)
        weights = _flat(self.model.trainable_parameters())
        for kind, one in self._each.items():
            one.learning_rate = mx.array(lr * self.options.head_lr if kind[0] else lr, mx.float32)
            weights |= one.apply_gradients(self._of(kind, clipped), self._of(kind, weights))
        self.model.update(tree_unflatten(list(weights.items())))
        mx.eval(self.model.parameters(), [one.state for one in self._each.values()])

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps: `<name>.m` and `<name>.v` of every weight, and the number of steps."""
        found: dict[str, np.ndarray] = {}
        for name, kind in self._kinds.items():
            moments = self._each[kind].state[name]
            found |= {f"{name}.{moment}": np.array(moments[moment]) for moment in _MOMENTS}
        any_one = next(iter(self._each.values()))  # they step together
        return {**found, "step": np.array(int(any_one.state["step"]), np.int64)}

    def restore(self, arrays: Mapping[str, np.ndarray], path: Path) -> None:
        """Put back what `arrays` gave."""
        now = self.arrays()
        if {name: array.shape for name, array in arrays.items()} != {name: array.shape for name, array in now.items()}:
            raise IntegrityError(f"{path} does not hold this optimizer's state: train again")
        for name, kind in self._kinds.items():
            self._each[kind].state[name] = {moment: mx.array(arrays[f"{name}.{moment}"]) for moment in _MOMENTS}
        for one in self._each.values():
            one.state["step"] = mx.array(int(arrays["step"]), mx.uint64)


def _flat(tree: Any) -> dict[str, mx.array]:
    found: dict[str, mx.array] = tree_flatten(tree, destination={})  # type: ignore[assignment]
    return found


def _kind(name: str, weight: mx.array) -> Kind:
    """Whether a parameter is the head's, and whether it decays."""
    return name.startswith(_HEAD), weight.ndim > 1 and not name.endswith("A_log")
