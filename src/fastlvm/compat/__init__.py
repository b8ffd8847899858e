"""Stand-ins for mamba_ssm and causal_conv1d, and inside transformers and mlx-lm: the same through fastlvm's ops.

Import from `fastlvm.compat.mamba_ssm` and `fastlvm.compat.causal_conv1d`, or call `install()` and leave
`import mamba_ssm` as it is; `patch_transformers()` is for transformers' own models and `patch_mlx_lm()` for mlx-lm's.
Nothing here imports torch or mlx before one of them is used.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastlvm.compat._install import install, installed, uninstall
from fastlvm.compat.mlx_lm import patch_mlx_lm, unpatch_mlx_lm
from fastlvm.compat.transformers import patch_transformers, unpatch_transformers

_MODULES = ("causal_conv1d", "mamba_ssm", "mlx_lm", "transformers")

__all__ = [
    "install",
    "installed",
    "patch_mlx_lm",
    "patch_transformers",
    "uninstall",
    "unpatch_mlx_lm",
    "unpatch_transformers",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fastlvm.compat' has no attribute {name!r}")
    return importlib.import_module(f"fastlvm.compat.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
