"""What the tests of growth share: a small payload's vectors and keys, and every kind of index."""

from __future__ import annotations

import numpy as np

from fastlvm.data import Payload
from fastlvm.retrieval import Index, build

DIM, ROWS = 24, 420
KINDS = tuple(build.KINDS)
LISTS = {kind: {"nlist": 8, "nprobe": 8} for kind in KINDS if build.KINDS[kind].LISTS}


def vectors_of(seed, rows):
    vectors = np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def keys_of(article, rows):
    return np.stack([np.full(rows, article), np.arange(rows)], axis=1)


def payload_of(folder, vectors, keys):
    return Payload.build(folder, vectors, keys, encoder="test")


class Saved:
    """By kind, the folder of an index of the payload; built when it is first asked for, and not to be changed."""

    def __init__(self, folder, payload, space=None):
        self._folder, self._payload, self._space = folder, payload, space

    def __getitem__(self, kind):
        if not (self._folder / kind).exists():
            index = Index.build(self._payload, kind, space=self._space, recall=0.9, **LISTS.get(kind, {}))
            index.save(self._folder / kind)
        return self._folder / kind


def same(found, wanted):
    """To the last bit."""
    return all(one.tobytes() == other.tobytes() for one, other in zip(found, wanted, strict=True))


QUERIES = vectors_of(99, 30)
