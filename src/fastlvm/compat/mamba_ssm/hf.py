"""Config and weights of a model in a folder or on the Hugging Face hub; weights as safetensors only."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlvm.compat.mamba_ssm.config import MambaConfig, from_entries, from_transformers
from fastlvm.errors import InputError, IntegrityError, brief, shown
from fastlvm.files import atomic_file, check_folder, read_json

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLE = "pytorch_model.bin"
_REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")
_EMBEDDING, _HEAD = "backbone.embedding.weight", "lm_head.weight"
_RENAMED = {"backbone.embeddings.weight": _EMBEDDING}  # in transformers -> here
_CHECK = "check that config.json and the weights belong together"

Name = str | os.PathLike[str]


def load_config_hf(model_name: Name) -> dict[str, Any]:
    """The entries of config.json, in the names of `MambaConfig` where transformers wrote it.

    Raises InputError where there is none, or none of a Mamba or Mamba-2 (a NotImplementedError, too).
    """
    file = _find(model_name, _CONFIG)
    if file is None:
        raise InputError(f"{model_name} holds no {_CONFIG}: name the folder or the repository of a model")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{file} is not valid JSON ({brief(error)}): restore it") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no object: restore it")
    return from_transformers(content, model_name) if "model_type" in content else content


def load_config(model_name: Name) -> MambaConfig:
    """`load_config_hf` as a config whose entries are known and of their kind."""
    return from_entries(load_config_hf(model_name), model_name)


def load_state_dict_hf(model_name: Name, device: Any = None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights in model.safetensors, or in the files that model.safetensors.index.json names.

    Args:
        model_name: a folder, or a repository of the hub.
        device: where they go if `dtype` is None or float32; else they stay in main memory.
        dtype: that of the model which will copy them. The weights keep their own.

    Returns:
        Tensors by the names that they have in a `MambaLMHeadModel`, a tied head included.

    Raises:
        InputError: there are none, or a pickle only.
        IntegrityError: a file is damaged.
    """
    file = _find(model_name, _WEIGHTS, _INDEX)
    if file is None:
        raise InputError(_no_weights(model_name))
    to = "cpu" if device is None or dtype not in (None, torch.float32) else str(device)
    weights: dict[str, Tensor] = {}
    for part in [file] if file.name == _WEIGHTS else _parts(model_name, file):
        weights |= {_RENAMED.get(name, name): tensor for name, tensor in _read(part, to).items()}
    if _HEAD not in weights and _EMBEDDING in weights and load_config(model_name).tie_embeddings:
        weights[_HEAD] = weights[_EMBEDDING]
    return weights


def check_weights(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tied: bool, where: Name) -> None:
    """Raises InputError unless `weights` have the names and shapes of `wanted`, and the same numbers where tied."""
    if missing := [name for name in wanted if name not in weights]:
        raise InputError(f"{where} lacks {_listed(missing)}: {_CHECK}")
    if unknown := [name for name in weights if name not in wanted]:
        raise InputError(f"{where} holds {_listed(unknown)}, which the model has not: {_CHECK}")
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape or not tensor.is_floating_point():
            found, wants = (f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in (tensor, wanted[name]))
            raise InputError(f"{where} holds {name} as {found}, and the model has {wants}: {_CHECK}")
    if tied and not torch.equal(weights[_HEAD], weights[_EMBEDDING]):
        raise InputError(f"{where} holds a head that is not the embedding: set tie_embeddings to false in config.json")


def save(weights: Mapping[str, Tensor], config: MambaConfig, folder: Name) -> None:
    """Write `weights`, a tied head left out, and then `config`; each file is the old one or the new one."""
    from safetensors.torch import save as serialise

    folder = Path(folder)
    check_folder(folder)
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    left_out = (_HEAD,) if config.tie_embeddings else ()
    kept = {name: x.detach().contiguous() for name, x in weights.items() if name not in left_out}
    with atomic_file(folder / _WEIGHTS) as file:
        file.write_bytes(serialise(kept, {"format": "pt"}))
    with atomic_file(folder / _CONFIG) as file:
        file.write_text(text, encoding="utf-8")


def _listed(names: list[str]) -> str:
    return brief(names[0]) + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")


def _no_weights(model_name: Name) -> str:
    there = f"; a {_PICKLE} is a pickle, which runs code when it is loaded, and fastlvm loads none"
    twin = 'name a repository with safetensors, such as "state-spaces/mamba-130m-hf"'
    convert = "convert it once with https://huggingface.co/spaces/safetensors/convert"
    return f"{model_name} holds no {_WEIGHTS}{there}: {twin}, or {convert}"


def _parts(model_name: Name, index: Path) -> list[Path]:
    """The files that an index names; names only, since a path could lead anywhere."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(x, str) for x in places.values()):
        raise IntegrityError(f"{index} names no files: fetch it again")
    files = []
    for name in sorted(set(places.values())):
        file = _find(model_name, name) if name.endswith(".safetensors") and Path(name).name == name else None
        if file is None:
            raise IntegrityError(f"{index} names {shown(name)}, which is not there: fetch it again")
        files.append(file)
    return files


def _read(file: Path, device: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt", device=device) as held:
            return {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{file} is no readable safetensors file ({brief(error)}): fetch it again") from error


def _find(model_name: Name, *files: str) -> Path | None:
    """The first of the files that the folder or the repository has."""
    folder = Path(model_name)
    if folder.is_dir():
        return next((folder / file for file in files if (folder / file).is_file()), None)
    if folder.exists() or not _REPOSITORY.fullmatch(str(model_name)):
        raise InputError(f"{model_name} is neither a folder nor a name such as state-spaces/mamba-130m-hf: name either")
    return _fetch(str(model_name), files)


def _fetch(repository: str, files: tuple[str, ...]) -> Path | None:
    """The first of the files that the repository has, from huggingface_hub's cache or from the hub."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise InputError(
            f"{repository} is no folder here, and huggingface_hub, which fetches repositories, is not installed: "
            "install it or name a folder"
        ) from error
    unreachable = None
    for file in files:
        try:
            return Path(hf_hub_download(repository, file))
        except LocalEntryNotFoundError as error:  # not in the cache, and no connection to see whether there is one
            unreachable = error
        except EntryNotFoundError:
            continue
        except Exception as error:  # HTTP, permissions, names, a full disk: of several libraries
            raise InputError(f"{file} of {repository} cannot be fetched: {brief(error)}") from error
    if unreachable is not None:
        wanted = " or ".join(files)
        raise InputError(
            f"{repository} is no folder here, and its {wanted} is neither in the cache of huggingface_hub nor can the "
            "hub be reached: connect or name a folder"
        ) from unreachable
    return None
