"""Weights on disk, whatever framework they are for: safetensors with JSON beside them and a digest of the numbers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from fastlvm.errors import InputError, IntegrityError
from fastlvm.files import atomic_file

# a single metadata key: several would be written in an order that changes from run to run
_META = "fastlvm"
_DIGEST = "sha256"  # in the metadata, of the tensors

T = TypeVar("T")  # a tensor of any framework


def save(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write arrays and JSON metadata to one safetensors file, atomically."""
    plain = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    text = json.dumps({**meta, _DIGEST: _digest(plain)}, sort_keys=True, allow_nan=False)
    with atomic_file(path) as temporary:
        save_file(plain, temporary, {_META: text})


def save_file(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """safetensors' own save_file writes under a temporary name of its own, which a kill would leave in the folder."""
    path.write_bytes(serialise(tensors, metadata))


def load(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `save` wrote. Raises InputError when it is missing, IntegrityError when it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: name a run folder that holds a checkpoint")
    try:
        with safe_open(str(path), framework="numpy") as file:
            meta = json.loads((file.metadata() or {})[_META])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        digest = meta.pop(_DIGEST)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise IntegrityError(f"{path} is no readable checkpoint ({error}): restore it or train again") from error
    if digest != _digest(tensors):
        raise IntegrityError(f"{path} is damaged, its numbers have changed: restore it or train again")
    return tensors, meta


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Hex SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} torch.{array.dtype.name} {array.shape}\n".encode())  # dtypes as torch names them
        digest.update(array.tobytes())
    return digest.hexdigest()


def pick(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The tensors whose name starts with `prefix.`, by the rest of their name."""
    start = prefix + "."
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def prefixed(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
