"""Runs and artifacts as rankers: what evaluating and diagnosing take."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlvm.errors import InputError, IntegrityError
from fastlvm.files import sha256_file

if TYPE_CHECKING:
    from fastlvm.data import Payload
    from fastlvm.evaluation import Listing, Ranker
    from fastlvm.predictor import Predictor
    from fastlvm.retrieval import Index

K = 50
"""Chunks that an index is asked for."""


@dataclass(frozen=True)
class Opened:
    """A model as a ranker in the payload it was made from, and what can be timed: a predictor, or an index alone."""

    path: Path
    ranker: Ranker
    payload_id: str
    context: int
    predictor: Predictor | None
    index: Index | None

    def over(self, payload: Payload) -> Ranker:
        """The ranker over a payload; another one than its own is out of its domain, and not in its index."""
        if payload.id == self.payload_id:
            return self.ranker
        if self.ranker.space is not None and self.ranker.space.dim != payload.dim:
            raise InputError(
                f"{self.path} takes vectors of {self.ranker.space.dim} dimensions, and {payload.path} has "
                f"{payload.dim}: evaluate it on payloads of its own encoder"
            )
        return replace(self.ranker, domain="out", listings=())


def model_name(path: Path, among: Sequence[Path]) -> str:
    """How a report calls the model of a folder: its name, its path where two have the same name."""
    same = [other for other in among if other.resolve().name == path.resolve().name]
    return path.resolve().name if len(same) == 1 else str(path)


def open_model(path: Path, name: str, *, index: Index | None = None, rerank: Sequence[str] = ()) -> Opened:
    """A run or an artifact. index: searched instead of the artifact's own, or for a run, in the model's own space.

    rerank: rerankers such as "mmr:0.7", in their order; the list of an artifact's own index is put in their order,
    beside its own. Raises InputError for what is neither, for an index of another space or payload, for rerankers
    without a predictor, and for both an index and rerankers.
    """
    if not path.is_dir():
        raise InputError(f"{path} is no folder: name a run or an artifact")
    if index is not None and rerank:
        raise InputError("an index and rerankers are given, and these work on an artifact's own: leave out one of them")
    if (path / "golden.npz").exists():
        return _artifact(path, name, index, rerank)
    return _run(path, name, index, rerank)


def _artifact(path: Path, name: str, index: Index | None, rerank: Sequence[str]) -> Opened:
    from fastlvm.evaluation import Ranker
    from fastlvm.predictor import Predictor

    predictor = Predictor.load(path)
    space, searched = predictor.index.space, predictor.index if index is None else index
    listings = [_own_list(predictor) if index is None else _list(path, index, space.id, predictor.payload_id)]
    if rerank:
        listings.append(_reranked(predictor, rerank))
    ranker = Ranker(
        name,
        predictor.predict,
        space,
        listings=listings,
        identity=f"{sha256_file(path / 'config.json')} {_state(searched)} {' '.join(rerank)}",
    )
    return Opened(path, ranker, predictor.payload_id, predictor.context, predictor, searched)


def _run(path: Path, name: str, index: Index | None, rerank: Sequence[str]) -> Opened:
    from fastlvm.evaluation import Ranker
    from fastlvm.training import load_run, predict_with
    from fastlvm.training.runs import BEST

    if rerank:
        raise InputError(f"{path} is a run, and rerankers work on what a predictor finds: export it first")
    model, config, space = load_run(path)
    predict = predict_with(model)
    ranker = Ranker(
        name,
        lambda contexts: predict(space.apply(contexts)),
        space,
        listings=[] if index is None else [_list(path, index, space.id, config["payload_id"])],
        identity=f"{sha256_file(path / BEST)} {space.id} {'' if index is None else _state(index)}",
    )
    return Opened(path, ranker, config["payload_id"], config["model"]["context"], None, index)


def _state(index: Index) -> str:
    """What a search's answers depend on: what the index was built from and how, and what it has now."""
    added = np.arange(index.total - index.added, index.total)
    now = (index.rows, index.keys[added], index.vectors(added))
    return " ".join([index.id, *(hashlib.sha256(array.tobytes()).hexdigest() for array in now)])


def describe_index(index: Index) -> str:
    """Kind and options of an index, and what it has otherwise than the payload."""
    changes = {"added": index.added, "removed": index.total - len(index)}
    said = [
        f"{index.kind} {index.options}".strip(),
        *(f"{count} rows {what}" for what, count in changes.items() if count),
    ]
    return ", ".join(said)


def _list(path: Path, index: Index, space_id: str, payload_id: str) -> Listing:
    from fastlvm.evaluation import Listing

    if index.payload_id != payload_id:
        raise IntegrityError(
            f"the index is of payload {index.payload_id}, and {path} of {payload_id}: build one of the model's payload"
        )
    if index.space.id != space_id:
        raise IntegrityError(
            f"the index is in space {index.space.id}, and {path} predicts in {space_id}: build one in the model's space"
        )

    def search(context: np.ndarray, predictions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return index.search(predictions, K, rows).ids

    return Listing(describe_index(index), K, search, lambda vectors: index.search(vectors, K).ids)


def _own_list(predictor: Predictor) -> Listing:
    """What a user of the predictor gets."""
    from fastlvm.evaluation import Listing

    def search(context: np.ndarray, predictions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return predictor.search(context, K, rows).ids

    return Listing(describe_index(predictor.index), K, search, lambda vectors: predictor.index.search(vectors, K).ids)


def stages_of(rerank: Sequence[str]) -> list[Any]:
    """The rerankers that texts such as "mmr:0.7" name."""
    from fastlvm.retrieval.rerank import parse

    return [parse(text) for text in rerank]


def _reranked(predictor: Predictor, rerank: Sequence[str]) -> Listing:
    from fastlvm.evaluation import Listing

    stages = stages_of(rerank)
    keys = any(stage.uses_keys for stage in stages)

    def search(context: np.ndarray, predictions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        key = predictor.index.keys[rows[:, -1]] if keys else None
        return predictor.rerank(context, stages, K, candidates=K, exclude=rows, key=key).result.ids

    own = _own_list(predictor)
    return Listing(own.about, K, search, own.target, " + ".join(rerank), keys)
