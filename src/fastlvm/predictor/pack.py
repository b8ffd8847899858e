"""Weights in the precision an artifact stores them in.

float32 as they are; bfloat16 rounded to nearest, held as uint16; int8 with one scale per output, max |weight| / 127.
Only the matrices of products change: norms, biases, convolutions, A and D stay float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from fastlvm.predictor.forward import Plan
from fastlvm.predictor.layers import SCALE

PRECISIONS = ("fp32", "bf16", "int8")


def pack(
    plan: Plan, weights: Mapping[str, np.ndarray], precision: str, in_bf16: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The tensors of an artifact from float32 `weights`, by name.

    precision: one of PRECISIONS. in_bf16: matrices that are bfloat16 where the others are int8.
    """
    matrices = plan.matrices()
    packed: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        if name not in matrices or precision == "fp32":
            packed[name] = array
        elif precision == "bf16" or name in in_bf16:
            packed[name] = to_bf16(array)
        else:
            packed[name], packed[name + SCALE] = to_int8(array)
    return packed


def to_bf16(array: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16 numbers, ties to even, as uint16."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(array), bits >> np.uint64(16) | np.uint64(0x40), rounded).astype(np.uint16)


def to_int8(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [outputs, inputs] and the float32 [outputs] that its steps are worth; a row of zeros has the scale 0."""
    scale = np.abs(array).max(axis=1) / np.float32(127)
    steps = np.rint(array / np.where(scale > 0, scale, 1)[:, None])
    return np.clip(steps, -127, 127).astype(np.int8), scale.astype(np.float32)
