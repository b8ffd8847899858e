"""Checkpoints: safetensors files that hold everything a run needs to go on as if it had never stopped.

`last.safetensors` holds the model, the projection head, AdamW's moments, the averaged weights, the states of all
random generators and, as JSON in its metadata, the position in the schedule, the history and what the run belongs to.
It is the only file a resumed run trusts; `history.json` and `best.safetensors` follow from it.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlvm.errors import IntegrityError
from fastlvm.models import weight_file
from fastlvm.models.weight_file import pick as pick
from fastlvm.models.weight_file import prefixed as prefixed

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save(path: str | os.PathLike[str], tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and JSON metadata to one safetensors file, atomically."""
    weight_file.save(path, {name: tensor.numpy(force=True) for name, tensor in tensors.items()}, meta)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote. Raises InputError when it is missing, IntegrityError when it is damaged."""
    arrays, meta = weight_file.load(path)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    # numpy's empty arrays have strides of 0, which torch refuses to view as bytes
    return {name: t if t.numel() else t.new_empty(t.shape) for name, t in tensors.items()}, meta


def load_weights(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy `tensors` into `module`; a missing, unknown or wrongly shaped one is an IntegrityError."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise IntegrityError(f"{path} does not hold this model's weights ({error}): train again") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> dict[str, Tensor]:
    """AdamW's state by parameter name: `<name>.exp_avg`, `.exp_avg_sq`, `.step`; nothing before the first step."""
    return {
        f"{name}.{key}": optimizer.state[parameter][key]
        for parameter, name in names.items()
        for key in _MOMENTS
        if key in optimizer.state.get(parameter, {})
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], tensors: dict[str, Tensor], path: Path
) -> None:
    """Put back what `optimizer_tensors` gave."""
    optimizer.state.clear()
    for parameter, name in names.items():
        found = {key: tensors[f"{name}.{key}"] for key in _MOMENTS if f"{name}.{key}" in tensors}
        if found and len(found) != len(_MOMENTS):
            raise IntegrityError(f"{path} holds half the optimizer's state of {name}: train again")
        if found:
            optimizer.state[parameter] = found


def random_tensors(augment: torch.Generator) -> dict[str, Tensor]:
    """States of the generators of torch, the augmentation, Python and NumPy, as integer tensors."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    version, words, gauss = random.getstate()
    assert version == 3 and gauss is None  # nothing here draws random.gauss
    return {
        "torch": torch.get_rng_state(),
        "augment": augment.get_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor([*numpy_state["state"]["key"].tolist(), numpy_state["state"]["pos"]], dtype=torch.int64),
    }


def load_random(tensors: dict[str, Tensor], augment: torch.Generator, path: Path) -> None:
    """Put back what `random_tensors` gave."""
    try:
        torch.set_rng_state(tensors["torch"])
        augment.set_state(tensors["augment"])
        random.setstate((3, tuple(tensors["python"].tolist()), None))
        words = tensors["numpy"].tolist()
        state = {"key": np.array(words[:-1], dtype=np.uint32), "pos": words[-1]}
        np.random.set_state({"bit_generator": "MT19937", "state": state, "has_gauss": 0, "gauss": 0.0})
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path} holds no usable random states ({error}): train again") from error


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class KeptRandom:
    """Leave the caller's global generators as they were found."""

    def __enter__(self) -> None:
        self._states = (random.getstate(), np.random.get_state(), torch.get_rng_state())

    def __exit__(self, *_: object) -> None:
        random.setstate(self._states[0])
        np.random.set_state(self._states[1])
        torch.set_rng_state(self._states[2])
