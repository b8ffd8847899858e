"""The predictor: the model alone, the search alone, and both together as a user calls them, batch 1 and 64.

The artifact is made on the fly: 20,000 random-walk vectors of 768 in 200 articles, an exact index, and a Mamba-S with
random weights of the size the demo trains (d 256, 4 layers, N 16). Latency does not depend on what the weights are.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastlvm

ARTICLES, CHUNKS, DIM, K = 200, 100, 768, 50
SMALL = {"d_model": 256, "n_layers": 4, "d_state": 16}
SIZES = {"rows": ARTICLES * CHUNKS, "dim": DIM, "k": K, **SMALL}
BATCHES = pytest.mark.parametrize("batch", (1, 64))


def vectors() -> np.ndarray:
    """float32 [rows, dim], neighbours of an article alike."""
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((ARTICLES, CHUNKS, DIM), np.float32)
    for chunk in range(1, CHUNKS):
        steps[:, chunk] = 0.7 * steps[:, chunk - 1] + 0.7 * steps[:, chunk]
    rows = steps.reshape(-1, DIM)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def model(**sizes) -> torch.nn.Module:
    """Random weights in the head too, which starts at zero otherwise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = fastlvm.models.create("mamba-s", **sizes).eval()
        with torch.no_grad():
            torch.nn.init.normal_(made.head.weight, std=0.02)
    return made


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    keys = np.stack(np.divmod(np.arange(ARTICLES * CHUNKS), CHUNKS), axis=1).astype(np.int32)
    payload = fastlvm.Payload.build(folder / "payload", vectors(), keys, encoder="random walk")
    fastlvm.export(model(**SMALL), folder / "artifact", payload=payload)
    return fastlvm.Predictor.load(folder / "artifact")


@pytest.fixture(scope="module")
def contexts():
    return vectors().reshape(ARTICLES, CHUNKS, DIM)[:, :5].copy()  # [200, 5, 768]


@BATCHES
@pytest.mark.benchmark(group="predictor")
def test_model(predictor, contexts, batch, timed):
    found = timed(lambda: predictor.predict(contexts[:batch]), batch=batch, **SIZES)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5


@BATCHES
@pytest.mark.benchmark(group="predictor")
def test_search(predictor, contexts, batch, timed):
    queries = predictor.predict(contexts[:batch])
    found = timed(lambda: predictor.index.search(queries, K), batch=batch, **SIZES)
    assert (found.ids >= 0).all()


@BATCHES
@pytest.mark.parametrize("exclude", (None, "context"))
@pytest.mark.benchmark(group="predictor")
def test_end_to_end(predictor, contexts, batch, exclude, timed):
    """Context vectors in, ids out."""
    found = timed(lambda: predictor.search(contexts[:batch], K, exclude=exclude), batch=batch, **SIZES)
    assert (found.ids >= 0).all()
