"""The predictor: an exported model and its index, loaded and run without torch.

Without the extension, on a machine that was only given the kernels, there is `fastlvm.predictor.cuda` alone.
"""

from __future__ import annotations

from fastlvm.ops._extension import _C

__all__ = ["Found", "Predictor", "Stream", "export"]

if _C is not None:
    from fastlvm.predictor.export import export
    from fastlvm.predictor.predictor import Found, Predictor
    from fastlvm.predictor.stream import Stream
