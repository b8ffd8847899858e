"""Small payloads and windows that every test folder shares, and the folder of real data where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fastlvm.data import Payload, Windows


def _article_walks(articles=6, chunks=20, dim=32, seed=0, dtype=np.float32):
    """Vectors [articles·chunks, dim] of length 1 and keys [.., 2]; neighbours of an article resemble each other."""
    rng = np.random.default_rng(seed)
    vectors = np.empty((articles, chunks, dim))
    for article in range(articles):
        topic = rng.standard_normal(dim)
        step = rng.standard_normal(dim)
        for chunk in range(chunks):
            step = 0.7 * step + 0.7 * rng.standard_normal(dim)
            vectors[article, chunk] = topic + step
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    keys = np.stack(np.meshgrid(np.arange(articles), np.arange(chunks), indexing="ij"), axis=-1)
    return vectors.reshape(-1, dim).astype(dtype), keys.reshape(-1, 2).astype(np.int32)


def make_payload(folder, articles=6, chunks=20, dim=32, seed=0, dtype=np.float32, name="payload", **options):
    """Build a payload of `article_walks` vectors with texts and titles in `folder`/`name`."""
    vectors, keys = _article_walks(articles, chunks, dim, seed, dtype)
    options.setdefault("texts", [f"text of chunk {chunk} of article {article}" for article, chunk in keys])
    options.setdefault("titles", {article: f"article {article}" for article in range(articles)})
    options.setdefault("encoder", "test-encoder")
    return Payload.build(Path(folder) / name, vectors, keys, **options)


@pytest.fixture(scope="session")
def article_walks():
    """article_walks(articles=, chunks=, dim=, seed=, dtype=) -> (vectors, keys)."""
    return _article_walks


@pytest.fixture
def payload_factory(tmp_path):
    """make_payload(articles=, chunks=, dim=, seed=, dtype=, name=, ...) into the test's own folder."""

    def factory(**options):
        return make_payload(tmp_path, **options)

    return factory


@pytest.fixture(scope="session")
def walk_payload(tmp_path_factory):
    """A payload of 12 articles x 20 chunks, 32 dimensions; nobody writes to it."""
    return make_payload(tmp_path_factory.mktemp("walks"), articles=12)


@pytest.fixture(scope="session")
def sample_windows(walk_payload):
    """Windows over `walk_payload`: 8, 2 and 2 articles."""
    return Windows.build(walk_payload, split=(0.7, 0.15, 0.15), seed=0)


@pytest.fixture(scope="session")
def real_data():
    """Folder of real vectors, keys and texts, named by FASTLVM_DATA; skips without it."""
    root = os.environ.get("FASTLVM_DATA")
    if not root:
        pytest.skip("FASTLVM_DATA does not name a folder of real data sets")
    folder = Path(root) / "sotu"
    if not (folder / "vectors.npy").is_file():
        pytest.skip(f"{folder} holds no vectors.npy")
    return folder
