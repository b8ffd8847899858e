"""InfoNCE in plain mlx, with all logits in memory: the formula of `reference`."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from fastlvm.ops import _mlx_call


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
    logits = (queries @ keys.T) / temperature  # [B, M]
    own = (queries * keys[:batch]).sum(-1) / temperature
    left_out = mask
    if query_labels is not None:
        same = query_labels[:, None] == key_labels[None]  # [B, M, G]
        left_out = mx.any(same & (query_labels >= 0)[:, None], axis=-1)
    if left_out is not None:
        positives = mx.arange(batch)[:, None] == mx.arange(count)
        logits = mx.where(left_out & mx.logical_not(positives), -mx.inf, logits)
    sums = [mx.logsumexp(logits, axis=axis) for axis in ((1, 0) if symmetric else (1,))]
    return sum(sums[1:], sums[0]) / len(sums) - own, mx.stack(sums)


def reduced(each: Any, reduction: str) -> Any:
    return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()
