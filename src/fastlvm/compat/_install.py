"""`import mamba_ssm` and `import causal_conv1d` find fastlvm's stand-ins, between install() and uninstall().

A finder in front of sys.meta_path answers for the names below and nothing else; their modules are made when they are
imported and hold nothing of their own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_OURS = "fastlvm.compat"
_CONV = ("causal_conv1d_fn", "causal_conv1d_update")
_SCAN = ("selective_scan_fn", "selective_scan_ref", "mamba_inner_fn", "mamba_inner_ref")
_GENERATION = (
    "GenerationMixin",
    "InferenceParams",
    "decode",
    "modify_logit_for_repetition_penalty",
    "modify_logits_for_min_p_filtering",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
)
_MODULES: dict[str, tuple[str, ...]] = {  # module of an original -> its names; "its=ours" where they differ
    "causal_conv1d": ("__version__", *_CONV),
    "causal_conv1d.causal_conv1d_interface": _CONV,
    "causal_conv1d.causal_conv1d_varlen": ("causal_conv1d_varlen_states",),
    "mamba_ssm": ("__version__", "selective_scan_fn", "mamba_inner_fn", "Mamba", "Mamba2", "MambaLMHeadModel"),
    "mamba_ssm.models": (),
    "mamba_ssm.models.config_mamba": ("MambaConfig",),
    "mamba_ssm.models.mixer_seq_simple": ("MambaConfig", "MambaLMHeadModel", "MixerModel", "create_block"),
    "mamba_ssm.modules": (),
    "mamba_ssm.modules.block": ("Block",),
    "mamba_ssm.modules.mamba2": ("Mamba2",),
    "mamba_ssm.modules.mamba_simple": ("Mamba",),
    "mamba_ssm.modules.mlp": ("GatedMLP",),
    "mamba_ssm.ops": (),
    "mamba_ssm.ops.selective_scan_interface": _SCAN,
    "mamba_ssm.ops.triton": (),
    "mamba_ssm.ops.triton.layer_norm": ("RMSNorm", "layer_norm_fn", "rms_norm_fn"),
    "mamba_ssm.ops.triton.layernorm_gated": (
        "LayerNorm=LayerNormGated",
        "RMSNorm=RMSNormGated",
        "layernorm_fn",
        "rmsnorm_fn",
    ),
    "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update",),
    "mamba_ssm.ops.triton.ssd_combined": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
    "mamba_ssm.utils": (),
    "mamba_ssm.utils.generation": _GENERATION,
    "mamba_ssm.utils.hf": ("load_config_hf", "load_state_dict_hf"),
}
_PACKAGES = tuple(name for name in _MODULES if "." not in name)

_lock = threading.RLock()
_replaced: dict[str, dict[str, Any]] = {}  # package that is ours now -> what sys.modules held of it
_holders: dict[str, set[object]] = {name: set() for name in _PACKAGES}  # who wants it to be
_INSTALL = "install"


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        home = importlib.import_module(f"{_OURS}.{module.__name__.partition('.')[0]}")
        module.__doc__ = f"Stand-in of {home.__name__}."
        for entry in _MODULES[module.__name__]:
            there, _, here = entry.partition("=")
            setattr(module, there, getattr(home, here or there))
        for name in _MODULES:  # an import of the original's package brings those below it, too
            if name.rpartition(".")[0] == module.__name__:
                importlib.import_module(name)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _MODULES or fullname.partition(".")[0] not in _replaced:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in _MODULES)
        return ModuleSpec(fullname, _Loader(), origin=_OURS, is_package=is_package)


_finder = _Finder()


def install(force: bool = False) -> tuple[str, ...]:
    """Have `import mamba_ssm` and `import causal_conv1d` find fastlvm's, where the originals are not installed.

    Nothing is imported yet. Calling it again changes nothing, except that `force` may add what was left to an original.

    Args:
        force: take their place where they are installed, too, such as where their wheels do not load.

    Returns:
        Names of the packages that are fastlvm's now.
    """
    with _lock:
        _hold(_INSTALL, force)
        return tuple(name for name in _PACKAGES if name in _replaced)


def uninstall() -> None:
    """Undo `install()` and every `installed()`: sys.modules and sys.meta_path are as before.

    What was imported from the stand-ins goes on.
    """
    with _lock:
        for holders in _holders.values():
            holders.clear()
        _release(_INSTALL)


@contextlib.contextmanager
def installed(force: bool = False) -> Iterator[tuple[str, ...]]:
    """`install()` within a with statement. What is installed besides, around it or by another thread, stays."""
    holder = object()
    with _lock:
        packages = _hold(holder, force)
    try:
        yield packages
    finally:
        with _lock:
            _release(holder)


def _is_there(package: str) -> bool:
    """Whether the original can be found; a folder of that name without an __init__ is none."""
    if package in sys.modules:
        return sys.modules[package] is not None
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _hold(holder: object, force: bool) -> tuple[str, ...]:
    packages = tuple(name for name in _PACKAGES if force or name in _replaced or not _is_there(name))
    for package in packages:
        _holders[package].add(holder)
        if package not in _replaced:
            _replaced[package] = _take(package)
    if packages and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    return packages


def _release(holder: object) -> None:
    """Let go; a package that nobody holds is the original's again."""
    for package, holders in _holders.items():
        holders.discard(holder)
        if package in _replaced and not holders:
            _take(package)
            sys.modules.update(_replaced.pop(package))
    if not _replaced and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def _take(package: str) -> dict[str, Any]:
    """Take the package and all below it out of sys.modules."""
    names = [name for name in list(sys.modules) if name == package or name.startswith(f"{package}.")]
    return {name: sys.modules.pop(name) for name in names}
