"""Every model, small."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastlvm.models import create, names

DIM, CONTEXT = 12, 5
SIZES = {
    "vector_dim": DIM,
    "d_model": 16,
    "n_layers": 2,
    "d_state": 4,
    "head_dim": 8,
    "heads": 2,
    "d_ff": 24,
    "hidden": 10,
    "dropout": 0.0,
}
LAYERS = {"mamba-h": 5, "mamba-sandwich": 12}  # as many as show the layout
NAMES = tuple(names())
STACKS = tuple(name for name in NAMES if name not in ("amn", "mixture", "mlp"))


def build(name, seed=0, **overrides):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        given = {**SIZES, "n_layers": LAYERS.get(name, 2), **overrides}
        return create(name, **given)


def awake(model, seed=0):
    """The model as if trained: every weight shows."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.add_((0.3 if name.startswith("head") else 0.05) * torch.randn_like(weight))
    return model


def contexts(batch=3, length=CONTEXT, dim=DIM, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(batch, length, dim, generator=generator), dim=-1)
