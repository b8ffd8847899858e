"""InfoNCE on GPUs: Triton kernels over blocks of logits from torch's matrix product, for torch tensors."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _triton
from fastlvm.ops._triton import describe
from fastlvm.ops.info_nce.reference import split

__all__ = ["describe", "run", "supports", "yields"]

_FEW = 0  # logits up to which all of them at once are quicker


def supports(queries: Any, keys: Any, *args: Any) -> tuple[bool, str]:
    return _triton.supports(queries, keys)


def yields(queries: Any, keys: Any, *args: Any) -> str:
    if _triton.interpreted():
        return "an interpreter is there for tests"
    return "few logits are quicker all in memory" if queries.shape[0] * keys.shape[0] < _FEW else ""


def run(queries: Any, keys: Any, temperature: float, symmetric: bool, mask: Any, reduction: str) -> Any:
    from fastlvm.ops.info_nce import triton_op

    return triton_op.run(queries, keys, float(temperature), bool(symmetric), *split(mask), reduction)
