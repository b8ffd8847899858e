"""An artifact folder: a predictor with everything it needs, written whole and read with every part checked.

`model.safetensors` (weights), `golden.npz` (raw contexts and the predictions they have to give), `index/` (the
payload's index with its space) and `config.json`: format version, precision, layer list, ids of payload, space, windows
and index, SHA-256 of the other files (of index/ that of its index.json, which holds those of its own files), tool
version and a checksum of itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastlvm
from fastlvm.data import tensors
from fastlvm.data.npz import Archive
from fastlvm.errors import InputError, IntegrityError, shown
from fastlvm.files import (
    ID,
    Entries,
    atomic_folder,
    check_files,
    holds_digests,
    read_json,
    sha256_file,
    sha256_json,
    whole_number,
    write_json,
    wrong_entry,
)
from fastlvm.predictor.forward import Forward, Plan
from fastlvm.retrieval import Index

FORMAT = "fastlvm-artifact"
VERSION = 1
# Of any component of a golden prediction, which has length 1. Below float32 another instruction set may round an
# activation the other way.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3, "int8": 4e-3}
CONFIG, MODEL, GOLDEN, INDEX = "config.json", "model.safetensors", "golden.npz", "index"
_HASHED = (MODEL, GOLDEN, f"{INDEX}/index.json")
_ENTRIES: Entries = {
    **dict.fromkeys(("payload_id", "space_id", "index_id"), ID),
    **dict.fromkeys(("context", "dim"), whole_number(1)),
    "sha256": (
        f"the hashes of {', '.join(_HASHED)}",
        lambda value: holds_digests(value) and set(value) == set(_HASHED),
    ),
}


class Golden(NamedTuple):
    """Raw contexts float32 [g, context, dim] and the predictions float32 [g, dim] they have to give."""

    context: np.ndarray
    prediction: np.ndarray


@dataclass(frozen=True)
class Artifact:
    """What `read` found. The golden predictions are still to be compared: see `check_golden`.

    forward takes raw vectors, and the space of the index is its first layer.
    """

    path: Path
    config: dict[str, Any]
    forward: Forward
    golden: Golden
    index: Index


def write(
    folder: str | os.PathLike[str],
    plan: Plan,
    weights: Mapping[str, np.ndarray],
    golden: Golden,
    index: Index,
    config: Mapping[str, Any],
    check: Callable[[Path], None],
) -> None:
    """Write a new artifact folder. `check` is given it before it takes its name: when it raises, nothing is left.

    config: the entries that are not derived from the other arguments, `layers` and `precision` among them.
    """
    plan.check_shapes({name: array.shape for name, array in weights.items()})
    with atomic_folder(folder) as path:
        _write_weights(path / MODEL, weights)
        np.savez(path / GOLDEN, context=golden.context, prediction=golden.prediction)
        index.save_copy(path / INDEX)  # what is given goes on where it was
        content = {
            "format": FORMAT,
            "version": VERSION,
            "tool": f"fastlvm {fastlvm.__version__}",
            **config,
            "context": plan.shape.positions,
            "dim": plan.shape.dim,
            "payload_id": index.payload_id,
            "space_id": index.space.id,
            "index_id": index.id,
            "sha256": {name: sha256_file(path / name) for name in _HASHED},
        }
        write_json(path / CONFIG, content | {"checksum": sha256_json(content)})
        check(path)


def read(folder: str | os.PathLike[str], threads: int | None = None) -> Artifact:
    """Read an artifact after checking its files against config.json and its weights against the layer list.

    threads, if given, is the model's thread count, and FAISS's for the whole process. Raises InputError where there is
    no artifact or one of another version, IntegrityError where a part is missing, damaged or not the one config.json
    names.
    """
    path = Path(folder)
    config = read_config(path)
    check_files(path, config["sha256"], "export the artifact again")
    try:
        plan = Plan(config.get("layers"), config["context"], config["dim"])
    except InputError as error:
        raise InputError(f"{path / CONFIG}: {error}; export the artifact again") from error
    index = Index.open(path / INDEX, threads=threads)
    for name, found in (("payload_id", index.payload_id), ("space_id", index.space.id), ("index_id", index.id)):
        if found != config[name]:
            raise IntegrityError(
                f"{path / INDEX} has {name} {found}, and {CONFIG} names {config[name]}: export the artifact again"
            )
    if index.dim != plan.shape.dim:
        raise IntegrityError(f"{path / INDEX} has dimension {index.dim}, and the model {plan.shape.dim}: export again")
    golden = _read_golden(path / GOLDEN, plan)
    try:
        forward = Forward(plan, tensors.read(path / MODEL)[0], index.space, threads)
    except ValueError as error:
        raise IntegrityError(f"{path / MODEL}: {error}: export the artifact again") from error
    return Artifact(path, config, forward, golden, index)


def weights(artifact: Artifact) -> dict[str, np.ndarray]:
    """The packed tensors, as `read` has checked them: views of the file."""
    return tensors.read(artifact.path / MODEL)[0]


def check_golden(artifact: Artifact, predict: Callable[[np.ndarray], np.ndarray], beside: float = 0.0) -> None:
    """Raises IntegrityError unless `predict`, raw contexts in, gives the golden predictions.

    beside: what it may be off by on top, where it computes in another precision than the artifact's.
    """
    with np.errstate(all="ignore"):
        try:
            found = predict(artifact.golden.context)
        except InputError as error:
            raise IntegrityError(f"{artifact.path / GOLDEN}: {error}: export the artifact again") from error
        worst = float(np.abs(found - artifact.golden.prediction).max())
    tolerance = TOLERANCE[artifact.config["precision"]] + beside
    if not worst <= tolerance:
        raise IntegrityError(
            f"{artifact.path} predicts its golden windows off by {worst:.2g}, and at most {tolerance:g} is wanted: "
            "export the artifact again"
        )


def read_config(path: Path) -> dict[str, Any]:
    """config.json of an artifact, its version, checksum and the kind of every entry checked; not yet the layers."""
    file = path / CONFIG
    if not file.is_file():
        raise InputError(f"{path} holds no artifact ({CONFIG} is missing): write one with fastlvm export")
    try:
        content = read_json(file)
    except InputError as error:
        raise IntegrityError(str(error)) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{file} is not an artifact of fastlvm: write one with fastlvm export")
    if content.get("version") != VERSION:
        found = shown(content.get("version"))
        raise InputError(f"{file} has version {found}, and this fastlvm reads version {VERSION}: export it again")
    if content.pop("checksum", None) != sha256_json(content):
        raise IntegrityError(f"{file} is damaged, its checksum does not fit: export the artifact again")
    if content.get("precision") not in list(TOLERANCE):
        found = shown(content.get("precision"))
        raise InputError(f"{file} has precision {found}, and this version runs {', '.join(TOLERANCE)}: update fastlvm")
    if wrong := wrong_entry(content, _ENTRIES):
        raise IntegrityError(f"{file} lacks what an artifact records ({wrong}): export the artifact again")
    return content


def _write_weights(file: Path, weights: Mapping[str, np.ndarray]) -> None:
    """safetensors; uint16 arrays hold the bits of bfloat16 numbers, for which numpy has no type."""
    from safetensors import TensorSpec, serialize_file

    kept = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    specs = {
        name: TensorSpec(
            dtype="bfloat16" if array.dtype == np.uint16 else array.dtype.name,
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in kept.items()
    }
    file.touch()
    mode = file.stat().st_mode
    serialize_file(specs, str(file))  # in a file of its own, which nobody but its owner may read
    file.chmod(mode)


def _read_golden(file: Path, plan: Plan) -> Golden:
    positions, dim = plan.shape
    try:
        with Archive(file) as archive:
            golden = Golden(archive.array("context"), archive.array("prediction"))
    except InputError as error:
        raise IntegrityError(f"{error}: export the artifact again") from error
    n = len(golden.context) if golden.context.ndim else 0
    shapes = golden.context.shape == (n, positions, dim) and golden.prediction.shape == (n, dim)
    if n < 1 or not shapes or any(part.dtype != np.float32 for part in golden):
        found = " and ".join(f"{part.dtype} {shown(list(part.shape))}" for part in golden)
        raise IntegrityError(
            f"{file} does not hold the windows of this model ({found}, and float32 [n, {positions}, {dim}] and "
            f"[n, {dim}] are wanted): export the artifact again"
        )
    return golden
