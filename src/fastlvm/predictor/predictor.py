"""Context vectors in, the next chunk's vector or the payload rows nearest to it out; numpy and faiss, no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from fastlvm import _C
from fastlvm.errors import InputError
from fastlvm.predictor import artifact, contexts
from fastlvm.predictor.contexts import Found
from fastlvm.predictor.forward import into_space
from fastlvm.predictor.stream import Stream
from fastlvm.retrieval import Index
from fastlvm.retrieval.checks import checked_k
from fastlvm.retrieval.index import MOST_THREADS, SearchResult
from fastlvm.retrieval.rerank import Cost, Reranked, Stage, checked_stages, rerank
from fastlvm.retrieval.searcher import Own

if TYPE_CHECKING:
    from fastlvm.data import Payload
    from fastlvm.predictor.cuda import CudaPredictor

CPU = Literal["cpu"]

MATCH = 1 - 1e-4  # least inner product of a context vector with its own payload row: float16 rounding, whitened
TIE = 1e-6  # rows this close to the best match cannot be told from it in float32


class Predictor:
    """The next chunk of a document from the last few, `.context` vectors of `.dim` each, oldest first.

    Every call starts from a zero state: a prediction depends on its own context alone. Use `Predictor.load`.
    """

    def __init__(self, parts: artifact.Artifact) -> None:
        self._parts = parts
        self._forward = parts.forward
        moves = _C.Model(1, parts.index.dim, [*into_space(parts.index.space), ("last", {})])
        self._own = Own(moves, MATCH, TIE)

    @overload
    @classmethod
    def load(cls, folder: str | os.PathLike[str], threads: int | None = ..., device: CPU = ...) -> Predictor: ...

    @overload
    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        threads: None = ...,
        device: str = ...,
        *,
        precision: str | None = ...,
        payload: Payload | str | os.PathLike[str] | None = ...,
    ) -> CudaPredictor: ...

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        threads: int | None = None,
        device: str = "cpu",
        *,
        precision: str | None = None,
        payload: Payload | str | os.PathLike[str] | None = None,
    ) -> Predictor | CudaPredictor:
        """Read an artifact that `fastlvm.export` wrote, and have it reproduce its golden predictions.

        threads: of this predictor's model; None: as many as fastlvm's kernels use (`fastlvm.set_num_threads`). FAISS
        knows one number for the whole process, and a given one sets it.

        device: "cpu", or "cuda" for a `CudaPredictor` on an NVIDIA GPU, which needs torch and triton. It has a
        precision of its own, "bf16" (None), "fp16" or "fp32", and searches the vectors of the index exactly or, where
        the index rounds them to bytes, those of `payload`, the payload or its folder.

        Raises InputError where there is no artifact, one this version cannot run, or no such device, IntegrityError
        where the artifact is damaged.
        """
        if device != "cpu":
            if threads is not None:
                raise InputError(f"threads is {threads!r}, and device {device!r} has none: leave it out")
            return _on_gpu(folder, device, precision or "bf16", payload)
        if precision is not None or payload is not None:
            raise InputError('precision and payload are for device="cuda": an artifact on the CPU has its own')
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
            return contexts.unit(contexts.floats(vector, (1,), (self.dim,), f"[{self.dim}]", "vector"), "vector")

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
        return contexts.checked(context, self.context, self.dim)

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


def _on_gpu(
    folder: str | os.PathLike[str], device: str, precision: str, payload: Payload | str | os.PathLike[str] | None
) -> CudaPredictor:
    for name in ("torch", "triton"):
        if find_spec(name) is None:
            raise InputError(f"device is {device!r}, and {name} is not installed: pip install {name}")
    from fastlvm.predictor.cuda import CudaPredictor

    return CudaPredictor.load(folder, device, precision=precision, payload=payload)
