"""fastlvm's ops inside the state-space models of mlx-lm.

mlx-lm's Mamba and Jamba loop over time in Python. `patch_mlx_lm` puts other methods into their mixers, and another
`ssm_update` and convolution into those of the Mamba-2 family; models, caches and weights stay mlx-lm's own. A mixer is
changed only where its source is the one fastlvm was tested against.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType

from fastlvm.compat._patching import Make, Patch, Patcher, Place
from fastlvm.compat.transformers import _source

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
    return _PATCHER.patch(models, strict)


def unpatch_mlx_lm(models: str | Iterable[str] | None = None) -> None:
    """Put mlx-lm's own functions back, in the models named or in all; those not patched are left alone.

    Raises:
        InputError: a name is not known.
    """
    _PATCHER.unpatch(models)


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


def _places(model: str, module: ModuleType) -> dict[Place, Make]:
    """What is replaced in a module."""
    from fastlvm.compat.mlx_lm import _functions

    mixer = getattr(module, _MIXERS[model], None)
    if model in _MAMBA_1:
        return {(mixer, "_process_sequence"): _functions.REPLACEMENTS[f"{model}._process_sequence"]}
    return {(owner, name): _functions.REPLACEMENTS[name] for owner, name in ((mixer, "_conv"), (module, "ssm_update"))}


_PATCHER = Patcher(
    package="mlx-lm",
    missing="patch_mlx_lm: mlx-lm is not installed; pip install mlx-lm",
    advice=f"use mlx-lm {TESTED[-1]}, which fastlvm is tested with, or a newer fastlvm",
    models=lambda: MODELS,
    path=_path,
    load=lambda model: _module(model),
    refusal=_refusal,
    places=_places,
)
