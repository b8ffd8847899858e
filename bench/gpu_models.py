"""Rows of the GPU bench that are no single op: training steps of a whole model, and a predictor from context to ids."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlvm
from fastlvm.ops.dispatch import PIN
from gpu_case import Target
from gpu_timing import Device, release

DIM, CONTEXT, TEMPERATURE = 768, 5, 0.07
PREDECESSOR = 198.0  # windows a second
MODEL, SMALL = {"d_model": 768, "n_layers": 8, "d_state": 128}, {"d_model": 16, "n_layers": 1, "d_state": 4}
K = 50
REFERENCE_FP32, REFERENCE_BF16 = "reference, fp32", "reference, bf16 autocast"
FP32, BF16 = "fastlvm, fp32", "fastlvm, bf16 autocast"


@contextlib.contextmanager
def pinned(backend: str) -> Iterator[None]:
    """`FASTLVM_BACKEND` meanwhile."""
    before = os.environ.get(PIN)
    os.environ[PIN] = backend
    try:
        yield
    finally:
        os.environ.pop(PIN, None)
        if before is not None:
            os.environ[PIN] = before


class Training:
    """Steps of Mamba-S from one start: forward, InfoNCE over the batch, backward, clipping, AdamW."""

    def __init__(self, backend: str, device: str, batch: int, autocast: bool, sizes: dict[str, int]) -> None:
        torch.manual_seed(0)
        self.backend, self.device, self.autocast = backend, device, autocast
        self.model = fastlvm.models.create("mamba-s", vector_dim=DIM, **sizes).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=device == "cuda")
        rows = F.normalize(torch.randn(batch, CONTEXT + 1, DIM, device=device), dim=-1)
        self.context, self.target = rows[:, :-1].contiguous(), rows[:, -1].contiguous()

    def step(self) -> Tensor:
        """Its loss, still on the device."""
        kind = self.device if self.device == "cpu" else "cuda"
        with pinned(self.backend):
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(kind, torch.bfloat16, enabled=self.autocast):
                predicted = self.model(self.context)
            loss = fastlvm.info_nce(F.normalize(predicted.float(), dim=-1), self.target, TEMPERATURE)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        return loss.detach()


@dataclass(frozen=True)
class TrainingRow:
    batch: int = 1024
    targets: tuple[Target, ...] = (
        Target("faster", 3, REFERENCE_BF16),
        Target("rate", 100 * PREDECESSOR),
    )

    section, id = "train", "train-mamba-s-768"

    @property
    def title(self) -> str:
        return f"training step of Mamba-S, d 768, 8 layers, N 128, batch {self.batch}, context {CONTEXT}"

    def measured(self, device: Device, given: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
        batch, sizes = self.batch, MODEL
        if not device.gpu:
            batch, sizes = 4, SMALL
        kinds = {BF16: (given.backend, True), FP32: (given.backend, False)}
        kinds |= {REFERENCE_BF16: ("reference", True), REFERENCE_FP32: ("reference", False)}
        found: list[dict[str, Any]] = []
        going: dict[str, Training] = {}
        for name, (backend, autocast) in kinds.items():
            entry: dict[str, Any] = {"name": name}
            found.append(entry)
            try:
                began = time.perf_counter()
                training = Training(backend, device.name, batch, autocast, sizes)
                entry["loss"] = float(training.step())
                for _ in range(4):
                    training.step()
                device.synchronize()
                entry["first_s"] = time.perf_counter() - began
                going[name] = training
            except Exception as error:
                entry["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                device.synchronize()
        seconds: dict[str, list[float]] = {name: [] for name in going}
        for _ in range(25 if device.gpu else 2):
            for name, training in going.items():
                device.synchronize()
                before = time.perf_counter()
                for _ in range(2):
                    training.step()
                device.synchronize()
                seconds[name].append((time.perf_counter() - before) / 2)
        for entry in found:
            if entry["name"] in seconds:
                p10, p50, p90 = np.percentile(seconds[entry["name"]], [10, 50, 90])
                entry |= {"median_us": 1e6 * p50, "p10_us": 1e6 * p10, "p90_us": 1e6 * p90, "per_s": batch / p50}
                entry |= {"launches": 2 * len(seconds[entry["name"]]), "how": "host clock, two steps a round"}
        going.clear()
        release()
        targets = [vars(target) | {"text": target.text} for target in self.targets]
        unit = {"unit": "windows", "ours": BF16}
        return {
            "id": self.id,
            "section": self.section,
            "title": self.title,
            "contenders": found,
            "targets": targets,
            **unit,
        }


@dataclass(frozen=True)
class PredictorRow:
    """One context a call, from host memory to ids in host memory, over an exact fp16 payload on the GPU."""

    rows: int = 584_545
    targets: tuple[Target, ...] = (Target("p95", 0.6),)

    section, id = "predictor", "predictor-mamba-s-768"

    @property
    def title(self) -> str:
        return f'Predictor(device="cuda"), Mamba-S d 768, {self.rows:,} × {DIM} fp16 exact, batch 1, 50 ids'

    def measured(self, device: Device, given: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
        rows, calls, checked, sizes = (self.rows, 2000, 32, MODEL) if device.gpu else (60, 1, 1, SMALL)
        torch.manual_seed(0)
        model = fastlvm.models.create("mamba-s", vector_dim=DIM, **sizes).eval()
        vectors = torch.cat([_unit(part, device.name).half() for part in _parts(rows)])
        contexts = _unit(256 * CONTEXT, "cpu").reshape(256, CONTEXT, DIM)
        found: list[dict[str, Any]] = []
        truth: list[set[int]] = []
        for name, make in SEARCHES.items():
            entry: dict[str, Any] = {"name": name}
            found.append(entry)
            try:
                began = time.perf_counter()
                search, inputs = make(model, vectors, contexts, device.name)
                answers = [set(np.asarray(search(context)).tolist()) for context in inputs[:checked]]
                entry["first_s"] = time.perf_counter() - began
                if not truth and hasattr(search, "predict"):
                    truth = _truth(search, vectors, contexts[:checked])
                if truth:
                    entry["recall"] = float(np.mean([len(a & b) / K for a, b in zip(answers, truth, strict=True)]))
                entry |= _consecutive(search, inputs, calls if name != EAGER else -(-calls // 10))
            except Exception as error:
                entry["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                device.synchronize()
        size = 2.0 * rows * DIM + 2.0 * sum(parameter.numel() for parameter in model.parameters())
        memory = 1e6 * size / limits["bytes_per_s"]
        targets = [vars(target) | {"text": target.text} for target in self.targets]
        row = {"id": self.id, "section": self.section, "title": self.title, "contenders": found, "targets": targets}
        return row | {"bound": {"memory_us": memory, "us": memory, "megabytes": size / 1e6}}


Search = Callable[[Any], Any]  # of one context [5, 768], the ids of its 50 nearest rows


def _ours(model: Any, vectors: Tensor, contexts: Tensor, device: str) -> tuple[Search, list[Any]]:
    from fastlvm.predictor.cuda import CudaPredictor

    predictor = CudaPredictor.from_model(model, vectors, device=device)

    def search(context: Any) -> Any:
        return predictor.search(context, k=K).ids

    search.predict = predictor.predict  # type: ignore[attr-defined]
    return search, list(contexts.numpy())


def _ours_on_device(model: Any, vectors: Tensor, contexts: Tensor, device: str) -> tuple[Search, list[Any]]:
    search, _ = _ours(model, vectors, contexts, device)
    return search, list(contexts.to(device))


def _eager(model: Any, vectors: Tensor, contexts: Tensor, device: str) -> tuple[Search, list[Any]]:
    """The model op by op with the references, a product and top-k."""
    model = model.to(device)
    kind = torch.device(device).type

    @torch.inference_mode()
    def search(context: np.ndarray) -> np.ndarray:
        with pinned("reference"), torch.autocast(kind, torch.bfloat16):
            predicted = model(torch.from_numpy(context)[None].to(device))
        nearest = (vectors @ F.normalize(predicted.float(), dim=-1)[0].half()).topk(K).indices
        return nearest.cpu().numpy()

    return search, list(contexts.numpy())


EAGER = "PyTorch, op by op"
SEARCHES: dict[str, Callable[..., tuple[Search, list[Any]]]] = {
    "fastlvm": _ours,
    "fastlvm, context on the device": _ours_on_device,
    EAGER: _eager,
}


def _truth(search: Any, vectors: Tensor, contexts: Tensor) -> list[set[int]]:
    """By products in float32 with what fastlvm itself predicts."""
    predicted = torch.from_numpy(np.stack([search.predict(context) for context in contexts.numpy()]))
    scores = torch.cat([predicted.to(vectors.device) @ part.float().T for part in vectors.split(1 << 16)], dim=1)
    return [set(ids) for ids in scores.topk(K, dim=1).indices.tolist()]


def _consecutive(search: Search, inputs: list[Any], calls: int) -> dict[str, Any]:
    for context in inputs[: calls // 50]:
        search(context)
    seconds = []
    for number in range(calls):
        context = inputs[number % len(inputs)]
        before = time.perf_counter()
        search(context)
        seconds.append(time.perf_counter() - before)
    found = dict(zip((10, 50, 90, 95, 99), np.percentile(seconds, (10, 50, 90, 95, 99)) * 1e6, strict=True))
    figures: dict[str, Any] = {f"p{rank}_us": float(value) for rank, value in found.items() if rank != 50}
    return {"median_us": float(found[50]), **figures, "launches": calls, "how": "host clock, consecutive calls"}


def _unit(rows: int, device: str) -> Tensor:
    return F.normalize(torch.randn(rows, DIM, device=device), dim=1)


def _parts(rows: int, most: int = 1 << 16) -> list[int]:
    return [min(most, rows - start) for start in range(0, rows, most)]


ROWS: list[Any] = [TrainingRow(), PredictorRow()]
