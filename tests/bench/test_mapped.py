"""The bench of an index larger than memory: copies of lists make an index that can be opened and searched."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import fastlvm
import mapped
from fastlvm.data import Payload
from fastlvm.retrieval import Index

ROWS, DIM, COPIES = 300, 24, 3


@pytest.fixture
def small(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    keys = np.stack(np.divmod(np.arange(ROWS), 10), axis=1).astype(np.int32)
    payload = Payload.build(tmp_path / "payload", vectors, keys, encoder="test")
    index = Index.build(payload, "ivf_rabitq", nlist=8, nprobe=8)
    index.save(tmp_path / "small")
    return index


def test_every_row_is_in_the_large_index_as_often_as_there_are_copies(tmp_path, small):
    mapped.enlarge(tmp_path / "small", tmp_path / "large", COPIES)
    assert Index.verify(tmp_path / "large").rows == COPIES * ROWS
    large = fastlvm.Index.open(tmp_path / "large", mapped=True)
    large._searcher.setting = large.nlist
    query = np.random.default_rng(1).standard_normal((1, DIM)).astype(np.float32)
    few, many = small.search(query, ROWS), large.search(query, COPIES * ROWS)
    np.testing.assert_array_equal(np.sort(many.ids[0]), np.arange(COPIES * ROWS))
    np.testing.assert_array_equal(many.scores[0], np.repeat(few.scores[0], COPIES))


def test_the_child_says_what_calls_took(tmp_path, small):
    queries = np.random.default_rng(1).standard_normal((5, DIM)).astype(np.float32)
    found = mapped.search(tmp_path / "small", queries, 7, mapped=True)
    assert found["calls"] == 7 and found["rows"] == ROWS
    assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"] and found["anonymous"] > 0
