"""The payload, the artifact and the exact neighbours of the gate bench: made once and kept below build/."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fastlvm
import forward_cases
import gate_cases
import gate_rivals
import make_payload
from fastlvm.data import Space
from fastlvm.files import atomic_file, atomic_folder, read_json, sha256_json, write_json
from fastlvm.predictor.export import describe
from fastlvm.predictor.forward import Forward, Plan
from fastlvm.predictor.pack import pack
from fastlvm.retrieval.blas import faiss
from fastlvm.retrieval.measure import nearest
from fastlvm.retrieval.rabitq import IvfRabitq
from fastlvm.retrieval.vectors import Vectors, representatives
from gate_cases import ASKED, PRECISION, RECALLED, SCORED, model

RECIPE = 1  # of the rivals' indexes: counts up when they change
# What decides on the bytes of our artifact, by syntax alone: a comment makes no new one.
_CASES = ("bench_predictor", "forward_cases", "gate_cases")
_MAKERS = (
    *_CASES,
    *(
        f"fastlvm.retrieval.{name}"
        for name in ("build", "coding", "faiss_kinds", "measure", "rabitq", "record", "vectors")
    ),
    *(f"fastlvm.predictor.{name}" for name in ("artifact", "blocks", "export", "layers", "pack")),
)


class Setup:
    """What is timed over `rows` rows: one `predictor`, and `contexts` float32 [n, 5, dim] with their predictions.

    `own` says of our index what a rival's has, and `reals` how near to the payload predictions are, by kind of query.
    """

    def __init__(self, rows: int, threads: int) -> None:
        self.payload, self.threads = make_payload.payload(rows), threads
        made_of = [self.payload.id, faiss.__version__, _syntax(_MAKERS)]
        self.folder = make_payload.BUILD / f"gate-{rows}-{sha256_json(made_of)[:12]}"
        self.vectors = Vectors(self.payload, Space.identity(self.payload.dim), representatives(self.payload.groups))
        tuning, measuring = gate_cases.windows(self.payload)
        self.module = model()
        self.tuning = self._forward(self.payload.take(tuning))
        self.own: dict[str, Any] = self._made()
        self.predictor = fastlvm.Predictor.load(self.folder / "artifact")
        self.contexts = np.ascontiguousarray(self.payload.take(measuring), dtype=np.float32)
        self.last_keys = self.payload.keys[measuring[:, -1]]
        self.predicted = self.predictor.predict(self.contexts)
        self.truth = self._nearest("truth", self.predicted[:RECALLED])
        self.reals = self._reals()

    @functools.cached_property
    def _forward(self) -> Forward:
        plan = Plan(describe(self.module.config), forward_cases.CONTEXT, forward_cases.DIM)
        weights = {name: tensor.numpy() for name, tensor in self.module.state_dict().items()}
        return Forward(plan, pack(plan, weights, PRECISION))

    def _made(self) -> dict[str, Any]:
        """The artifact in its folder; what is known of its index."""
        said = self.folder / "index.json"
        if not said.exists():
            fastlvm.set_num_threads(self.threads)
            start = time.perf_counter()
            index = fastlvm.Index.build(
                self.payload, "ivf_rabitq", recall=ASKED, queries=self.tuning, threads=self.threads
            )
            took = time.perf_counter() - start
            with atomic_folder(self.folder) as path:
                fastlvm.export(self.module, path / "artifact", PRECISION, index, payload=self.payload)
                files = [path / "artifact" / "index" / name for name in IvfRabitq.FILES]
                size = sum(file.stat().st_size for file in files)
                options = {"nlist": index.nlist, "setting": index.nprobe}
                write_json(
                    path / said.name,
                    {"options": options, "recall": index.recall_at_50, "build_s": took, "bytes": size},
                )
        return dict(read_json(said))

    def _nearest(self, name: str, queries: np.ndarray) -> np.ndarray:
        """`measure.nearest`, kept by what the queries are: another processor rounds them otherwise."""
        path = self.folder / f"{name}-{hashlib.sha256(queries.tobytes()).hexdigest()[:12]}.npy"
        if not path.exists():
            found = nearest(self.vectors, np.ascontiguousarray(queries))
            with atomic_file(path) as temporary, temporary.open("wb") as file:
                np.save(file, found, allow_pickle=False)
        return np.load(path, allow_pickle=False)

    def _reals(self) -> dict[str, dict[str, float]]:
        """Mean scores of the nearest and the K-th nearest chunk; kept, as torch does not round alike every time."""
        path = self.folder / "reals.json"
        if not path.exists():
            write_json(path, self._measured_reals())
        return dict(read_json(path))

    def _measured_reals(self) -> dict[str, dict[str, float]]:
        contexts = self.contexts[:SCORED]
        drawn = gate_cases.model(head=1.0)
        queries = {
            "window means": self.vectors.windows(SCORED, 1),
            "predictions": self.predicted[: len(self.truth)][:SCORED],
            "predictions with the head as drawn": _predict(drawn, contexts),
        }
        found = {}
        for name, given in queries.items():
            ids = self.truth[: len(given)] if name == "predictions" else self._nearest("scored", given)
            last = min(gate_cases.K, (ids >= 0).sum(axis=1).min()) - 1
            means = [float(np.einsum("qd,qd->q", given, self.vectors.take(ids[:, at])).mean()) for at in (0, last)]
            found[name] = dict(zip(("first", "last"), means, strict=True))
        return found

    @property
    def realism(self) -> float:
        """The least share that predictions have of the scores of window means."""
        real, ours = self.reals["window means"], self.reals["predictions"]
        return min(ours[at] / real[at] for at in real)

    def recall(self, found: np.ndarray) -> float:
        """Of ids in the payload, for the first RECALLED predictions."""
        rows = np.where(self.truth >= 0, self.vectors.rows[self.truth], -1)
        return gate_cases.recall(found, rows)

    @functools.cached_property
    def rivals_folder(self) -> Path:
        """Rivals' indexes depend on the model, whose predictions settings are chosen on, and one on our lists."""
        made_of = [RECIPE, self.payload.id, faiss.__version__, _syntax(_CASES), self.own["options"]["nlist"]]
        return make_payload.BUILD / f"gate-rivals-{len(self.payload)}-{sha256_json(made_of)[:12]}"

    @functools.cached_property
    def builder(self) -> gate_rivals.Builder:
        truth = self._nearest("tuning", self.tuning)
        return gate_rivals.Builder(self.vectors, self.tuning, truth, self.own["options"]["nlist"], self.threads)


def _syntax(modules: Sequence[str]) -> list[str]:
    """A hash of each module's source, the same whatever its comments and layout."""
    files = [Path(str(importlib.import_module(name).__file__)) for name in modules]
    trees = [ast.dump(ast.parse(file.read_text(encoding="utf-8"))) for file in files]
    return [hashlib.sha256(tree.encode()).hexdigest() for tree in trees]


def _predict(module: Any, contexts: np.ndarray) -> np.ndarray:
    """float32 [n, dim] by the module itself."""
    from fastlvm.training import predict_with

    return np.ascontiguousarray(predict_with(module)(contexts), dtype=np.float32)
