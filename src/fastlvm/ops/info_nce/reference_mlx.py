"""InfoNCE in plain mlx: the formula of `reference`, over tiles of logits."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from fastlvm.ops import _mlx_call
from fastlvm.ops.info_nce import tiles_mlx


def run(
    queries: Any, keys: Any, temperature: float, symmetric: bool, masks: tuple[Any, Any, Any], reduction: str
) -> Any:
    each, _ = losses(queries, keys, temperature, symmetric, *masks)
    return reduced(each, reduction)


def losses(
    queries: Any, keys: Any, temperature: float, symmetric: bool, mask: Any, query_labels: Any, key_labels: Any
) -> tuple[Any, Any]:
    """Losses [B], and the logarithms of the sums [1 or 2, B]; in float32, in float64 for float64."""
    dtype = _mlx_call.state_dtype(queries)
    batch, count = queries.shape[0], keys.shape[0]
    if not batch:
        return mx.zeros(0, dtype), mx.zeros((2 if symmetric else 1, 0), dtype)
    queries, keys = queries.astype(dtype), keys.astype(dtype)
    if not queries.size:  # vectors of no numbers
        queries, keys = mx.zeros((batch, 1), dtype), mx.zeros((count, 1), dtype)
    queries = queries / temperature
    own = (queries * keys[:batch]).sum(-1)
    sums = tiles_mlx.log_sums(queries, keys, symmetric, mask, query_labels, key_labels)
    return sums.mean(0) - own, sums


def reduced(each: Any, reduction: str) -> Any:
    return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()
