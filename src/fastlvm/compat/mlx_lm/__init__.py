"""fastlvm's ops inside the state-space models of mlx-lm.

mlx-lm's Mamba and Jamba loop over time in Python. `patch_mlx_lm` puts other methods into their mixers, and another
`ssm_update` and convolution into those of the Mamba-2 family; models, caches and weights stay mlx-lm's own. A mixer is
changed only where its source is the one fastlvm was tested against.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

from fastlvm.compat import transformers
from fastlvm.compat.transformers import _source
from fastlvm.errors import InputError

__all__ = ["MODELS", "Patch", "TESTED", "patch_mlx_lm", "unpatch_mlx_lm"]

TESTED = ("0.32.2",)

_MIXERS = {  # name in mlx_lm.models -> its mixer
    "mamba": "MambaBlock",
    "jamba": "JambaMambaMixer",
    "mamba2": "Mamba2Block",
    "falcon_h1": "FalconH1Mixer",
    "granitemoehybrid": "GraniteMoeHybridMamba2Mixer",
    "nemotron_h": "NemotronHMamba2Mixer",
    "plamo2": "Mamba",
}
_MAMBA_1 = ("mamba", "jamba")
MODELS = tuple(_MIXERS)

_KNOWN = {  # module, class or function -> the fingerprint of what fastlvm's stands for
    "mamba": {"MambaBlock": "5da99de40c441856"},
    "jamba": {"JambaMambaMixer": "f39f94dad04bd3af"},
    "mamba2": {"Mamba2Block": "0b10a2f1149fa546"},
    "falcon_h1": {"FalconH1Mixer": "b8d447b86eed3a15"},
    "granitemoehybrid": {"GraniteMoeHybridMamba2Mixer": "91d8dd1cee9b748a"},
    "nemotron_h": {"NemotronHMamba2Mixer": "519d7b5cdd3f2b38"},
    "plamo2": {"Mamba": "adab790c6e9a40ae"},
    "ssm": {"compute_dt": "6e178c35d3734c19", "ssm_attn": "ba83d5c78fe8f5eb", "ssm_update": "439fc69730fa5982"},
}

_ORIGINAL = "_fastlvm_original"  # the attribute that marks a function of ours and holds the one it stands for


@dataclass(frozen=True)
class Patch(transformers.Patch):
    """What `patch_mlx_lm` did; as a context manager, leaving it takes back what that call changed.

    Attributes:
        patched: models that run on fastlvm now, those patched before included.
        refused: model -> why it is left as it was.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unpatch_mlx_lm(self._changed)


def patch_mlx_lm(models: str | Iterable[str] | None = None, *, strict: bool = False) -> Patch:
    """Let models of mlx-lm compute their convolutions and scans with fastlvm.

    Prefill, decoding and training of every model of these classes change, loaded before or after; calling it again
    changes nothing. "mamba" is Falcon-Mamba, too. A model whose internals are not known, as in another version than
    those of `TESTED`, is left as it is, and a warning says so. Where fastlvm's kernels cannot run (on a GPU, and while
    mlx traces) the Mamba-2 family computes as before, and the others in plain mlx without the loop over time.

    Args:
        models: names out of `MODELS`, as mlx-lm's modules are called; all that the installed version has if None.
        strict: raise instead of warning, and patch none.

    Raises:
        InputError: mlx-lm is not installed, a name is not known or, with `strict`, a model is not patched.
    """
    version = _version()
    refused = {}
    modules = {}
    for model in _asked(models):
        module = _module(model)
        if module is None:
            if models is not None:
                refused[model] = f"{model} of mlx-lm {version} is not patched: this version has no such model"
            continue
        modules[model] = module
        reason = _refusal(model, module)
        if reason is not None:
            refused[model] = f"{model} of mlx-lm {version} is not patched: {reason}; {_advice()}"
    if strict and refused:
        raise InputError("; ".join(refused.values()))
    for reason in refused.values():
        warnings.warn(reason, stacklevel=2)
    patched = {model: module for model, module in modules.items() if model not in refused}
    changed = tuple(model for model, module in patched.items() if _patch(model, module))
    return Patch(tuple(patched), refused, changed)


def unpatch_mlx_lm(models: str | Iterable[str] | None = None) -> None:
    """Put mlx-lm's own functions back, in the models named or in all; those not patched are left alone.

    Raises:
        InputError: a name is not known.
    """
    for model in _asked(models):
        module = sys.modules.get(_path(model))
        for owner, name in _places(model, module) if module is not None else ():
            original = getattr(getattr(owner, name, None), _ORIGINAL, None)
            if original is not None:
                setattr(owner, name, original)


def _asked(models: str | Iterable[str] | None) -> tuple[str, ...]:
    if models is None:
        return MODELS
    names = (models,) if isinstance(models, str) else tuple(dict.fromkeys(models))
    for name in names:
        if name not in _MIXERS:
            raise InputError(f"models: got {name!r}, wants names out of {', '.join(MODELS)}")
    return names


def _version() -> str:
    try:
        return importlib.metadata.version("mlx-lm")
    except importlib.metadata.PackageNotFoundError:
        raise InputError("patch_mlx_lm: mlx-lm is not installed; pip install mlx-lm") from None


def _path(model: str) -> str:
    return f"mlx_lm.models.{model}"


def _module(model: str) -> ModuleType | None:
    try:
        return importlib.import_module(_path(model))
    except ModuleNotFoundError as error:
        if error.name == _path(model):
            return None
        raise


def _refusal(model: str, module: ModuleType) -> str | None:
    """Why this module cannot be patched; None where it can."""
    read = [(model, module)]
    if model not in _MAMBA_1:
        ssm = _module("ssm")
        if ssm is None or not hasattr(module, "ssm_update"):
            return f"{module.__name__} has no function ssm_update"
        read.append(("ssm", ssm))
    for name, owner in read:
        known = _KNOWN[name]
        source = _source.read(owner, known)
        if source is None:
            return f"the source of {owner.__name__} cannot be read"
        for part, wanted in known.items():
            if part not in source.functions:
                return f"{owner.__name__} has no {part}"
            if source.functions[part] != wanted:
                return f"{part} of {owner.__name__} is not the one fastlvm replaces"
    return None


def _advice() -> str:
    return f"use mlx-lm {TESTED[-1]}, which fastlvm is tested with, or a newer fastlvm"


def _places(model: str, module: ModuleType) -> tuple[tuple[Any, str], ...]:
    """What is replaced: owners, and names in them."""
    mixer = getattr(module, _MIXERS[model], None)
    return ((mixer, "_process_sequence"),) if model in _MAMBA_1 else ((mixer, "_conv"), (module, "ssm_update"))


def _patch(model: str, module: ModuleType) -> bool:
    """Replace the functions that are not replaced yet; True if there were any."""
    from fastlvm.compat.mlx_lm import _functions

    changed = False
    for owner, name in _places(model, module):
        original = getattr(owner, name)
        if hasattr(original, _ORIGINAL):
            continue
        key = f"{model}.{name}" if model in _MAMBA_1 else name
        replacement = _functions.REPLACEMENTS[key](original)
        replacement.__name__ = name
        setattr(replacement, _ORIGINAL, original)
        setattr(owner, name, replacement)
        changed = True
    return changed
