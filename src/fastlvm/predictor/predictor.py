"""Context vectors in, the next chunk's vector or the payload rows nearest to it out; numpy and faiss, no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastlvm import _C
from fastlvm.errors import InputError
from fastlvm.predictor import artifact
from fastlvm.predictor.forward import into_space
from fastlvm.predictor.stream import Stream
from fastlvm.retrieval import Index
from fastlvm.retrieval.checks import checked_k
from fastlvm.retrieval.index import MOST_THREADS, SearchResult
from fastlvm.retrieval.rerank import Cost, Reranked, Stage, checked_stages, rerank
from fastlvm.retrieval.searcher import Own

MATCH = 1 - 1e-4  # least inner product of a context vector with its own payload row: float16 rounding, whitened
TIE = 1e-6  # rows this close to the best match cannot be told from it in float32
UNIT = 1e-3  # a length this far from 1 is float16 rounding, and kept


class Found(NamedTuple):
    """Best first: ids int64 [n, k] are payload rows, scores float32 [n, k], keys int32 [n, k, 2].

    For a single context without the n. Where fewer than k rows remain: id -1, score -inf, key (-1, -1).
    """

    ids: np.ndarray
    scores: np.ndarray
    keys: np.ndarray


class Predictor:
    """The next chunk of a document from the last few, `.context` vectors of `.dim` each, oldest first.

    Every call starts from a zero state: a prediction depends on its own context alone. Use `Predictor.load`.
    """

    def __init__(self, parts: artifact.Artifact) -> None:
        self._parts = parts
        self._forward = parts.forward
        moves = _C.Model(1, parts.index.dim, [*into_space(parts.index.space), ("last", {})])
        self._own = Own(moves, MATCH, TIE)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], threads: int | None = None) -> Predictor:
        """Read an artifact that `fastlvm.export` wrote, and have it reproduce its golden predictions.

        threads: of this predictor's model; None: as many as fastlvm's kernels use (`fastlvm.set_num_threads`). FAISS
        knows one number for the whole process, and a given one sets it. Raises InputError where there is no
        artifact or one this version cannot run, IntegrityError where it is damaged.
        """
        whole = isinstance(threads, int) and not isinstance(threads, bool)
        if threads is not None and not (whole and 1 <= threads <= MOST_THREADS):
            raise InputError(f"threads is {threads!r}, and a whole number from 1 to {MOST_THREADS} is wanted")
        predictor = cls(artifact.read(folder, threads))
        artifact.check_golden(predictor._parts, predictor.predict)
        return predictor

    def predict(self, context: np.ndarray) -> np.ndarray:
        """The next chunk's vector, of length 1 and in the index's space: float32 [n, dim], or [dim] for one context.

        context: float [n, context, dim] or [context, dim], raw encoder vectors, oldest first; a vector whose length is
        not 1 is divided by it, as building a payload does. Raises InputError for another shape, NaN, infinite or zero
        vectors, naming the window and position.
        """
        raw, single = self._checked(context)
        predicted = self._forward(raw)
        return predicted[0] if single else predicted

    def search(self, context: np.ndarray, k: int = 50, exclude: np.ndarray | str | None = None) -> Found:
        """The k payload rows nearest to the prediction.

        context: as `predict` takes it. exclude: payload rows [m] to leave out of every result, or [n, m] for each
        context, -1 = none; or "context": the rows that a context's own vectors are. A row stands for its whole
        duplicate group; where the index's scores are rounded, those they cannot tell from a context vector go with it.
        Raises InputError for a wrong context, k or exclude.
        """
        raw, single = self._checked(context)
        result = self._search(raw, k, exclude)
        return Found(*(part[0] for part in result)) if single else Found(*result)

    def _search(
        self, raw: np.ndarray, k: int, exclude: np.ndarray | str | None, predicted: np.ndarray | None = None
    ) -> SearchResult:
        own = None
        if isinstance(exclude, str):
            if exclude != "context":
                raise InputError(f'exclude is {exclude!r}, and payload rows, "context" or None is wanted')
            exclude, own = None, self._own
        return self.index.predict(self._forward.model, raw, k, exclude, self._forward.threads, own, predicted)

    def rerank(
        self,
        context: np.ndarray,
        stages: Sequence[Stage],
        k: int = 10,
        *,
        candidates: int = 50,
        exclude: np.ndarray | str | None = None,
        key: np.ndarray | None = None,
    ) -> Reranked:
        """What `search` finds, put in another order: the k best of `candidates` rows after all stages.

        context and exclude: as `search` takes them. stages: of `fastlvm.retrieval.rerank`, such as `parse("mmr:0.7")`.
        key: integers [n, 2], or [2] for a single context, (article, chunk) of each context's last vector, -1 = not
        known; None: that of the row that this vector is, searched for where a stage needs it.

        For a single context the result is without the n. Its `stages` begin with "inputs": fetching the candidates'
        vectors, which are `Index.vectors`, and finding the keys. Raises InputError as `search` and
        `fastlvm.retrieval.rerank.rerank` do, and for k > candidates.
        """
        raw, single = self._checked(context)
        checked_stages(stages)
        if checked_k(k) > checked_k(candidates, "candidates"):
            raise InputError(f"k is {k} and candidates {candidates}: ask for as many candidates as results, or more")
        predicted = np.empty((len(raw), self.dim), np.float32)
        result = self._search(raw, candidates, exclude, predicted)
        start = time.perf_counter()
        needs = {need for stage in stages for need in stage.needs}
        given = {
            "vectors": self.index.vectors(result.ids) if "vectors" in needs else None,
            "predicted": predicted,
            "last": self._moved(raw[:, -1]) if "last" in needs else None,
            "key": self._key(raw, key, single) if "key" in needs else None,
        }
        inputs = Cost("inputs", False, 1e3 * (time.perf_counter() - start))
        ranked = rerank(result, stages, k, **given)
        found = SearchResult(*(part[0] for part in ranked.result)) if single else ranked.result
        return replace(ranked, result=found, stages=(inputs, *ranked.stages))

    def _moved(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors of contexts [n, dim] in the index's space."""
        moved = np.empty((len(vectors), self._own.into_space.out_dim), np.float32)
        self._own.into_space.run(np.ascontiguousarray(vectors[:, None]), moved, self._forward.threads)
        return moved

    def _key(self, raw: np.ndarray, given: np.ndarray | None, single: bool) -> np.ndarray:
        """integers [n, 2] of the contexts' last vectors, as given or of the rows that they are"""
        if given is not None:
            return np.asarray(given)[None] if single else np.asarray(given)
        found = self.index.search(self._moved(raw[:, -1]), 1)
        same = found.scores >= self._own.score - self.index.score_error
        return np.where(same, found.keys[:, 0], -1)

    def stream(self, state: str | os.PathLike[str] | None = None) -> Stream:
        """A `Stream`: one vector at a time, its state kept. It starts at zero or from a file that `Stream.save` wrote.

        Raises InputError for a model that cannot, such as one that attends to the mean of its context.
        """

        def checked(vector: Any) -> np.ndarray:
            return self._vectors(vector, (1,), f"[{self.dim}]", "vector")[0].reshape(self.dim)

        stream = Stream(self._forward, self.config["sha256"][artifact.MODEL], checked)
        if state is not None:
            stream.restore(state)
        return stream

    def profile(self, context: np.ndarray, repeats: int = 200) -> list[tuple[str, dict[str, float]]]:
        """Where `predict` of a single context spends its time: for every layer its type and µs by phase.

        context: as `predict` takes it; of several the first is taken.
        """
        raw, _ = self._checked(context)
        found = self._forward.profile(raw[:1], repeats)
        return [
            (name, {phase: float(time) for phase, time in zip(_C.PHASES, row, strict=True) if time > 0})
            for name, row in zip(self._forward.names, found, strict=True)
        ]

    def _checked(self, context: Any) -> tuple[np.ndarray, bool]:
        """float32 [n, context, dim] of unit vectors, and whether a single context was given."""
        wanted = f"[n, {self.context}, {self.dim}] or [{self.context}, {self.dim}]"
        vectors, ndim = self._vectors(context, (2, 3), wanted, "context")
        return vectors.reshape(-1, self.context, self.dim), ndim == 2

    def _vectors(self, given: Any, ndims: tuple[int, ...], wanted: str, name: str) -> tuple[np.ndarray, int]:
        """float32 [..., dim] of unit vectors as `given` holds them, and how many axes it has."""
        try:
            raw = np.asarray(given)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(given).__name__
            raise InputError(f"{name} is a {kind} that is no array ({error}), and {wanted} is wanted") from error
        if not np.issubdtype(raw.dtype, np.floating):
            raise InputError(f"{name} is {raw.dtype}, and a float array {wanted} is wanted")
        tail = (self.context, self.dim) if max(ndims) > 1 else (self.dim,)
        if raw.ndim not in ndims or raw.shape[-len(tail) :] != tail:
            raise InputError(f"{name} has shape {list(raw.shape)}, and {wanted} is wanted")
        with np.errstate(over="ignore"):
            vectors = np.ascontiguousarray(raw, dtype=np.float32)
        squares = np.einsum("...d,...d->...", vectors, vectors, dtype=np.float64)
        if not np.isfinite(squares).all():
            at = _first(~np.isfinite(vectors).all(axis=-1))
            raise InputError(f"{name}{at} holds a value that is not finite in float32: mend that vector")
        if not squares.all():
            at = _first(np.equal(squares, 0))
            raise InputError(f"{name}{at} is all zeros, and an encoder's vector is wanted: leave that window out")
        lengths = np.sqrt(squares)
        off = np.abs(lengths - 1) > UNIT
        if off.any():
            scaled = (vectors / lengths[..., None]).astype(np.float32)
            vectors = np.where(off[..., None], scaled, vectors)
        return vectors, raw.ndim

    def __repr__(self) -> str:
        return f"Predictor({self.path}, {self.context} × {self.dim}, {self.config['precision']}, {self.index!r})"

    @property
    def path(self) -> Path:
        """The artifact's folder."""
        return self._parts.path

    @property
    def config(self) -> dict[str, Any]:
        """The artifact's config.json."""
        return self._parts.config

    @property
    def nbytes(self) -> int:
        """Size of the packed weights."""
        return self._forward.nbytes

    @property
    def golden_context(self) -> np.ndarray:
        """The raw contexts float32 [g, context, dim] whose predictions were checked on loading."""
        return self._parts.golden.context

    @property
    def index(self) -> Index:
        """The payload's index; its `.space` is the one predictions are in."""
        return self._parts.index

    @property
    def context(self) -> int:
        """Vectors in a context."""
        return int(self.config["context"])

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.config["dim"])

    @property
    def payload_id(self) -> str:
        return self.index.payload_id


def _first(bad: Any) -> str:
    """Where the first true entry is, as an index into what the caller gave."""
    place = np.argwhere(bad)[0]
    return f"[{', '.join(map(str, place))}]" if place.size else ""
