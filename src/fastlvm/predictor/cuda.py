"""A predictor on an NVIDIA GPU: contexts in, ids of the nearest payload rows out, one CUDA graph a call. Needs torch.

The model's matrices lie on the device in `precision`, one vector of each duplicate group of the payload in float16;
the search is exact over these. For every batch size and k a graph is captured on its first call and kept: copying in,
the forward, the search and copying out are one launch and one wait.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlvm.data import Payload, Space
from fastlvm.errors import InputError
from fastlvm.kernels.triton.early import early
from fastlvm.ops import _triton
from fastlvm.predictor import contexts
from fastlvm.predictor.contexts import Found
from fastlvm.predictor.cuda_layers import DTYPES, Program
from fastlvm.predictor.cuda_load import Held, float32, placed
from fastlvm.predictor.cuda_search import Exact, Tune
from fastlvm.predictor.forward import Plan

MOST = 256  # contexts of one graph; more go through it piece by piece
GRAPHS = 16  # that are kept
MORE = 16  # results are fetched for exclusions in steps of so many, so that few graphs do


class _Call(NamedTuple):
    """One captured graph, with what goes in and comes out of it; without a GPU it is run step by step.

    given float32 [n, positions, dim] and found int32 [n · (2 k + dim)] in main memory: ids, scores, predictions.
    """

    graph: Any
    given: Tensor
    inside: Tensor
    found: Tensor
    into: np.ndarray  # the memory of given
    out: np.ndarray  # and of found


class CudaPredictor:
    """What `Predictor.load(artifact, device="cuda")` gives. Thread-safe: one call at a time.

    Attributes: device; precision; context, dim; path and config, those of the artifact or None and {}.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Mapping[str, Tensor],
        space: Space,
        vectors: Any,
        *,
        rows: np.ndarray | None = None,
        keys: np.ndarray | None = None,
        stands_for: np.ndarray | None = None,
        device: str = "cuda",
        precision: str = "bf16",
        tune: Mapping[str, Any] | None = None,
    ) -> None:
        """Use `Predictor.load` or `from_model`.

        tensors: the model's, float32. vectors: [m, dim] in the space, an array, a tensor, or an iterable of blocks of
        arrays with `len` m. rows: int64 [m], ascending, the payload rows that they are. keys: int32 [total, 2];
        stands_for: int64 [total], of each row the one that is in `rows` for it.
        """
        if precision not in DTYPES:
            raise InputError(f"precision is {precision!r}, and on a GPU {', '.join(DTYPES)} can be had")
        self.device = _checked_device(device)
        self.precision = precision
        self.path: Path | None = None
        self.config: dict[str, Any] = {}
        self.context, self.dim = int(plan.shape.positions or 1), plan.shape.dim
        self._program = Program(plan, tensors, space, self.device, DTYPES[precision])
        self._exact = Exact(placed(vectors, self.dim, self.device), Tune(**(tune or {})))
        count = len(self._exact.vectors)
        self._rows = np.arange(count) if rows is None else rows
        self._keys = np.full((count, 2), -1, np.int32) if keys is None else keys
        self._stands_for = np.arange(count) if stands_for is None else stands_for
        self._lock = threading.Lock()
        self._calls: OrderedDict[tuple[int, int, bool], _Call] = OrderedDict()
        self._stream = self._pool = None
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                self._stream = torch.cuda.Stream()
                self._pool = torch.cuda.graph_pool_handle()
                torch.cuda.synchronize()  # weights and vectors are there for every stream

    @classmethod
    def from_model(
        cls,
        model: torch.nn.Module,
        vectors: Any,
        *,
        space: Space | None = None,
        keys: np.ndarray | None = None,
        device: str = "cuda",
        precision: str = "bf16",
        tune: Mapping[str, Any] | None = None,
    ) -> CudaPredictor:
        """A predictor without files, of a module of `fastlvm.models` and vectors [n, dim] in the space.

        vectors: an array or a tensor; one of float16 on the device is searched where it is. space: None only
        normalises. keys: int32 [n, 2], else unknown. tune: fields of `cuda_search.Tune`, to compare.

            model = fastlvm.models.create("mamba-s")
            vectors = torch.nn.functional.normalize(torch.randn(584545, 768, device="cuda"), dim=1).half()
            CudaPredictor.from_model(model, vectors).search(context, k=50)
        """
        config: Any = model.config
        plan = Plan(model.describe(), config.context, config.vector_dim)  # type: ignore[operator]
        space = Space.identity(config.vector_dim) if space is None else space
        tensors = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
        return cls(plan, tensors, space, vectors, keys=keys, device=device, precision=precision, tune=tune)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        device: str = "cuda",
        *,
        precision: str = "bf16",
        payload: Payload | str | os.PathLike[str] | None = None,
        tune: Mapping[str, Any] | None = None,
    ) -> CudaPredictor:
        """See `Predictor.load`."""
        from fastlvm.predictor import artifact

        _checked_device(device)
        parts = artifact.read(folder)
        index = parts.index
        held = Held(parts.path, index, payload)
        found = cls(
            parts.forward.plan,
            float32(artifact.weights(parts)),
            index.space,
            held,
            rows=held.rows,
            keys=np.array(index.keys),
            stands_for=index.stands_for(np.arange(index.total)),
            device=device,
            precision=precision,
            tune=tune,
        )
        found.path, found.config = parts.path, parts.config
        artifact.check_golden(
            parts, found.predict, beside=artifact.TOLERANCE["fp32" if precision == "fp32" else "bf16"]
        )
        return found

    def predict(self, context: Any) -> np.ndarray:
        """As `Predictor.predict`; a torch tensor on the device is taken from there."""
        given, single = self._taken(context)
        _, _, predicted = self._run(given, single, 0)
        return predicted[0] if single else predicted

    def search(self, context: Any, k: int = 50, exclude: np.ndarray | str | None = None) -> Found:
        """As `Predictor.search`, the scores being those of the vectors rounded to float16, the lower row first of two
        with the same; a torch tensor on the device is taken from there. exclude: payload rows, not "context"."""
        given, single = self._taken(context)
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise InputError(f"k is {k!r}, and an integer ≥ 1 is wanted")
        if isinstance(exclude, str):
            raise InputError(f'exclude is {exclude!r}, and on a GPU payload rows or None is wanted: device="cpu" can')
        out = None if exclude is None else self._checked_exclude(exclude, len(given))
        more = 0 if out is None else -(-out.shape[1] // MORE) * MORE
        places, scores, _ = self._run(given, single, min(int(k) + more, len(self)))
        if out is not None:
            places, scores = _without(places, scores, out, int(k))
        found = self._found(places, scores, int(k))
        return Found(*(part[0] for part in found)) if single else found

    def rerank(self, *_: Any, **__: Any) -> Any:
        raise InputError('reranking has no form on a GPU: load the artifact with device="cpu"')

    def stream(self, *_: Any, **__: Any) -> Any:
        raise InputError('streaming has no form on a GPU: load the artifact with device="cpu"')

    def profile(self, *_: Any, **__: Any) -> Any:
        raise InputError('a graph is one launch and has no layers to profile: load the artifact with device="cpu"')

    def __len__(self) -> int:
        """Vectors that are searched."""
        return len(self._rows)

    def __repr__(self) -> str:
        shape = f"{self.context} × {self.dim}"
        return f"CudaPredictor({shape}, {self.precision}, {len(self)} vectors on {self.device})"

    @property
    def payload_id(self) -> str | None:
        """None for one that is not of an artifact."""
        return self.config.get("payload_id")

    @property
    def nbytes(self) -> int:
        """Size of the weights on the device."""
        return self._program.nbytes

    def _found(self, places: np.ndarray, scores: np.ndarray, k: int) -> Found:
        """Rows and keys of places int32 [n, ≤ k] among the vectors, -1 = none, padded to k."""
        n, width = places.shape
        if not len(self) or not places.size or places.min() < 0:
            ids = np.where(places >= 0, self._rows[places], -1) if len(self) else places.astype(np.int64)
        else:  # as ever without exclusions
            ids = self._rows.take(places)
            if width == k:
                return Found(ids, scores, self._keys.take(ids, axis=0))
        if width < k:
            ids = np.concatenate([ids, np.full((n, k - width), -1)], axis=1)
            scores = np.concatenate([scores, np.full((n, k - width), -np.inf, np.float32)], axis=1)
        keys = self._keys[ids]
        keys[ids < 0] = -1
        return Found(ids, scores, keys)

    def _checked_exclude(self, exclude: Any, n: int) -> np.ndarray:
        """Places of the vectors to leave out, int64 [n, m]; -1 = none."""
        from fastlvm.retrieval.checks import checked_rows

        rows = checked_rows(exclude, "exclude", len(self._stands_for))
        if rows.ndim not in (1, 2) or (rows.ndim == 2 and len(rows) != n):
            raise InputError(f"exclude has shape {list(rows.shape)}, and [{n}, m] or [m] is wanted")
        named = self._stands_for[rows]
        places = np.minimum(np.searchsorted(self._rows, named), max(len(self) - 1, 0))
        return np.broadcast_to(np.where((rows >= 0) & (self._rows[places] == named), places, -1), (n, rows.shape[-1]))

    def _run(self, given: Any, single: bool, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places int32 [n, k], scores float32 [n, k] and predictions float32 [n, dim] of contexts as `_taken` gives."""
        found = self._pieces(given, k)
        if np.isfinite(found[2]).all():
            return found
        # the device had no length to divide by: say where, or help, if the vector is only very short
        raw = given.float().cpu().numpy() if isinstance(given, Tensor) else given
        mended = contexts.unit(raw[0] if single else raw, "context")
        found = self._pieces(mended.reshape(raw.shape), k)
        if not np.isfinite(found[2]).all():
            raise InputError(f"the prediction is not finite with {self.precision} matrices: try another precision")
        return found

    def _pieces(self, given: Any, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        parts = [self._launch(given[at : at + MOST], k) for at in range(0, len(given), MOST)]
        if len(parts) == 1:
            return parts[0]
        empty = (np.empty((0, k), np.int32), np.empty((0, k), np.float32), np.empty((0, self.dim), np.float32))
        places, scores, predicted = (np.concatenate(part) for part in zip(empty, *parts, strict=True))
        return places, scores, predicted

    def _taken(self, context: Any) -> tuple[Any, bool]:
        """An array or a tensor on the device [n, positions, dim] of floats, and whether it was a single context."""
        if isinstance(context, Tensor) and context.is_cuda:
            wanted = (self.context, self.dim)
            if context.ndim not in (2, 3) or tuple(context.shape[-2:]) != wanted or not context.is_floating_point():
                found = f"{str(context.dtype).removeprefix('torch.')} {list(context.shape)}"
                raise InputError(
                    f"context is {found}, and floats [n, {wanted[0]}, {wanted[1]}] or without n are wanted"
                )
            return context.detach().reshape(-1, *wanted), context.ndim == 2
        raw = contexts.shaped(context, self.context, self.dim)
        return raw.reshape(-1, self.context, self.dim), raw.ndim == 2

    def _launch(self, given: Any, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n, host = len(given), not isinstance(given, Tensor)
        size = 1 << (n - 1).bit_length()
        key = size, k, host
        with self._lock, self._mode(key):
            call = self._calls.get(key) or self._captured(size, k, host)
            self._calls.move_to_end(key)
            if host and given.dtype == np.float32:
                call.into[:n] = given
            elif host:
                with np.errstate(over="ignore"):
                    np.copyto(call.into[:n], given, casting="same_kind")
            if self._stream is None:
                if not host:
                    call.inside[:n].copy_(given)
                self._steps(call, k, host)
            else:
                if not host:
                    self._stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(self._stream):
                    if not host:
                        call.inside[:n].copy_(given)
                    call.graph.replay()
                self._wait()
            copied = call.out.copy()
        places, scores, predicted = _parts(copied, size, k, self.dim)
        return places[:n], scores[:n].view(np.float32), predicted[:n].view(np.float32)

    def _mode(self, key: tuple[int, int, bool]) -> AbstractContextManager[Any]:
        """Of torch; to start a graph that is there and takes its context from main memory, none is wanted."""
        started = self._stream is not None and key[2] and key in self._calls
        return nullcontext() if started else torch.inference_mode()

    def _captured(self, size: int, k: int, host: bool) -> _Call:
        """A graph for `size` contexts, from main memory or the device, and their k best rows."""
        shape, cuda = (size, self.context, self.dim), self._stream is not None
        found = torch.zeros(size * (2 * k + self.dim), dtype=torch.int32, pin_memory=cuda)
        # what is beyond the given contexts is a context too
        given = torch.ones(shape if host else (0,), pin_memory=cuda)
        inside = torch.ones(shape, device=self.device)
        call = _Call(torch.cuda.CUDAGraph() if cuda else None, given, inside, found, given.numpy(), found.numpy())
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                for _ in range(2):  # kernels are compiled and libraries take their memory before the capture
                    self._steps(call, k, host)
                self._stream.synchronize()
                with torch.cuda.graph(
                    call.graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    self._steps(call, k, host)
        self._calls[size, k, host] = call
        while len(self._calls) > GRAPHS:
            self._calls.popitem(last=False)
        return call

    def _steps(self, call: _Call, k: int, host: bool) -> None:
        tune = self._exact.tune
        with early(tune.early):
            # what is read or written once is left where the host has it
            given = call.given if host and tune.direct else call.inside
            if host and not tune.direct:
                call.inside.copy_(call.given, non_blocking=True)
            predicted = self._program(given)
            if tune.direct and self._exact.writes_itself(len(predicted), k):
                ids, scores, left = _parts(call.found, len(predicted), k, self.dim)
                self._exact(predicted, ids, scores.view(torch.float32), left.view(torch.float32))
                return
            out = torch.empty(len(call.found), dtype=torch.int32, device=self.device)
            ids, scores, left = _parts(out, len(predicted), k, self.dim)
            left.copy_(predicted.view(torch.int32))
            if k:
                self._exact(predicted, ids, scores.view(torch.float32))
            call.found.copy_(out, non_blocking=True)

    def _wait(self) -> None:
        assert self._stream is not None
        if self._exact.tune.poll:
            while not self._stream.query():
                pass
        else:
            self._stream.synchronize()


def _checked_device(device: Any) -> torch.device:
    """The device, if kernels can run there; the CPU where Triton interprets them."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device is {device!r}, and cpu, cuda or cuda:0 is wanted") from error
    if find_spec("triton") is None:
        raise InputError(f"device is {device!r}, and triton is not installed: pip install triton")
    if found.type == "cpu" and _triton.interpreted():
        return found
    if found.type != "cuda":
        raise InputError(f"device is {device!r}, and cpu, cuda or cuda:0 is wanted")
    if not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device is {device!r}, and torch {torch.__version__} finds no such GPU here")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def _parts(buffer: Any, n: int, k: int, dim: int) -> tuple[Any, Any, Any]:
    """Ids [n, k], scores [n, k] and predictions [n, dim] as they lie in a buffer of 32-bit numbers."""
    return (
        buffer[: n * k].reshape(n, k),
        buffer[n * k : 2 * n * k].reshape(n, k),
        buffer[2 * n * k : n * (2 * k + dim)].reshape(n, dim),
    )


def _without(places: np.ndarray, scores: np.ndarray, out: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k first of places int32 [n, more] that are not in out int64 [n, m]; -1 where there are too few."""
    kept = (places[:, :, None] != out[:, None, :]).all(axis=2)
    first = np.argsort(~kept, axis=1, kind="stable")[:, :k]
    there = np.take_along_axis(kept, first, axis=1)
    places, scores = (np.take_along_axis(part, first, axis=1) for part in (places, scores))
    return np.where(there, places, -1), np.where(there, scores, np.float32(-np.inf))
