"""What patching the models of a package comes to: which of them, the refusals, and the way back."""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any

from fastlvm.errors import InputError

_ORIGINAL = "_fastlvm_original"  # the attribute that marks a function of ours and holds the one it stands for

Place = tuple[Any, str]  # an owner and the name of a function in it
Make = Callable[[Callable[..., Any]], Callable[..., Any]]  # from the function that is there to the one that replaces it


@dataclass(frozen=True)
class Patch:
    """What a call of a patching function did; as a context manager, leaving it takes back what that call changed.

    Attributes:
        patched: models that run on fastlvm now, those patched before included.
        refused: model -> why it is left as it was.
    """

    patched: tuple[str, ...]
    refused: dict[str, str]
    _changed: tuple[str, ...] = field(repr=False)
    _unpatch: Callable[[tuple[str, ...]], None] = field(repr=False)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unpatch(self._changed)


@dataclass(frozen=True)
class Patcher:
    """How fastlvm's functions get into the models of one package.

    package: its name. missing: the sentence where it is not installed. advice: which versions to use.
    models: the names of all. path: the module of a model. load: the module, imported; None where this version has no
    such model. refusal: why a module cannot be patched, or None. places: what is replaced in it, and what makes the
    replacement.
    """

    package: str
    missing: str
    advice: str
    models: Callable[[], tuple[str, ...]]
    path: Callable[[str], str]
    load: Callable[[str], ModuleType | None]
    refusal: Callable[[str, ModuleType], str | None]
    places: Callable[[str, ModuleType], dict[Place, Make]]

    def patch(self, models: str | Iterable[str] | None, strict: bool) -> Patch:
        """Patch the models named, or all there are; raise for what is refused if `strict`, else warn."""
        version = self._version()
        modules: dict[str, ModuleType] = {}
        refused: dict[str, str] = {}
        for model in self._asked(models):
            module = self.load(model)
            lead = f"{model} of {self.package} {version} is not patched"
            if module is not None:
                modules[model] = module
                reason = self.refusal(model, module)
                if reason is not None:
                    refused[model] = f"{lead}: {reason}; {self.advice}"
            elif models is not None:
                refused[model] = f"{lead}: this version has no such model"
        if strict and refused:
            raise InputError("; ".join(refused.values()))
        for reason in refused.values():
            warnings.warn(reason, stacklevel=3)
        patched = {model: module for model, module in modules.items() if model not in refused}
        changed = tuple(model for model, module in patched.items() if self._replace(model, module))
        return Patch(tuple(patched), refused, changed, self.unpatch)

    def unpatch(self, models: str | Iterable[str] | None) -> None:
        """Put the package's own functions back, in the models named or in all; those not patched are left alone."""
        for model in self._asked(models):
            module = sys.modules.get(self.path(model))
            for owner, name in self.places(model, module) if module is not None else ():
                original = getattr(getattr(owner, name, None), _ORIGINAL, None)
                if original is not None:
                    setattr(owner, name, original)

    def _replace(self, model: str, module: ModuleType) -> bool:
        """Replace the functions that are not replaced yet; True if there were any."""
        changed = False
        for (owner, name), make in self.places(model, module).items():
            original = getattr(owner, name)
            if hasattr(original, _ORIGINAL):
                continue
            replacement = make(original)
            replacement.__name__ = name
            setattr(replacement, _ORIGINAL, original)
            setattr(owner, name, replacement)
            changed = True
        return changed

    def _asked(self, models: str | Iterable[str] | None) -> tuple[str, ...]:
        known = self.models()
        if models is None:
            return known
        names = (models,) if isinstance(models, str) else tuple(dict.fromkeys(models))
        for name in names:
            if name not in known:
                raise InputError(f"models: got {name!r}, wants names out of {', '.join(known)}")
        return names

    def _version(self) -> str:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            raise InputError(self.missing) from None
