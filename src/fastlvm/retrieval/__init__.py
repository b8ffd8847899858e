"""The index over a payload: build, save, open, search; and `rerank`, the module that reorders what it finds."""

from __future__ import annotations

from fastlvm.retrieval import rerank
from fastlvm.retrieval.index import Index, SearchResult

__all__ = ["Index", "SearchResult", "rerank"]
