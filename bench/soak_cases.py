"""What the soaks of growth search, and how it changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastlvm.data import Payload
from fastlvm.retrieval import Index

BATCH = 8  # rows of a change
LAG = 16  # changes after which a batch goes that was added
ARTICLE = 1_000_000  # of the first row that is added


class Setup(NamedTuple):
    """What is searched and how it changes."""

    rows: int
    dim: int
    seed: int


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def payload_vectors(setup: Setup) -> np.ndarray:
    return unit(np.random.default_rng(setup.seed).standard_normal((setup.rows, setup.dim)))


def payload_keys(rows: int) -> np.ndarray:
    return np.stack(np.divmod(np.arange(rows), 10), axis=1)


def made(setup: Setup, kind: str, folder: Path) -> Path:
    """An index of that kind in `folder`."""
    payload = Payload.build(folder.parent / "payload", payload_vectors(setup), payload_keys(setup.rows), encoder="none")
    Index.build(payload, kind, recall=0.9, seed=setup.seed).save(folder)
    shutil.rmtree(folder.parent / "payload")
    return folder


def batch(setup: Setup, number: int, rows: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and keys of an addition."""
    rng = np.random.default_rng([setup.seed + 1, number])
    keys = np.stack([np.full(rows, ARTICLE + number), np.arange(rows)], axis=1)
    return unit(rng.standard_normal((rows, setup.dim))), keys


def change(index: Index, setup: Setup, number: int) -> None:
    """Additions and removals in turn: first of rows of the payload, then of what was added LAG additions before."""
    turn, removal = divmod(number, 2)
    if not removal:
        index.add(*batch(setup, turn))
    elif turn < LAG:
        index.remove(payload_keys(setup.rows)[turn * BATCH : (turn + 1) * BATCH])
    else:
        index.remove(batch(setup, turn - LAG)[1])


def queries_of(setup: Setup) -> np.ndarray:
    """Half of them near to rows of the payload, half anywhere."""
    rng = np.random.default_rng([setup.seed + 2])
    queries = rng.standard_normal((1024, setup.dim)) / setup.dim**0.5
    queries[::2] += payload_vectors(setup)[rng.integers(0, setup.rows, 512)]
    return queries.astype(np.float32)
