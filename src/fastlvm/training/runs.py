"""A run folder: what it belongs to, how it is started, found again and read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlvm.data import Space
from fastlvm.errors import InputError, IntegrityError
from fastlvm.evaluation.baselines import fit_decay
from fastlvm.files import atomic_folder, read_json, write_json
from fastlvm.models import ModelConfig, create
from fastlvm.models.config import PRESETS
from fastlvm.retrieval import blas
from fastlvm.training.options import TrainOptions, option_names, parse_gate
from fastlvm.training.run_gates import RunGates

if TYPE_CHECKING:
    from torch import nn

    from fastlvm.data import Payload, Windows

FORMAT = 1
CONFIG, SPACE, HISTORY = "config.json", "space.safetensors", "history.json"
_IN_MEMORY = 1 << 28  # bytes of vectors
_BLOCK = 8192
_SEEN_LAYERS = 64  # stand for all that a model of more has
LAST, BEST = "last.safetensors", "best.safetensors"


def request(
    model: str | ModelConfig,
    payload: Payload,
    windows: Windows,
    settings: dict[str, Any],
    size: Callable[[ModelConfig], int],
) -> tuple[ModelConfig, TrainOptions, bool]:
    """Sort `settings` into the model's and the training's; the last value tells whether the decay is to be fitted.

    size: how many weights a model has, found without memory for them.
    """
    known = option_names()
    options = TrainOptions.from_dict({key: value for key, value in settings.items() if key in known})
    overrides = {key: value for key, value in settings.items() if key not in known}
    for key, wanted in (("vector_dim", payload.dim), ("context", windows.context)):
        if overrides.setdefault(key, wanted) != wanted:
            raise InputError(f"{key} is {overrides[key]}, and the payload and its windows have {wanted}: leave it out")
    fit = isinstance(model, str) and "decay" not in overrides | (PRESETS[model][1] if model in PRESETS else {})
    config = model.replace(**overrides) if isinstance(model, ModelConfig) else ModelConfig.preset(model, **overrides)
    RunGates(options.gates)
    _check_memory(config, size)
    return config, options, fit and config.residual


def _check_memory(config: ModelConfig, size: Callable[[ModelConfig], int]) -> None:
    """Refuse a model whose weights, gradients and moments alone are more than the machine holds."""
    seen = min(config.n_layers, _SEEN_LAYERS)
    weights = size(config.replace(n_layers=seen))
    needed = 16 * weights * config.n_layers // seen
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return
    if needed > there:
        raise InputError(
            f"training this model takes at least {needed / 2**30:,.0f} GiB of memory, and this machine has "
            f"{there / 2**30:,.0f}: lower d_model, d_state or n_layers"
        )


def open_run(
    out: str | os.PathLike[str],
    config: ModelConfig,
    options: TrainOptions,
    fit: bool,
    payload: Payload,
    windows: Windows,
    resume: bool,
    framework: str = "torch",
) -> tuple[dict[str, Any], Space]:
    """Start the run folder `out`, or find what an earlier call left there. Returns its config.json and its space."""
    out = Path(out)
    identity = {
        "format": FORMAT,
        "framework": framework,
        "model": config.to_dict(),
        "decay_fitted": fit,
        "training": options.to_dict(),
        "payload_id": payload.id,
        "windows_id": windows.id,
    }
    if out.is_dir() and any(out.iterdir()):
        if not resume:
            raise InputError(f"{out} already holds something: go on with --resume (resume=True) or name another folder")
        return _reopen(out, identity)
    if options.space == "none":
        space = Space.identity(payload.dim)
    else:
        space = Space.fit_articles(payload, windows.articles("train"))
    if fit:
        decay = fit_decay(payload, windows.rows("train"), space, seed=options.seed)
        identity["model"] = config.replace(decay=decay).to_dict()
    identity["space_id"] = space.id
    with atomic_folder(out) as folder:
        space.save(folder / SPACE)
        write_json(folder / CONFIG, identity)
    return identity, space


def _reopen(out: Path, identity: dict[str, Any]) -> tuple[dict[str, Any], Space]:
    found = read_config(out)
    asked = TrainOptions.from_dict(found["training"]).to_dict()  # what an older version did not write has its default
    if identity["decay_fitted"] and found.get("decay_fitted"):
        identity["model"]["decay"] = found["model"]["decay"]
    now = identity["training"]["gates"]
    if asked["gates"] != now and _gates_to_come(out, asked["gates"]) == _gates_to_come(out, now):
        asked["gates"] = now
    for name, was, wanted in _differences({"framework": "torch", **found, "training": asked}, identity):
        raise InputError(f"{out} was started with {name} {was!r}, not {wanted!r}: resume with {was!r} or name another")
    if found["training"].get("gates", []) != now:
        found["training"]["gates"] = now
        write_json(out / CONFIG, found)
    return found, read_space(out, found)


def _gates_to_come(out: Path, gates: list[str]) -> set[str]:
    """Those that the run `out` has not been judged by yet."""
    history = read_json(out / HISTORY) if (out / HISTORY).exists() else []
    return {text for text in gates if parse_gate(text)[1] >= len(history)}  # epoch 0 has a line too


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, value in `found`, value in `wanted`) for every differing field of `wanted`, at any depth."""
    different: list[tuple[str, Any, Any]] = []
    for key, value in wanted.items():
        if isinstance(value, dict):
            inner = found.get(key)
            different += _differences(inner if isinstance(inner, dict) else {}, value)
        elif found.get(key) != value:
            different.append((key, found.get(key), value))
    return different


