"""fastlvm's ops inside the state-space models of transformers.

From 5.16 on, transformers keeps what is slow about these models in a few functions of every `modeling_*` module, and
its mixers look them up there at every call. `patch_transformers` puts other functions in their place, and before the
forward of a Mamba-1 mixer one that decodes a token in one call; models, caches and weights stay transformers' own. A
function is replaced only where its source is the one fastlvm was tested against.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from types import ModuleType

from fastlvm.compat._patching import Make, Patch, Patcher, Place
from fastlvm.compat.transformers import _source

__all__ = ["MODELS", "Patch", "TESTED", "patch_transformers", "unpatch_transformers"]

TESTED = ("5.16.1", "5.20.2", "5.22.2", "5.23.0", "5.24.0")

_CONV = ("causal_conv1d_fn", "causal_conv1d_update")
_SSM = (*_CONV, "mamba_selective_scan", "mamba_selective_state_update")
_SSD = (*_CONV, "mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan", "mamba2_selective_state_update")
_MIXERS = {  # name in transformers.models -> its mixer and the functions that calls
    "mamba": ("MambaMixer", (*_SSM, "mamba_inner_fn")),
    "falcon_mamba": ("FalconMambaMixer", (*_SSM, "mamba_inner_fn")),
    "jamba": ("JambaMambaMixer", _SSM),
    "mamba2": ("Mamba2Mixer", _SSD),
    "bamba": ("BambaMixer", _SSD),
    "zamba2": ("Zamba2MambaMixer", _SSD),
    "falcon_h1": ("FalconH1Mixer", _SSD),
}
MODELS = tuple(_MIXERS)


def patch_transformers(models: str | Iterable[str] | None = None, *, strict: bool = False) -> Patch:
    """Let models of transformers compute their convolutions and scans with fastlvm, on CPUs and GPUs.

    Prefill, decoding and training of every model of these classes change, loaded before or after; calling it again
    changes nothing. A model whose internals are not known, as in a version older or newer than those of `TESTED`, is
    left as it is, and a warning says so.

    Args:
        models: names out of `MODELS`, as transformers' folders are called; all that the installed version has if None.
        strict: raise instead of warning, and patch none.

    Raises:
        InputError: transformers is not installed, a name is not known or, with `strict`, a model is not patched.
    """
    return _PATCHER.patch(models, strict)


def unpatch_transformers(models: str | Iterable[str] | None = None) -> None:
    """Put transformers' own functions back, in the models named or in all; those not patched are left alone.

    Raises:
        InputError: a name is not known.
    """
    _PATCHER.unpatch(models)


def _path(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}"


def _module(model: str) -> ModuleType | None:
    path = _path(model)
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is not None and path.startswith(error.name) and error.name != "transformers":
            return None
        raise


def _refusal(model: str, module: ModuleType) -> str | None:
    """Why this module cannot be patched; None where it can."""
    mixer, functions = _MIXERS[model]
    source = _source.read(module)
    if source is None:
        return f"the source of {module.__name__} cannot be read"
    for name in functions:
        print_ = source.functions.get(name)
        if print_ is None or not callable(getattr(module, name, None)):
            return f"{module.__name__} has no function {name}"
        if print_ not in _source.KNOWN[name]:
            return f"{name} of {module.__name__} is not the one fastlvm replaces"
        if name not in source.called.get(mixer, ()):
            return f"{mixer}.forward does not call {name}"
    return None


def _places(model: str, module: ModuleType) -> dict[Place, Make]:
    """What is replaced: the functions that the mixer calls and, where it is known, the mixer's own forward."""
    from fastlvm.compat.transformers import _functions, _mixers

    mixer, functions = _MIXERS[model]
    places: dict[Place, Make] = {(module, name): _functions.REPLACEMENTS[name] for name in functions}
    source = _source.read(module)
    if source is not None and source.forwards.get(mixer) in _source.FORWARDS.get(mixer, ()):
        places[getattr(module, mixer), "forward"] = functools.partial(_mixers.one_token, model=model)
    return places


_PATCHER = Patcher(
    package="transformers",
    missing="patch_transformers: transformers is not installed; pip install 'transformers>=5.16'",
    advice=f"use transformers {TESTED[0]} to {TESTED[-1]}, which fastlvm is tested with, or a newer fastlvm",
    models=lambda: MODELS,
    path=_path,
    load=lambda model: _module(model),
    refusal=_refusal,
    places=_places,
)
