"""The seeds' other models with random weights, for their time alone."""

from __future__ import annotations

import numpy as np

from fastlvm.models import ModelConfig, names
from fastlvm.predictor.export import describe
from fastlvm.predictor.forward import Forward, Plan
from fastlvm.predictor.pack import pack

MODELS = tuple(name for name in names() if name not in ("mamba-s", "mixture"))


def forward(name: str, precision: str) -> Forward:
    """The named model with random weights; its predictions are finite unit vectors, and mean nothing."""
    config = ModelConfig.preset(name)
    plan = Plan(describe(config), config.context, config.vector_dim)
    rng = np.random.default_rng(0)
    weights = {}
    for tensor, shape in plan.tensors().items():
        scale = 0.5 * float(shape[-1]) ** -0.5 if len(shape) > 1 else 0.1
        weights[tensor] = scale * rng.standard_normal(shape, np.float32)
        if tensor.endswith("A_log") and len(shape) > 1:
            weights[tensor] = np.log(np.broadcast_to(np.arange(1, shape[1] + 1, dtype=np.float32), shape)).copy()
        elif tensor.endswith("norm.weight"):
            weights[tensor] = np.ones(shape, np.float32)
    return Forward(plan, pack(plan, weights, precision))
