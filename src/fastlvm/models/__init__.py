"""Predictors by name. A new one is one file with its class and one line in `config.PRESETS`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastlvm.models.config import PRESETS, ModelConfig

if TYPE_CHECKING:
    from fastlvm.models.base import Model

__all__ = ["ModelConfig", "create", "names"]


def names() -> list[str]:
    """Names `create` takes."""
    return sorted(PRESETS)


def create(name: str | ModelConfig, **overrides: Any) -> Model:
    """Build a predictor, untrained: `[B, L, vector_dim] -> [B, vector_dim]`, L2-normalised, with its `.config`.

    `overrides` are fields of `ModelConfig`. Weights are drawn from torch's global generator: seed it for repeatable
    ones. Raises InputError for an unknown name or field, or a value out of range.
    """
    config = name.replace(**overrides) if isinstance(name, ModelConfig) else ModelConfig.preset(name, **overrides)
    module, _, cls = PRESETS[config.name][0].partition(":")
    model: Model = getattr(importlib.import_module(module), cls)(config)
    return model
