"""InfoNCE on the CPU: compiled kernels over tiles, forward and backward, for numpy arrays and torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlvm.ops import _arrays, _native
from fastlvm.ops._native import describe
from fastlvm.ops.info_nce.reference import split

__all__ = ["describe", "run", "supports", "yields"]

# Up to so many logits all of them at once are quicker, by measurement: docs/kernels.md, InfoNCE. In float64 the kernels
# compute one number at a time; there the limit is memory.
_FEW, _FEW_DOUBLES, _FEW_IN_TILES = 1024**2, 4096**2, 128**2


def supports(queries: Any, *args: Any) -> tuple[bool, str]:
    return _native.supports(queries)


def yields(queries: Any, keys: Any, *args: Any) -> str:
    if _arrays.kind(queries) == "numpy":
        return ""
    import torch

    logits = queries.shape[0] * keys.shape[0]
    if queries.dtype == torch.float64:
        return "float64 is quicker with all logits in memory" if logits <= _FEW_DOUBLES else ""
    few = _FEW_IN_TILES if _in_tiles(queries, keys) else _FEW
    if torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad) and logits <= few:
        return "with gradients few logits are quicker all in memory"
    return ""


def _in_tiles(queries: Any, keys: Any) -> bool:
    """Whether the products are those of AMX: for bfloat16 rows of whole blocks, docs/kernels.md."""
    import torch

    from fastlvm import _C

    halves = queries.dtype == keys.dtype == torch.bfloat16
    return halves and queries.shape[1] % 16 == 0 and _C.products()["bf16"] == "avx512_amx"


def run(queries: Any, keys: Any, temperature: float, symmetric: bool, mask: Any, reduction: str) -> Any:
    args = (float(temperature), bool(symmetric), *split(mask))
    if _arrays.kind(queries) == "torch":
        from fastlvm.ops.info_nce import autograd

        return autograd.run(queries, keys, *args, reduction)
    return _loss(_native.aligned(queries), _native.aligned(keys), *args, reduction)


def _loss(queries: np.ndarray, keys: np.ndarray, *args: Any) -> Any:
    from fastlvm import _C

    temperature, symmetric, mask, query_labels, key_labels, reduction = args
    labels = [x if x is None else np.ascontiguousarray(x) for x in (query_labels, key_labels)]
    dtype = np.float64 if queries.dtype == np.float64 else np.float32
    single = reduction != "none"
    loss = np.empty(() if single else len(queries), dtype)
    outputs = (None, loss) if single else (loss, None)
    _C.info_nce(queries, keys, temperature, symmetric, mask, *labels, *outputs, None, None, None)
    if reduction == "mean":
        loss = loss / dtype(len(queries)) if len(queries) else np.full((), np.nan, dtype)
    return loss[()]
