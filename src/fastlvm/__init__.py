"""Compiled Mamba kernels and a millisecond next-vector predictor.

Names are loaded on first use: `import fastlvm` pulls in neither torch, mlx nor faiss.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "ssm_scan": "fastlvm.ops",
    "ssd_scan": "fastlvm.ops",
    "causal_conv1d": "fastlvm.ops",
    "ssm_step": "fastlvm.ops",
    "causal_conv1d_step": "fastlvm.ops",
    "ssd_step": "fastlvm.ops",
    "mamba_step": "fastlvm.ops",
    "info_nce": "fastlvm.ops",
    "explain": "fastlvm.ops",
    "set_num_threads": "fastlvm.ops",
    "get_num_threads": "fastlvm.ops",
    "Payload": "fastlvm.data",
    "Windows": "fastlvm.data",
    "Space": "fastlvm.data",
    "Index": "fastlvm.retrieval",
    "export": "fastlvm.predictor",
    "Predictor": "fastlvm.predictor",
    "FastlvmError": "fastlvm.errors",
    "InputError": "fastlvm.errors",
    "IntegrityError": "fastlvm.errors",
    "GateError": "fastlvm.errors",
}
_MODULES = ("models", "ops", "data", "retrieval", "training", "evaluation", "predictor", "compat", "errors")

__all__ = [*_HOME, "models"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"fastlvm.{name}")
    else:
        raise AttributeError(f"module 'fastlvm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
