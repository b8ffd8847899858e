"""Models by name, and from files."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from fastlvm.errors import IntegrityError
from fastlvm.models import weight_file
from fastlvm.models.config import PRESETS, ModelConfig
from fastlvm.models.mlx.base import Model
from fastlvm.models.mlx.weights import load_weights, weights

BEST = "best.safetensors"  # in a run folder
_TOWER = "tower."  # weights of the payload's side, which are a part of the run's space


def create(name: str | ModelConfig, **overrides: Any) -> Model:
    """Build a predictor, untrained: `[B, L, vector_dim] -> [B, vector_dim]`, L2-normalised, with its `.config`.

    `overrides` are fields of `ModelConfig`. Weights are drawn from mlx's global generator: seed it for repeatable
    ones. Raises InputError for an unknown name or field, or a value out of range.
    """
    config = name.replace(**overrides) if isinstance(name, ModelConfig) else ModelConfig.preset(name, **overrides)
    module, _, cls = PRESETS[config.name][0].partition(":")  # its twin here is called as torch's
    home = module.replace("fastlvm.models", "fastlvm.models.mlx")
    model: Model = getattr(importlib.import_module(home), cls)(config)
    return model


def load(path: str | os.PathLike[str]) -> Model:
    """The best model of a run folder, or that of one .safetensors file which `save` or `train` wrote, in eval mode.

    It takes contexts in the run's space, as the torch model does. Raises InputError when there is no such file,
    IntegrityError when it is damaged or holds no model.
    """
    file = Path(path)
    file = file / BEST if file.is_dir() else file
    tensors, meta = weight_file.load(file)
    if not isinstance(meta.get("model"), dict):
        raise IntegrityError(f"{file} does not say which model its weights are of: name a run's {BEST}")
    model = create(ModelConfig.from_dict(meta["model"]))
    load_weights(model, {name: array for name, array in tensors.items() if not name.startswith(_TOWER)}, file)
    model.eval()
    return model


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model's weights and configuration to one .safetensors file, atomically, for `load` and for torch."""
    weight_file.save(path, weights(model), {"model": model.config.to_dict()})
