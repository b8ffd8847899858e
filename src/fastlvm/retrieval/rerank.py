"""`rerank` runs stages over what a search found, one after the other, times each, and says whether any used keys.

With keys "the next chunk" is right every time on contiguous windows, whatever the model: such results are labelled, and
not to be compared with those of rankers that see vectors alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastlvm.errors import InputError, shown
from fastlvm.retrieval.checks import checked_k
from fastlvm.retrieval.index import SearchResult
from fastlvm.retrieval.stages import (
    LARGEST,
    RERANKERS,
    Candidates,
    DirectionalBonus,
    Mmr,
    SequenceBias,
    ShardAssist,
    Stage,
    lengths,
    parse,
)

__all__ = [
    "RERANKERS",
    "Candidates",
    "Cost",
    "DirectionalBonus",
    "Mmr",
    "Reranked",
    "SequenceBias",
    "ShardAssist",
    "Stage",
    "parse",
    "rerank",
]

VECTORS_ALONE = "vectors alone"
USES_KEYS = "uses keys: not comparable with rankers that see vectors alone"

_INT32_MAX = np.iinfo(np.int32).max
_NEEDED = {
    "vectors": "the candidates' vectors in the index's space, float [n, m, dim]",
    "predicted": "the predicted vectors, float [n, dim]",
    "last": "the contexts' last vectors in the index's space, float [n, dim]",
    "key": "the contexts' last (article, chunk), integers [n, 2]",
}


class Cost(NamedTuple):
    """What a stage took: milliseconds for all queries of the call together."""

    name: str
    uses_keys: bool
    ms: float


@dataclass(frozen=True, eq=False, repr=False)
class Reranked:
    """A search result in its new order, with the stages it went through."""

    result: SearchResult
    stages: tuple[Cost, ...]

    @property
    def uses_keys(self) -> bool:
        """Whether any stage knew keys."""
        return any(stage.uses_keys for stage in self.stages)

    @property
    def label(self) -> str:
        """What has to stand beside a figure of this result."""
        return USES_KEYS if self.uses_keys else VECTORS_ALONE

    def __repr__(self) -> str:
        shape = " × ".join(map(str, self.result.ids.shape))
        took = ", ".join(f"{stage.name} {stage.ms:.3g} ms" for stage in self.stages) or "no stage"
        return f"Reranked({shape}; {took}; {self.label})"


def rerank(
    result: tuple[np.ndarray, np.ndarray, np.ndarray],
    stages: Sequence[Stage],
    k: int,
    *,
    vectors: np.ndarray | None = None,
    predicted: np.ndarray | None = None,
    last: np.ndarray | None = None,
    key: np.ndarray | None = None,
) -> Reranked:
    """The k best of a search result after all stages, which see one after the other all that was found.

    result: what `Index.search` returned, ids [n, m], scores [n, m], keys [n, m, 2]; an id that comes twice for a query
    keeps its first place. Equal scores stay in the order they had. As in a search, where fewer than k remain: id -1,
    score -inf, key (-1, -1), last.

    What a stage needs, and only that, is looked at: vectors float [n, m, dim], those of the ids, anything where the id
    is -1; predicted float [n, dim]; last float [n, dim], the last vector of each context, all in the index's space; key
    integers [n, 2], (article, chunk) of that vector, (-1, -1) where it is not known, which gets no bonus. Answers do
    not depend on the other queries of a call.

    Raises InputError for what is missing, has another shape or type, is not finite, or for vectors longer than 1e15.
    """
    ids, scores, keys = _checked_result(result)
    k = checked_k(k)
    checked_stages(stages)
    offered = {"vectors": vectors, "predicted": predicted, "last": last, "key": key}
    needed = _checked_needs(stages, offered, ids >= 0)

    place = np.argsort(ids < 0, axis=1, kind="stable")  # in the result that was given, of each candidate in order
    scores = np.take_along_axis(scores, place, axis=1)
    costs = []
    for turn, stage in enumerate(stages, 1):
        start = time.perf_counter()
        seen = _seen(stage, scores, place, keys, needed)
        order, scores = stage.run(seen, k if turn == len(stages) else ids.shape[1])
        place = np.take_along_axis(place, order, axis=1)
        costs.append(Cost(stage.name, stage.uses_keys, 1e3 * (time.perf_counter() - start)))

    best = np.take_along_axis(ids, place, axis=1), scores, np.take_along_axis(keys, place[..., None], axis=1)
    return Reranked(_padded(best, k), tuple(costs))


def _padded(best: tuple[np.ndarray, np.ndarray, np.ndarray], k: int) -> SearchResult:
    """The first k, with nothing after them where there are fewer."""
    n, width = len(best[0]), min(k, best[0].shape[1])
    result = SearchResult(np.full((n, k), -1), np.full((n, k), -np.inf, np.float32), np.full((n, k, 2), -1, np.int32))
    for whole, part in zip(result, best, strict=True):
        whole[:, :width] = part[:, :width]
    return result


def _seen(
    stage: Stage, scores: np.ndarray, place: np.ndarray, keys: np.ndarray, needed: Mapping[str, np.ndarray]
) -> Candidates:
    """What a stage needs, the candidates' in their present order."""
    own = {name: needed[name] for name in stage.needs}
    moved = not np.array_equal(place, np.broadcast_to(np.arange(place.shape[1]), place.shape))
    if moved and "vectors" in own:
        own["vectors"] = np.take_along_axis(own["vectors"], place[..., None], axis=1)
    if "key" in own:
        own["keys"] = np.take_along_axis(keys, place[..., None], axis=1)
    return Candidates(scores, **own)


