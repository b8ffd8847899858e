"""Small artifacts of every layer type and precision, as files in memory; made without torch, the same every time."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastlvm.data import Payload, Space
from fastlvm.data.npz import DAMAGE, HEADER_ERRORS
from fastlvm.files import sha256_json
from fastlvm.predictor import artifact
from fastlvm.predictor.forward import Forward, Plan
from fastlvm.predictor.pack import PRECISIONS, pack
from fastlvm.retrieval import Index

DIM, CONTEXT, ROWS = 12, 4, 96
Files = dict[str, bytes]  # path in the folder → content
MALFORMED = (*HEADER_ERRORS, *DAMAGE, KeyError, IndexError, AttributeError)
"""What reading a damaged file raises."""

META = ("payload_id", "space_id", "kind", "rows", "dim", "nlist", "nprobe", "ef_search", "recall_at_50", "seed")

MAMBA = [
    {"type": "linear", "prefix": "embed", "inputs": DIM, "outputs": 20},
    {"type": "mamba_block", "prefix": "b0", "dim": 20, "d_inner": 40, "d_state": 5, "d_conv": 4, "dt_rank": 2},
    {"type": "mamba_block", "prefix": "b1", "dim": 20, "d_inner": 40, "d_state": 5, "d_conv": 4, "dt_rank": 2},
    {"type": "last"},
    {"type": "rms_norm", "prefix": "norm", "dim": 20},
    {"type": "linear", "prefix": "head", "inputs": 20, "outputs": DIM},
    {"type": "recency_mixture", "prefix": "mixture", "context": CONTEXT},
    {"type": "l2_norm"},
]
MIXED = [
    {"type": "positions", "prefix": "places", "context": CONTEXT, "dim": DIM},
    {
        "type": "residual",
        "layers": [
            {"type": "layer_norm", "prefix": "norm0", "dim": DIM},
            {"type": "linear", "prefix": "qkv", "inputs": DIM, "outputs": 36, "bias": False},
            {"type": "attention", "dim": 12, "heads": 2, "window": 3},
            {"type": "linear", "prefix": "out", "inputs": 12, "outputs": DIM},
        ],
    },
    {
        "type": "mamba2_block",
        "prefix": "two",
        "dim": DIM,
        **{"n_heads": 4, "head_dim": 5, "n_groups": 2, "d_state": 6, "d_conv": 3},
    },
    {"type": "gru", "prefix": "gru", "inputs": DIM, "hidden": 9},
    {"type": "lstm", "prefix": "lstm", "inputs": 9, "hidden": 17, "suffix": "l1"},
    {"type": "gelu"},
    {"type": "last"},
    {"type": "linear", "prefix": "head", "inputs": 17, "outputs": DIM},
    {"type": "l2_norm"},
]
MEAN = [
    {"type": "context_attention", "prefix": "mix", "dim": DIM, "inner": 7},
    {"type": "layer_norm", "prefix": "norm", "dim": 2 * DIM},
    {"type": "linear", "prefix": "head", "inputs": 2 * DIM, "outputs": DIM},
    {"type": "l2_norm"},
]
for _entry in (*MAMBA, *MIXED, *MIXED[1]["layers"], *MEAN):  # type: ignore[misc]
    if _entry["type"] in ("rms_norm", "layer_norm", "mamba_block", "mamba2_block"):
        _entry["eps"] = 1e-5


class Base(NamedTuple):
    """A good artifact, and the space of its index."""

    files: Files
    space: Space


def make(folder: Path) -> list[Base]:
    """Every model in every precision, with every kind of index among them; the folder is scratch."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((ROWS, DIM)).astype(np.float32) + 0.5
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[30] = vectors[7]
    keys = np.stack(np.divmod(np.arange(ROWS), 8), axis=1).astype(np.int32)
    payload = Payload.build(folder / "payload", vectors, keys, encoder="fuzz")
    spaces = Space.fit(vectors), Space.identity(DIM), Space.fit(vectors, power=0.5)
    indexes = (
        Index.build(payload, "flat", space=spaces[0]),
        Index.build(payload, "flat"),
        Index.build(payload, "ivf_flat", space=spaces[2], nlist=2, nprobe=1),
        Index.build(payload, "ivf_sq8", space=spaces[0], nlist=2, nprobe=1),
        Index.build(payload, "hnsw", space=spaces[2]),
        Index.build(payload, "ivf_rabitq", space=spaces[2], nlist=2, nprobe=2),
    )
    found = []
    for layers, precision in itertools.product((MAMBA, MIXED, MEAN), PRECISIONS):
        index = indexes[len(found) % len(indexes)]
        plan = Plan(layers, CONTEXT, DIM)
        packed = pack(plan, weights_of(plan, rng), precision)
        raw = contexts(rng, 3, CONTEXT, DIM)
        golden = artifact.Golden(raw, Forward(plan, packed, index.space)(raw))
        path = folder / f"artifact{len(found)}"
        entries = {"precision": precision, "model": "fuzz", "layers": layers}
        artifact.write(path, plan, packed, golden, index, entries, lambda _: None)
        files = {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
        found.append(Base(files, index.space))
    return found


def weights_of(plan: Plan, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """float32 weights of a model, all of about the size that training leaves."""
    found = {}
    for name, shape in plan.tensors().items():
        scale = 1 / np.sqrt(shape[1]) if name in plan.matrices() else 0.3
        found[name] = (scale * rng.standard_normal(shape, np.float32)).astype(np.float32)
        if name.endswith((".D", "norm.weight")):
            found[name] += 1
    return found


def contexts(rng: np.random.Generator, n: int, context: int, dim: int) -> np.ndarray:
    """Unit vectors float32 [n, context, dim]."""
    raw = rng.standard_normal((n, context, dim), np.float32)
    return raw / np.linalg.norm(raw, axis=-1, keepdims=True)


def reseal(files: Files) -> None:
    """Make ids, hashes and checksums fit the files, as whoever changes one on purpose would."""
    with contextlib.suppress(*MALFORMED):
        content = json.loads(files["index/index.json"])
        for name in content["sha256"]:
            content["sha256"][name] = _digest(files, f"index/{name}")
        content["id"] = sha256_json({name: content[name] for name in META})[:16]
        files["index/index.json"] = _sealed(content)
    with contextlib.suppress(*MALFORMED):
        content = json.loads(files["config.json"])
        for name in content["sha256"]:
            content["sha256"][name] = _digest(files, name)
        with contextlib.suppress(*MALFORMED):
            index = json.loads(files["index/index.json"])
            content |= {"payload_id": index["payload_id"], "space_id": index["space_id"], "index_id": index["id"]}
        files["config.json"] = _sealed(content)


def _digest(files: Files, name: str) -> str:
    return hashlib.sha256(files.get(name, b"")).hexdigest()


def _sealed(content: dict) -> bytes:
    content.pop("checksum", None)
    return json.dumps(content | {"checksum": sha256_json(content)}).encode()
