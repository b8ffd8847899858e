from __future__ import annotations

import numpy as np
import pytest
import torch

from fastlvm.data import Payload, Windows

# a run of seconds on one core; every kind of randomness is in it
TINY = {
    "d_model": 16,
    "n_layers": 1,
    "d_state": 4,
    "dropout": 0.2,
    "context_dropout": 0.2,
    "span_corruption": 0.1,
    "epochs": 3,
    "batch_size": 16,
    "lr": 3e-3,
    "warmup_steps": 3,
    "patience": 0,
    "seed": 3,
}


def walks(articles=14, chunks=13, dim=12, seed=0):
    """Articles as random walks on the sphere: neighbours resemble each other."""
    rng = np.random.default_rng(seed)
    vectors, keys = [], []
    for article in range(articles):
        v = rng.normal(size=dim)
        for chunk in range(chunks):
            v = v / np.linalg.norm(v) + 0.35 * rng.normal(size=dim)
            vectors.append(v / np.linalg.norm(v))
            keys.append((article, chunk))
    return np.array(vectors, dtype=np.float32), np.array(keys, dtype=np.int32)


def build_payload(folder, **kinds):
    vectors, keys = walks(**kinds)
    return Payload.build(folder, vectors, keys, encoder="synthetic")


@pytest.fixture(scope="session")
def payload(tmp_path_factory):
    return build_payload(tmp_path_factory.mktemp("walks") / "payload")


@pytest.fixture(scope="session")
def windows(payload):
    return Windows.build(payload, split=(0.6, 0.2, 0.2), seed=0)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
