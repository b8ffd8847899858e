"""Training: objectives, the loop, checkpoints that resume bit for bit, and the run folder they live in.

Names are loaded on first use, so that what needs no torch, as training with mlx does, imports none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlvm.training.loop import RunSummary
    from fastlvm.training.options import TrainOptions, learning_rate
    from fastlvm.training.runs import load_run, predict_with
    from fastlvm.training.trainer import train

_HOME = {
    "RunSummary": "loop",
    "TrainOptions": "options",
    "learning_rate": "options",
    "load_run": "runs",
    "predict_with": "runs",
    "train": "trainer",
}

__all__ = ["RunSummary", "TrainOptions", "learning_rate", "load_run", "predict_with", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastlvm.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastlvm.training.{_HOME[name]}"), name)
    globals()[name] = value
    return value
