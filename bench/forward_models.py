"""The seeds' other models as layer lists with random weights, for their time alone: none of them is trained here yet.

Sizes are those of the seed documents. Where these leave a choice (how a GRU gates, what norm attention has) it is the
one written here, and may differ from the models that are still to come.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlvm.predictor.forward import Forward, Plan
from fastlvm.predictor.pack import pack

DIM, CONTEXT, EPS = 768, 5, 1e-5
Entry = dict[str, Any]


def linear(prefix: str, inputs: int, outputs: int, bias: bool = True) -> Entry:
    return {"type": "linear", "prefix": prefix, "inputs": inputs, "outputs": outputs, "bias": bias}


def norm(prefix: str, dim: int) -> Entry:
    return {"type": "rms_norm", "prefix": prefix, "dim": dim, "eps": EPS}


def mamba(prefix: str, dim: int, state: int, expand: int) -> Entry:
    sizes = {"d_inner": expand * dim, "d_state": state, "d_conv": 4, "dt_rank": -(-dim // 16)}
    return {"type": "mamba_block", "prefix": prefix, "dim": dim, "eps": EPS, **sizes}


def attention(prefix: str, dim: int, heads: int = 4, window: int = 8) -> Entry:
    inner = {"type": "attention", "dim": dim, "heads": heads, "window": window}
    qkv, out = linear(f"{prefix}.qkv", dim, 3 * dim, False), linear(f"{prefix}.out", dim, dim, False)
    return {"type": "residual", "layers": [norm(f"{prefix}.norm", dim), qkv, inner, out]}


def gru_gate(prefix: str, dim: int, hidden: int = 256) -> Entry:
    gru = {"type": "gru", "prefix": f"{prefix}.gru", "inputs": dim, "hidden": hidden}
    return {"type": "residual", "layers": [norm(f"{prefix}.norm", dim), gru, linear(f"{prefix}.out", hidden, dim)]}


def around(blocks: list[Entry], dim: int = DIM) -> list[Entry]:
    """Embedding where the width differs, blocks, head, mixture."""
    embed = [] if dim == DIM else [linear("embed", DIM, dim)]
    mixture = {"type": "recency_mixture", "prefix": "mixture", "context": CONTEXT}
    head = [{"type": "last"}, norm("norm", dim), linear("head", dim, DIM)]
    return [*embed, *blocks, *head, mixture, {"type": "l2_norm"}]


def amn() -> list[Entry]:
    pool = {"type": "context_attention", "prefix": "pool", "dim": DIM, "inner": 256}
    sizes = ((2 * DIM, 512), (512, 256), (256, DIM))
    mlp = [entry for i, size in enumerate(sizes) for entry in (linear(f"mlp.{i}", *size), {"type": "gelu"})][:-1]
    mixture = {"type": "recency_mixture", "prefix": "mixture", "context": CONTEXT}
    return [pool, *mlp, mixture, {"type": "l2_norm"}]


MODELS = {
    "mamba-h": around(
        [attention(f"blocks.{i}", DIM) if i % 4 == 3 else mamba(f"blocks.{i}", DIM, 128, 2) for i in range(10)]
    ),
    "mamba-xl": around([mamba(f"blocks.{i}", 960, 160, 3) for i in range(12)], 960),
    "mamba-sandwich": around(
        [attention(f"blocks.{i}", DIM) if i in (0, 1, 10, 11) else mamba(f"blocks.{i}", DIM, 128, 2) for i in range(12)]
    ),
    "mamba-gr": around(
        [part for i in range(8) for part in (mamba(f"blocks.{i}", DIM, 144, 2), gru_gate(f"gates.{i}", DIM))]
    ),
    "amn": amn(),
}


def forward(name: str, precision: str) -> Forward:
    """The named model with random weights; its predictions are finite unit vectors, and mean nothing."""
    plan = Plan(MODELS[name], CONTEXT, DIM)
    rng = np.random.default_rng(0)
    weights = {}
    for tensor, shape in plan.tensors().items():
        scale = 0.5 * float(shape[-1]) ** -0.5 if len(shape) > 1 else 0.1
        weights[tensor] = scale * rng.standard_normal(shape, np.float32)
        if tensor.endswith("A_log"):
            weights[tensor] = np.log(np.broadcast_to(np.arange(1, shape[1] + 1, dtype=np.float32), shape)).copy()
        elif tensor.endswith("norm.weight"):
            weights[tensor] = np.ones(shape, np.float32)
    return Forward(plan, pack(plan, weights, precision))
