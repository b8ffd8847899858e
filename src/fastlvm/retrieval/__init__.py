"""The index over a payload: build, save, open, search."""

from __future__ import annotations

from fastlvm.retrieval.index import Index, SearchResult

__all__ = ["Index", "SearchResult"]
