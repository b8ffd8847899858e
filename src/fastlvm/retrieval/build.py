"""How a searcher of a payload is filled, and how the number of lists and of probes is chosen."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastlvm.errors import InputError
from fastlvm.retrieval import measure
from fastlvm.retrieval.faiss_kinds import ROWS_PER_LIST
from fastlvm.retrieval.kinds import KINDS
from fastlvm.retrieval.searcher import Searcher
from fastlvm.retrieval.vectors import Vectors

FLAT_BELOW = 50_000
"""Payload rows from which "auto" takes inverted lists."""

RECALL = 0.95
"""Recall@50 against exact search that nprobe is chosen for."""

_SAMPLE_QUERIES = 256


class Built(NamedTuple):
    searcher: Searcher
    nlist: int | None = None
    recall: float | None = None


def build(vectors: Vectors, kind: str, *, nlist: int | None, nprobe: int | None, seed: int) -> Built:
    """A searcher of that kind, set to nprobe or to the smallest setting of recall 0.95."""
    searcher_class = KINDS[kind]
    if not searcher_class.LISTS and (nlist is not None or nprobe is not None):
        lists = " or ".join(name for name, one in KINDS.items() if one.LISTS)
        raise InputError(f"nlist and nprobe belong to kind {lists}: leave them out, or ask for that kind")
    if searcher_class.LISTS:
        nlist = _option("nlist", default_nlist(len(vectors)) if nlist is None else nlist, len(vectors))
    if nprobe is not None:
        nprobe = _option("nprobe", nprobe, nlist)
    searcher = searcher_class.build(vectors, nlist, seed)
    if searcher_class.SETTING is None:
        return Built(searcher)
    queries = sample_queries(vectors, seed)
    truth = measure.nearest(vectors, queries)
    setting = nprobe or measure.smallest_setting(searcher, queries, truth, RECALL)
    return Built(searcher, nlist, measure.recall(searcher, queries, truth, setting))


def default_nlist(rows: int) -> int:
    """The largest power of two ≤ 4·√rows that leaves at least 39 rows a list (584,545 rows: 2,048)."""
    bound = max(1, int(min(4 * rows**0.5, rows / ROWS_PER_LIST)))
    return 1 << (bound.bit_length() - 1)


def sample_queries(vectors: Vectors, seed: int) -> np.ndarray:
    """Indexed vectors themselves: harder than predictions, whose averages lie nearer to the centroids. [q, dim]"""
    return vectors.sample(_SAMPLE_QUERIES, seed)


def _option(name: str, value: Any, most: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= (most or 0):
        raise InputError(f"{name} is {value!r}, and an integer from 1 to {most} is wanted")
    return int(value)
