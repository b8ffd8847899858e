from __future__ import annotations

import numpy as np
import pytest

from fastlvm.data import Payload, Space, Windows
from fastlvm.evaluation import Latency, Ranker, evaluate
from fastlvm.evaluation.latency import Stage
from fastlvm.evaluation.ranker import Listing


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


HOSTILE = """<script>alert("x")</script> & $a_b$ |_[u](v)'\x00\x1b"""


@pytest.fixture(scope="package")
def hostile():
    """A name that is markup, mathematics and control characters."""
    return HOSTILE


@pytest.fixture(scope="package")
def full_report(payload, windows):
    """Everything a report can hold: two models, one of a hostile name, an index, an order by keys, latencies."""
    space = Space.fit_articles(payload, windows.articles("train"))
    pool = space.apply(payload.take(np.arange(len(payload))))

    def target(vectors):
        return np.argsort(-vectors @ pool.T, axis=1)[:, :20]

    def search(context, predictions, rows):
        scores = predictions @ pool.T
        scores[np.arange(len(rows))[:, None], rows] = -np.inf
        return np.argsort(-scores, axis=1)[:, :20]

    listings = [
        Listing("a list of 20", 20, search, target),
        Listing("a list of 20", 20, search, target, label="by key", keys=True),
    ]
    models = [
        Ranker("near", lambda c: space.apply(c[:, -1]) + 0.3 * space.apply(c[:, -2]), space, listings=listings),
        Ranker(HOSTILE, lambda c: c.mean(axis=1), note=HOSTILE),
    ]
    report = evaluate(models, payload, windows, resamples=100)
    stages = {"model": Stage(1, 2, 3, 1), "search": Stage(1, 1, 1, 1), "mmr:0.9": Stage(1, 1, 1, 1)}
    report.latency["near"] = Latency({**stages, "total": Stage(2.5, 3, 4, 2)}, 10, 2, 1, HOSTILE)
    return report
