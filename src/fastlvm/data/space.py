"""A space: a mean and a whitening matrix, fitted on training articles and applied to payload and queries alike.

On real text vectors a few directions carry most of the variance and tell documents apart badly. Damping them,
`(v − μ)·C^-power`, raises retrieval before any model is trained.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlvm.data import rows as table
from fastlvm.data import tensors
from fastlvm.errors import InputError, IntegrityError, shown
from fastlvm.files import Entries, atomic_file, parse_json, sha256_json, wrong_entry

if TYPE_CHECKING:
    from fastlvm.data.payload import Payload

_META = "fastlvm"
_FORMAT = "fastlvm-space-1"
_REMEDY = "restore it or fit the space again"
_ENTRIES: Entries = {
    "power": ("a number", lambda value: isinstance(value, float)),
    "payload_id": ("an id or null", lambda value: value is None or isinstance(value, str)),
    "fitted_on": ("a text", lambda value: isinstance(value, str)),
}


class Space:
    """v ↦ normalise((v − mean) @ matrix), with mean float32 [dim] and matrix float32 [dim, dim], symmetric.

    Attributes: mean, matrix, dim, id (16 hex digits over mean and matrix), power, payload_id and fitted_on (what it was
    fitted on; None and "" for an identity).
    """

    def __init__(
        self,
        mean: Any,
        matrix: Any,
        *,
        power: float = 0.0,
        payload_id: str | None = None,
        fitted_on: str = "",
    ) -> None:
        self.mean = np.ascontiguousarray(mean, dtype=np.float32)
        self.matrix = np.ascontiguousarray(matrix, dtype=np.float32)
        dim = self.mean.shape[0] if self.mean.ndim == 1 else 0
        if dim == 0 or self.matrix.shape != (dim, dim):
            shapes = f"{shown(self.mean.shape)}, {shown(self.matrix.shape)}"
            raise InputError(f"a space wants mean [dim] and matrix [dim, dim], got {shapes}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.matrix).all()):
            raise InputError("mean or matrix of the space holds NaN or infinity: fit it again")
        with np.errstate(over="ignore"):
            products = np.abs(self.mean) @ np.abs(self.matrix)
        if not np.isfinite(products).all():
            raise InputError("the products of the space's mean and matrix overflow float32: fit it again")
        self.dim = dim
        self.power = float(power)
        self.payload_id = payload_id
        self.fitted_on = fitted_on
        content = hashlib.sha256(self.mean.astype("<f4").tobytes() + self.matrix.astype("<f4").tobytes())
        self.id = content.hexdigest()[:16]
        self._identity = not self.mean.any() and np.array_equal(self.matrix, np.eye(dim, dtype=np.float32))
        self.mean.flags.writeable = self.matrix.flags.writeable = False

    def __repr__(self) -> str:
        return f"Space(id={self.id}, dim={self.dim}, power={self.power:g}, fitted_on={self.fitted_on!r})"

    @classmethod
    def identity(cls, dim: int) -> Space:
        """The space that only normalises."""
        return cls(np.zeros(dim, np.float32), np.eye(dim, dtype=np.float32))

    @classmethod
    def fit(
        cls,
        vectors: Any,
        *,
        power: float = 0.25,
        eps: float = 1e-2,
        payload_id: str | None = None,
        fitted_on: str = "",
    ) -> Space:
        """Mean and `C^-power` of `vectors` [rows, dim], computed in float64.

        power: 0 centres only, 0.5 whitens fully. eps: added to every eigenvalue, as a part of their mean; it bounds how
        far directions with little or no variance (dim > rows) are blown up. Raises InputError.
        """
        vectors = table.check_vectors(vectors)
        return cls._from_blocks(
            (vectors[part] for part in table.blocks(*vectors.shape)),
            len(vectors),
            vectors.shape[1],
            power=power,
            eps=eps,
            payload_id=payload_id,
            fitted_on=fitted_on or f"{len(vectors)} vectors",
        )

    @classmethod
    def fit_articles(cls, payload: Payload, articles: Any, power: float = 0.25, *, eps: float = 1e-2) -> Space:
        """Fit on every row of `articles` (integers) in the payload. Raises InputError where it has none of them."""
        wanted = np.unique(np.asarray(articles))
        if wanted.size == 0 or wanted.dtype.kind not in "iu":
            raise InputError("articles is empty or no integers: name the training articles")
        rows = np.flatnonzero(np.isin(payload.keys[:, 0], wanted))
        found = len(np.unique(payload.keys[rows, 0]))
        if found != len(wanted):
            raise InputError(
                f"the payload has {found} of the {len(wanted)} articles named: take articles of this payload"
            )
        mark = sha256_json([int(article) for article in wanted])[:16]
        return cls._from_blocks(
            (payload.take(rows[part]) for part in table.blocks(len(rows), payload.dim)),
            len(rows),
            payload.dim,
            power=power,
            eps=eps,
            payload_id=payload.id,
            fitted_on=f"{len(rows)} rows of {len(wanted)} articles ({mark})",
        )

    @classmethod
    def _from_blocks(
        cls, blocks: Any, rows: int, dim: int, *, power: float, eps: float, payload_id: str | None, fitted_on: str
    ) -> Space:
        if not 0 <= power <= 0.5:
            raise InputError(f"power is {power}, and goes from 0 (centre only) to 0.5 (whiten fully)")
        if not (np.isfinite(eps) and eps > 0):
            raise InputError(f"eps is {eps}, and has to be above 0")
        if rows < 2:
            raise InputError(f"a space is fitted on {rows} row, and wants at least 2")
        total, products = np.zeros(dim), np.zeros((dim, dim))
        for block in blocks:
            wide = np.asarray(block, dtype=np.float64)  # [n, dim]
            total += wide.sum(axis=0)
            products += wide.T @ wide
        mean = total / rows
        covariance = products / rows - np.outer(mean, mean)
        if not np.isfinite(covariance).all():
            raise InputError("the vectors hold NaN or infinity: run fastlvm payload verify")
        values, basis = np.linalg.eigh(covariance)
        values = np.maximum(values, 0)
        average = values.mean()
        if not average > 1e-12 * (products.trace() / rows):
            raise InputError(f"the {rows} vectors are all the same: a space wants vectors that differ")
        # The scale is free, since results are normalised; the mean eigenvalue keeps matrix near the identity.
        gains = (values / average + eps) ** -power
        return cls(mean, (basis * gains) @ basis.T, power=power, payload_id=payload_id, fitted_on=fitted_on)

    def apply(self, vectors: Any) -> np.ndarray:
        """Take vectors [..., dim] into the space: float32, length 1 (a vector equal to the mean gives zeros)."""
        given = np.asarray(vectors)
        if given.dtype.name not in table.TOLERANCE or given.shape[-1:] != (self.dim,):
            raise InputError(
                f"vectors have shape {given.shape} and dtype {given.dtype}, and {self.dim} floats are wanted"
            )
        flat = given.reshape(-1, self.dim)
        result = np.empty(flat.shape, np.float32)
        for part in table.blocks(*flat.shape):
            block = flat[part]
            if not self._identity:
                block = (block.astype(np.float32) - self.mean) @ self.matrix
            result[part] = table.normalised(block)
        return result.reshape(given.shape)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the space as safetensors, atomically."""
        from safetensors.numpy import save

        record = {
            "format": _FORMAT,
            "id": self.id,
            "power": self.power,
            "payload_id": self.payload_id,
            "fitted_on": self.fitted_on,
        }
        # a single key: several would be written in an order that changes from run to run
        metadata = {_META: json.dumps(record)}
        with atomic_file(path) as temporary:
            # not save_file: it writes under a temporary name of its own, which a kill would leave in the folder
            temporary.write_bytes(save({"mean": self.mean, "matrix": self.matrix}, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Space:
        """Read a saved space. Raises InputError for a file that is none, IntegrityError for a damaged one."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path} does not exist: name a space.safetensors that fastlvm wrote")
        try:
            found, metadata = tensors.read(path, ("F32",))
            record = _record(metadata)
            space = _space(found, record) if record.get("format") == _FORMAT else None
        except InputError as error:
            raise IntegrityError(f"{path} is damaged ({error}): {_REMEDY}") from error
        if space is None:
            raise InputError(f"{path} is not a space of fastlvm: name a space.safetensors")
        if space.id != record.get("id"):
            stated = shown(record.get("id"))
            raise IntegrityError(f"{path} holds other numbers than its id {stated} stands for: {_REMEDY}")
        return space


def _record(metadata: dict[str, str]) -> dict[str, Any]:
    """What `save` wrote beside the tensors; empty where it is something else."""
    try:
        record = parse_json(metadata.get(_META, "{}"))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _space(found: dict[str, np.ndarray], record: dict[str, Any]) -> Space:
    if missing := {"mean", "matrix"} - found.keys():
        raise InputError(f"tensor {min(missing)} is missing")
    if wrong := wrong_entry(record, _ENTRIES):
        raise InputError(wrong)
    entries = {name: record[name] for name in _ENTRIES}
    return Space(np.array(found["mean"]), np.array(found["matrix"]), **entries)
