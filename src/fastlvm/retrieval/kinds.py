"""The kinds of index by name. A new one is a class of the shape that `searcher` gives, and an entry here."""

from __future__ import annotations

from fastlvm.retrieval.faiss_kinds import Flat, Hnsw, IvfFlat, IvfSq8
from fastlvm.retrieval.rabitq import IvfRabitq
from fastlvm.retrieval.searcher import Searcher

KINDS: dict[str, type[Searcher]] = {
    "flat": Flat,
    "ivf_flat": IvfFlat,
    "ivf_sq8": IvfSq8,
    "hnsw": Hnsw,
    "ivf_rabitq": IvfRabitq,
}
