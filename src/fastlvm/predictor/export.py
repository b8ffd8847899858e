"""A trained model, its space and an index become an artifact. Only here is torch used, imported when it is called."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastlvm.data import Payload, Space, Windows
from fastlvm.errors import InputError, IntegrityError
from fastlvm.predictor import artifact, layers
from fastlvm.predictor.forward import Forward, Plan
from fastlvm.predictor.pack import PRECISIONS, pack
from fastlvm.predictor.predictor import Predictor
from fastlvm.retrieval import Index

if TYPE_CHECKING:
    from torch import nn

    from fastlvm.models import ModelConfig

GOLDEN_WINDOWS = 8
TENDER = "out_proj.weight"  # gated outputs have long tails, which one int8 scale a token serves badly
# Least cosine of the artifact's predictions with those of the model, in the mean and for any window.
AGREEMENT = {"fp32": (0.999999, 0.999999), "bf16": (0.9999, 0.9999), "int8": (0.9995, 0.999)}


class _Source(NamedTuple):
    """The model and what it was trained on; None where a bare module does not say."""

    model: nn.Module
    payload_id: str | None
    space: Space | None
    windows_id: str | None
    name: str  # for messages


def export(
    model_or_run: nn.Module | str | os.PathLike[str],
    dir: str | os.PathLike[str],
    precision: str = "fp32",
    index: Index | str | os.PathLike[str] | None = None,
    *,
    payload: Payload | None = None,
    windows: Windows | None = None,
) -> None:
    """Write the artifact folder `dir`, from which `fastlvm.Predictor.load` predicts and searches without torch.

    Args:
        model_or_run: a folder `train` wrote, whose best weights are taken, or a module of `fastlvm.models`.
        dir: a new folder; written whole or not at all.
        precision: of the packed matrices: "fp32", "bf16" or "int8". What is not a matrix, and the arithmetic between
            them, is float32 in any case.
        index: an `Index` or the folder of one, of the payload and the space the model was trained on; None builds one
            from `payload` in the run's space. For a bare module the index's payload and space are taken as its own.
        payload: the payload itself, for building the index, and for taking the golden windows from it.
        windows: the windows trained on. With `payload` they are verified against it, and the golden windows come from
            the test split; without, from the payload's rows in order; without a payload they are random directions.

    Raises:
        InputError: `dir` holds something, or an argument is missing or of the wrong kind.
        IntegrityError: index, payload, windows and run do not belong together, or the artifact's predictions differ
            from the model's own by more than `AGREEMENT`.
    """
    from fastlvm.training import predict_with

    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}, and this version packs {', '.join(PRECISIONS)}")
    source = _source(model_or_run)
    config: ModelConfig = source.model.config  # type: ignore[assignment]
    if payload is not None:
        _same(source, "payload", payload.id, source.payload_id)
    if windows is not None:
        _check_windows(source, payload, windows)
    found = _index(source, index, payload)
    if found.dim != config.vector_dim:
        raise InputError(f"index has dimension {found.dim}, and the model takes vectors of {config.vector_dim}")

    plan = Plan(describe(config), config.context, config.vector_dim)
    model = copy.deepcopy(source.model).cpu().float().eval()
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    predict = predict_with(model)
    raw, origin = _golden_context(config, payload, windows)
    in_bf16: list[str] = []
    packed = pack(plan, weights, precision)
    try:
        forward = Forward(plan, packed, found.space)
    except ValueError as error:
        raise InputError(f"{source.name} cannot be packed: {error}") from error
    if precision == "int8" and not _agrees(precision, forward(raw), predict(found.space.apply(raw))):
        in_bf16 = sorted(name for name in plan.matrices() if name.endswith(TENDER))
        packed = pack(plan, weights, precision, in_bf16)
        forward = Forward(plan, packed, found.space)
    golden = artifact.Golden(raw, forward(raw))

    def check(path: Path) -> None:
        loaded = Predictor.load(path)
        other = _random_context(config, GOLDEN_WINDOWS, seed=1)
        for context in (raw, other):
            _agree(source, precision, loaded.predict(context), predict(found.space.apply(context)))

    entries = {
        "precision": precision,
        "in_bf16": in_bf16,
        "model": config.name,
        "parameters": int(sum(array.size for array in weights.values())),
        "windows_id": source.windows_id if windows is None else windows.id,
        "golden": {"windows": len(raw), "from": origin},
        "layers": [layers.write_layer(layer) for layer in plan.layers],
    }
    artifact.write(dir, plan, packed, golden, found, entries, check)


def describe(config: ModelConfig) -> list[dict[str, Any]]:
    """The layer list of a model."""
    import torch

    from fastlvm.models import create

    with torch.device("meta"):  # no memory for weights
        return create(config).describe()


def _source(model_or_run: Any) -> _Source:
    from torch import nn

    if isinstance(model_or_run, str | os.PathLike):
        from fastlvm.training import load_run

        model, config, space = load_run(model_or_run)
        return _Source(model, config["payload_id"], space, config["windows_id"], os.fspath(model_or_run))
    from fastlvm.models import ModelConfig

    if not isinstance(model_or_run, nn.Module) or not isinstance(getattr(model_or_run, "config", None), ModelConfig):
        kind = type(model_or_run).__name__
        raise InputError(f"model_or_run is a {kind}, and a run folder or a module of fastlvm.models is wanted")
    return _Source(model_or_run, None, None, None, "the model")


def _same(source: _Source, what: str, got: str, wanted: str | None) -> None:
    if wanted is not None and got != wanted:
        raise IntegrityError(f"{what} has id {got}, and {source.name} was trained on {wanted}: hand in that one")


def _check_windows(source: _Source, payload: Payload | None, windows: Windows) -> None:
    _same(source, "windows' payload", windows.payload_id, source.payload_id)
    _same(source, "windows", windows.id, source.windows_id)
    if payload is not None:
        windows.verify(payload)


def _index(source: _Source, index: Any, payload: Payload | None) -> Index:
    """The index handed in, found to be of the model's payload and space, or one built from the payload."""
    if index is None:
        if payload is None:
            raise InputError("index and payload are both missing: hand in an index, or the payload to build one from")
        return Index.build(payload, space=source.space)
    if isinstance(index, str | os.PathLike):
        index = Index.open(index)
    if not isinstance(index, Index):
        raise InputError(f"index is a {type(index).__name__}, and an Index or the folder of one is wanted")
    payload_id = payload.id if payload is not None else source.payload_id
    for what, got, wanted in (
        ("payload", index.payload_id, payload_id),
        ("space", index.space.id, source.space.id if source.space is not None else None),
    ):
        if wanted is not None and got != wanted:
            raise IntegrityError(
                f"index is of {what} {got}, and {source.name} of {wanted}: build the right one with "
                "fastlvm index build PAYLOAD --space RUN --out INDEX"
            )
    return index


