"""The compiled extension for the modules that call it, or None where it cannot be loaded: `_native.supports` says why.

A machine with a GPU alone needs none: the triton backends share those modules.
"""

from __future__ import annotations

try:
    from fastlvm import _C
except ImportError:
    _C = None  # type: ignore[assignment,unused-ignore]

__all__ = ["_C"]
