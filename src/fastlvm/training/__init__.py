"""Training: objectives, the loop, checkpoints that resume bit for bit, and the run folder they live in."""

from __future__ import annotations

from fastlvm.training.options import TrainOptions, learning_rate
from fastlvm.training.runs import load_run, predict_with
from fastlvm.training.trainer import RunSummary, train

__all__ = ["RunSummary", "TrainOptions", "learning_rate", "load_run", "predict_with", "train"]