def _golden_context(config: ModelConfig, payload: Payload | None, windows: Windows | None) -> tuple[np.ndarray, str]:
    """Raw contexts float32 [g, context, dim], and where they are from."""
    if payload is None:
        return _random_context(config, GOLDEN_WINDOWS, seed=0), "random directions"
    if windows is not None and windows.context == config.context:
        rows = next(rows for split in ("test", "validation", "train") if len(rows := windows.rows(split)))[:, :-1]
        origin = "windows"
    else:
        if len(payload) < config.context:
            return _random_context(config, GOLDEN_WINDOWS, seed=0), "random directions"
        rows = np.arange(len(payload) - config.context + 1)[:, None] + np.arange(config.context)
        origin = "payload"
    chosen = np.unique(np.linspace(0, len(rows) - 1, GOLDEN_WINDOWS).astype(np.int64))
    return np.ascontiguousarray(payload.take(rows[chosen])), origin


def _random_context(config: ModelConfig, n: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed).standard_normal((n, config.context, config.vector_dim), np.float32)
    return draw / np.linalg.norm(draw, axis=-1, keepdims=True)


def _agrees(precision: str, found: np.ndarray, wanted: np.ndarray) -> bool:
    cosine = (found.astype(np.float64) * wanted).sum(axis=-1)
    mean, least = AGREEMENT[precision]
    return bool(cosine.mean() >= mean and cosine.min() >= least)


def _agree(source: _Source, precision: str, found: np.ndarray, wanted: np.ndarray) -> None:
    if _agrees(precision, found, wanted):
        return
    cosine = (found.astype(np.float64) * wanted).sum(axis=-1)
    mean, least = AGREEMENT[precision]
    raise IntegrityError(
        f"the {precision} artifact of {source.name} predicts at a cosine of {cosine.mean():.6f} in the mean and "
        f"{cosine.min():.6f} at least to the model, and {mean:g} and {least:g} are wanted: nothing was written"
    )
