"""The predictor: an exported model and its index, loaded and run without torch."""

from __future__ import annotations

from fastlvm.predictor.export import export
from fastlvm.predictor.predictor import Found, Predictor
from fastlvm.predictor.stream import Stream

__all__ = ["Found", "Predictor", "Stream", "export"]