def same(first: Any, second: dict[str, Any]) -> bool:
    """Whether two config.json are of one run, whose gates may differ."""
    if not isinstance(first, dict) or not isinstance(first.get("training"), dict):
        return False
    both = ({**config, "training": {**config["training"], "gates": []}} for config in (first, second))
    return next(both) == next(both)


def read_config(run: Path) -> dict[str, Any]:
    """config.json of a run folder."""
    if not run.is_dir():
        raise InputError(f"{run} is no run folder: name one that train wrote")
    config = read_json(run / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT or "training" not in config:
        raise InputError(f"{run / CONFIG} is no run of format {FORMAT}: name a folder that train wrote")
    return config


def read_space(run: Path, config: dict[str, Any]) -> Space:
    """The space a run began with, checked against the id in its config.json."""
    space = Space.load(run / SPACE).base
    if space.id != config.get("space_id"):
        wanted = config.get("space_id")
        raise IntegrityError(f"{run / SPACE} has id {space.id}, and the run wants {wanted}: train again")
    return space


def sample(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most `most` rows of `rows`, drawn once by `seed`, in their own order."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False))]


def vectors(payload: Payload, space: Space, folder: Path) -> np.ndarray:
    """The payload in the space, float32 [N, dim]; a large one in a file that nobody sees and nobody has to delete."""
    shape = (len(payload), payload.dim)
    found: np.ndarray
    if 4 * shape[0] * shape[1] <= _IN_MEMORY:
        found = np.empty(shape, np.float32)
    else:
        with tempfile.TemporaryFile(dir=folder) as file:  # the map outlives it
            found = np.memmap(file, np.float32, "w+", shape=shape)
    for first in range(0, shape[0], _BLOCK):
        rows = np.arange(first, min(first + _BLOCK, shape[0]))
        found[rows] = space.apply(payload.take(rows))
    return found


def nearest(predicted: np.ndarray, pool: np.ndarray, windows: np.ndarray, k: int) -> np.ndarray:
    """The k rows of `pool` [N, dim] of highest inner product with each of predicted [n, dim], int64 [n, k]; -1 = none.

    windows: rows int64 [n, m] that are left out of each.
    """
    found = np.full((len(predicted), k), -1)
    index = blas.faiss.IndexFlatIP(pool.shape[1])
    index.add(np.ascontiguousarray(pool))
    wanted = min(k + windows.shape[1], len(pool))
    for first in range(0, len(predicted), _BLOCK):
        part = slice(first, first + _BLOCK)
        near = index.search(predicted[part], wanted)[1]
        own = (near[:, :, None] == windows[part][:, None, :]).any(axis=2) | (near < 0)
        order = np.argsort(own, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(near, order, axis=1)
        found[part, : kept.shape[1]] = np.where(np.take_along_axis(own, order, axis=1), -1, kept)
    return found


def load_run(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any], Space]:
    """The best model of a run in eval mode, the run's config.json and its space, with the tower where it has one.

    Raises InputError when `path` is no run folder or holds no best.safetensors yet, IntegrityError for a damaged file.
    """
    from fastlvm.training import checkpoint
    from fastlvm.training.learned import split_tower

    run = Path(path)
    config = read_config(run)
    tensors, meta = checkpoint.load(run / BEST)
    for field in ("model", "payload_id", "windows_id", "space_id"):
        if meta.get(field) != config.get(field):
            raise IntegrityError(
                f"{run / BEST} and {CONFIG} beside it differ in {field}, so they are of two runs: train again"
            )
    model, space = create(ModelConfig.from_dict(config["model"])), read_space(run, config)
    weights, tower = split_tower(tensors)
    checkpoint.load_weights(model, weights, run / BEST)
    return model.eval(), config, space.with_tower(tower)


def predict_with(model: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """The model's own forward as a function: contexts float32 [n, L, dim] in the space -> predictions float32 [n, dim].

    `model` is in eval mode, on the CPU and in float32, as `load_run` gives it.
    """
    import torch

    def predict(context: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(context)).numpy()

    return predict
