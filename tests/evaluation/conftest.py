from __future__ import annotations

import numpy as np
import pytest

from fastlvm.data import Payload, Windows


def drifting(articles=40, chunks=14, dim=16, seed=0):
    """Articles whose chunks wander: the next is near the last. Vectors [N, dim] and keys [N, 2]."""
    rng = np.random.default_rng(seed)
    place = rng.standard_normal((articles, 1, dim))
    walk = place + 0.5 * np.cumsum(rng.standard_normal((articles, chunks, dim)), axis=1)
    walk += 1.2 * rng.standard_normal((articles, chunks, dim))
    walk += 2 * rng.standard_normal(dim) * np.linspace(1, 0, dim)  # a direction all share
    vectors = (walk / np.linalg.norm(walk, axis=-1, keepdims=True)).reshape(-1, dim).astype(np.float32)
    keys = np.stack(np.meshgrid(np.arange(articles), np.arange(chunks), indexing="ij"), axis=-1).reshape(-1, 2)
    return vectors, keys.astype(np.int32)


@pytest.fixture(scope="package")
def payload(tmp_path_factory):
    vectors, keys = drifting()
    return Payload.build(tmp_path_factory.mktemp("evaluation") / "drifting", vectors, keys, encoder="test-encoder")


@pytest.fixture(scope="package")
def windows(payload):
    return Windows.build(payload, context=5, split=(0.6, 0.2, 0.2), seed=1)
