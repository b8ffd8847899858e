"""A space: a mean and a whitening matrix, fitted on training articles and applied to payload and queries alike.

On real text vectors a few directions carry most of the variance and tell documents apart badly. Damping them,
`(v − μ)·C^-power`, raises retrieval before any model is trained. A two-tower model learns a tower on top of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlvm.data import rows as table
from fastlvm.data import tensors
from fastlvm.errors import InputError, IntegrityError, shown
from fastlvm.files import Entries, atomic_file, parse_json, sha256_json, wrong_entry

if TYPE_CHECKING:
    from fastlvm import _C
    from fastlvm.data.payload import Payload

_META = "fastlvm"
_FORMAT = "fastlvm-space-1"
_REMEDY = "restore it or fit the space again"
_TOWER = ("up.weight", "up.bias", "down.weight", "down.bias")
_ENTRIES: Entries = {
    "power": ("a number", lambda value: isinstance(value, float)),
    "payload_id": ("an id or null", lambda value: value is None or isinstance(value, str)),
    "fitted_on": ("a text", lambda value: isinstance(value, str)),
}


class Space:
    """v ↦ w = normalise((v − mean) @ matrix), with mean float32 [dim] and matrix float32 [dim, dim], symmetric.

    With a tower, normalise(w + down(gelu(up(w)))) instead: `tower` has float32 "up.weight" [hidden, dim], "up.bias"
    [hidden], "down.weight" [dim, hidden] and "down.bias" [dim], which `train(tower=hidden)` learns.

    Attributes: mean, matrix, tower, dim, id (16 hex digits over all of them), base (the space without its tower),
    power, payload_id and fitted_on (what it was fitted on; None and "" for an identity).
    """

    def __init__(
        self,
        mean: Any,
        matrix: Any,
        *,
        power: float = 0.0,
        payload_id: str | None = None,
        fitted_on: str = "",
        tower: Mapping[str, Any] | None = None,
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
        self.tower = None if tower is None else _checked_tower(tower, dim)
        arrays = [self.mean, self.matrix, *(self.tower or {}).values()]
        self.id = hashlib.sha256(b"".join(array.astype("<f4").tobytes() for array in arrays)).hexdigest()[:16]
        self._plain = not self.mean.any() and np.array_equal(self.matrix, np.eye(dim, dtype=np.float32))
        self._through_tower: _C.Model | None = None
        for array in arrays:
            array.flags.writeable = False

    def __repr__(self) -> str:
        return f"Space(id={self.id}, dim={self.dim}, power={self.power:g}, fitted_on={self.fitted_on!r})"

    @classmethod
    def identity(cls, dim: int) -> Space:
        """The space that only normalises."""
        return cls(np.zeros(dim, np.float32), np.eye(dim, dtype=np.float32))

    @property
    def base(self) -> Space:
        """The space without its tower."""
        return self.with_tower(None)

    def with_tower(self, tower: Mapping[str, Any] | None) -> Space:
        """The space with another tower, or with none. Raises InputError."""
        if tower is None and self.tower is None:
            return self
        return Space(
            self.mean, self.matrix, power=self.power, payload_id=self.payload_id, fitted_on=self.fitted_on, tower=tower
        )

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
            if not self._plain:
                block = (block.astype(np.float32) - self.mean) @ self.matrix
            result[part] = self._towered(table.normalised(block))
        return result.reshape(given.shape)

    def layers(self) -> list[tuple[str, dict[str, Any]]]:
        """What `apply` does, as layers of `_C.Model`."""
        weight = np.ascontiguousarray(self.matrix.T)
        moved = [] if self._plain else [("linear", {"weight": (weight, None, -(weight @ self.mean))})]
        return [*moved, ("l2_norm", {}), *self._tower_layers()]

    def _tower_layers(self) -> list[tuple[str, dict[str, Any]]]:
        if self.tower is None:
            return []
        up, up_bias, down, down_bias = (self.tower[name] for name in _TOWER)
        branch = [
            ("linear", {"weight": (up, None, up_bias)}),
            ("gelu", {}),
            ("linear", {"weight": (down, None, down_bias)}),
        ]
        return [("residual", {"layers": branch}), ("l2_norm", {})]

    def _towered(self, vectors: np.ndarray) -> np.ndarray:
        """float32 [n, dim] of length 1 → [n, dim]"""
        if self.tower is None:
            return vectors
        from fastlvm import _C

        if self._through_tower is None:
            self._through_tower = _C.Model(1, self.dim, [*self._tower_layers(), ("last", {})])
        out = np.empty_like(vectors)
        self._through_tower.run(vectors[:, None], out, 0)
        return out

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
            tower = {f"tower.{name}": array for name, array in (self.tower or {}).items()}
            temporary.write_bytes(save({"mean": self.mean, "matrix": self.matrix, **tower}, metadata))

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
    tower = {name.removeprefix("tower."): np.array(found[name]) for name in found if name.startswith("tower.")}
    return Space(np.array(found["mean"]), np.array(found["matrix"]), **entries, tower=tower or None)


def _checked_tower(tower: Mapping[str, Any], dim: int) -> dict[str, np.ndarray]:
    """Copies of a tower's arrays in their order."""
    if set(tower) != set(_TOWER):
        raise InputError(f"a tower has {shown(sorted(tower))}, and {', '.join(_TOWER)} are wanted")
    found = {name: np.array(tower[name], dtype=np.float32) for name in _TOWER}
    up, up_bias, down, down_bias = found.values()
    hidden = len(up_bias) if up_bias.ndim == 1 else 0
    if not hidden or (up.shape, down.shape, down_bias.shape) != ((hidden, dim), (dim, hidden), (dim,)):
        shapes = ", ".join(shown(array.shape) for array in found.values())
        raise InputError(f"a tower wants [hidden, {dim}], [hidden], [{dim}, hidden] and [{dim}], got {shapes}")
    with np.errstate(over="ignore", invalid="ignore"):  # the most that a vector of length 1 can come to
        most = np.abs(down) @ (np.abs(up).sum(axis=1) + np.abs(up_bias)) + np.abs(down_bias)
        if not np.isfinite(most @ most):
            raise InputError("the tower holds NaN or infinity, or its products overflow float32: train again")
    return found