def _checked_result(result: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids int64, scores float32 and keys int32, made -1, -inf and -1 where no candidate is or an id comes again."""
    if not isinstance(result, tuple) or len(result) != 3:
        raise InputError(
            f"result is a {type(result).__name__}, and what Index.search returns is wanted: pass all of it"
        )
    kinds = {"ids": "iu", "scores": "f", "keys": "iu"}
    ids, scores, keys = (_array(name, part, kinds[name]) for name, part in zip(kinds, result, strict=True))
    if ids.ndim != 2:
        raise InputError(
            f"ids has shape {list(ids.shape)}, and [n, m] is wanted: search for contexts [n, …], n = 1 too"
        )
    _check_shape("scores", scores, list(ids.shape))
    _check_shape("keys", keys, [*ids.shape, 2])
    if ids.size and ids.min() < -1:
        raise InputError(
            f"ids{_first(ids < -1)} is {ids.min()}, and a payload row is wanted, or -1 where there is none"
        )
    ids = np.where(_repeated(ids), -1, ids).astype(np.int64)
    with np.errstate(over="ignore"):
        scores = scores.astype(np.float32)
    wrong = (ids >= 0) & ~np.isfinite(scores)
    if wrong.any():
        raise InputError(
            f"scores{_first(wrong)} is {scores[wrong][0]}, and a finite float32 is wanted: mend that score"
        )
    there = ids >= 0
    return ids, np.where(there, scores, np.float32(-np.inf)), np.where(there[..., None], keys, -1).astype(np.int32)


def _repeated(ids: np.ndarray) -> np.ndarray:
    """Whether an id stands earlier in its row, bool [n, m]."""
    order = np.argsort(ids, axis=1, kind="stable")
    ascending = np.take_along_axis(ids, order, axis=1)
    again = np.zeros(ids.shape, bool)
    np.put_along_axis(again, order[:, 1:], ascending[:, 1:] == ascending[:, :-1], axis=1)
    return again


def checked_stages(stages: Any) -> None:
    """Raises InputError unless it is a list of rerankers."""
    choices = f"parse('mmr:0.7') makes one of {', '.join(RERANKERS)}"
    if not isinstance(stages, (list, tuple)):
        raise InputError(f"stages is a {type(stages).__name__}, and a list of rerankers is wanted: {choices}")
    for i, stage in enumerate(stages):
        if not isinstance(stage, Stage):
            raise InputError(f"stages[{i}] is {shown(stage)}, and a reranker is wanted: {choices}")


def _checked_needs(stages: Sequence[Stage], offered: Mapping[str, Any], there: np.ndarray) -> dict[str, np.ndarray]:
    """What the stages need: vectors as float32 of one dimension and finite, the key as int64."""
    n, m = there.shape
    needed: dict[str, np.ndarray] = {}
    dim: int | str = "dim"
    for name in _NEEDED:
        wanting = [stage.name for stage in stages if name in stage.needs]
        if not wanting:
            continue
        if offered[name] is None:
            raise InputError(f"{wanting[0]} needs {name}, and none is given: pass {_NEEDED[name]}, as {name}=")
        if name == "key":
            needed[name] = _checked_key(offered[name], n)
            continue
        array = _array(name, offered[name], "f")
        head = [n, m] if name == "vectors" else [n]
        _check_shape(name, array, [*head, dim])
        dim = array.shape[-1]
        needed[name] = _finite(name, array, there if name == "vectors" else np.ones(n, bool))
    return needed


def _checked_key(given: Any, n: int) -> np.ndarray:
    key = _array("key", given, "iu")
    _check_shape("key", key, [n, 2])
    wrong = ((key < -1) | (key > _INT32_MAX)).any(axis=1)
    if wrong.any():
        article, chunk = key[wrong][0]
        wanted = f"numbers from 0 to {_INT32_MAX} are wanted, or -1 where they are not known"
        raise InputError(f"key{_first(wrong)} is ({article}, {chunk}), and {wanted}")
    return key.astype(np.int64)


def _finite(name: str, array: np.ndarray, there: np.ndarray) -> np.ndarray:
    """float32, C-contiguous; zeros for a vector that is not finite where no candidate is."""
    with np.errstate(over="ignore", invalid="ignore"):
        vectors = np.ascontiguousarray(array, dtype=np.float32)
        good = lengths(vectors) <= LARGEST
    if good.all():
        return vectors
    if (there & ~good).any():
        at = _first(there & ~good)
        raise InputError(
            f"{name}{at} is not finite, or longer than {LARGEST:g}: mend that vector, or leave its query out"
        )
    return np.where(good[..., None], vectors, np.float32(0))


def _array(name: str, given: Any, kinds: str) -> np.ndarray:
    """`given` as an array of one of numpy's kinds of dtype."""
    wanted = "a float array" if kinds == "f" else "an array of integers"
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is a {type(given).__name__} that is no array, and {wanted} is wanted") from error
    if array.dtype.kind not in kinds:
        raise InputError(f"{name} is {array.dtype}, and {wanted} is wanted")
    return array


def _check_shape(name: str, array: np.ndarray, wanted: Sequence[int | str]) -> None:
    """A word stands for any length."""
    fits = array.ndim == len(wanted) and all(
        isinstance(length, str) or length == found for length, found in zip(wanted, array.shape, strict=False)
    )
    if not fits:
        raise InputError(f"{name} has shape {list(array.shape)}, and [{', '.join(map(str, wanted))}] is wanted")


def _first(wrong: Any) -> str:
    """Where the first true entry is, such as "[0, 3]"."""
    return f"[{', '.join(map(str, np.argwhere(wrong)[0]))}]"
