"""What a predictor on a GPU takes from an artifact: its weights as float32, and vectors to search in float16."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastlvm.data import Payload
from fastlvm.errors import InputError, IntegrityError
from fastlvm.predictor.layers import SCALE

if TYPE_CHECKING:
    from fastlvm.retrieval import Index

ROOM = 1 << 30  # bytes of a GPU's memory that vectors leave to everything else
BLOCK = 1 << 15  # rows that are read at a time


class Held:
    """The vectors of an artifact's index, or of its payload in the index's space, in blocks of rows [.., dim]."""

    def __init__(self, path: Path, index: Index, payload: Payload | str | os.PathLike[str] | None) -> None:
        """Raises InputError where the index rounds its vectors and there is no payload, IntegrityError for another."""
        self.index = index
        if isinstance(payload, str | os.PathLike):
            payload = Payload.open(payload)
        if payload is not None and payload.id != self.index.payload_id:
            raise IntegrityError(f"payload has id {payload.id}, and the artifact is of {self.index.payload_id}")
        if payload is None and self.index.score_error > 0:
            raise InputError(
                f"{path} has an index of kind {self.index.kind}, which holds rounded vectors: hand in payload="
            )
        self.payload = payload
        self.rows = self.index.rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[np.ndarray]:
        for at in range(0, len(self), BLOCK):
            rows = self.rows[at : at + BLOCK]
            if self.payload is None:
                yield self.index.vectors(rows)
                continue
            ours = rows[rows < len(self.payload)]
            yield self.index.space.apply(self.payload.take(ours))
            if len(ours) < len(rows):  # added to the index later
                yield self.index.vectors(rows[len(ours) :])


def placed(vectors: Any, dim: int, device: torch.device) -> Tensor:
    """float16 [m, dim] on the device."""
    count = len(vectors)
    if isinstance(vectors, Tensor) and vectors.device == device and vectors.dtype == torch.float16:
        if vectors.shape != (count, dim):
            raise InputError(f"vectors have shape {list(vectors.shape)}, and [n, {dim}] is wanted")
        return vectors.detach().contiguous()
    if device.type == "cuda":
        _check_room(count, dim, torch.cuda.mem_get_info(device)[0])
    there = torch.empty((count, dim), dtype=torch.float16, device=device)
    at = 0
    for block in vectors if isinstance(vectors, Held) else _cut(vectors):
        part = block if isinstance(block, Tensor) else torch.from_numpy(np.array(block))
        if part.ndim != 2 or part.shape[1] != dim or not part.is_floating_point():
            raise InputError(
                f"vectors have shape {list(part.shape)} and {part.dtype}, and floats [n, {dim}] are wanted"
            )
        there[at : at + len(part)].copy_(part)
        at += len(part)
    return there


def _check_room(count: int, dim: int, free: int) -> None:
    needed = 2 * count * dim
    if needed + ROOM > free:
        raise InputError(
            f"{count} vectors of {dim} need {needed / 1e9:.1f} GB in float16 and {ROOM / 1e9:.1f} GB beside them, and "
            f"{free / 1e9:.1f} GB of the GPU are free: search on the CPU, or a smaller payload"
        )


def _cut(vectors: Any) -> Iterator[Any]:
    return (vectors[at : at + BLOCK] for at in range(0, len(vectors), BLOCK))


def float32(weights: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """An artifact's packed tensors as float32: int8 times its scale, the bits of bfloat16 widened."""
    found = {}
    for name, array in weights.items():
        if array.dtype == np.uint16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        elif array.dtype == np.int8:
            array = array.astype(np.float32) * weights[name + SCALE][:, None]
        found[name] = torch.from_numpy(np.array(array, np.float32))
    return found
