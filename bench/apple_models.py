"""Rows of whole models: a training step of Mamba-S, and mlx-lm's Mamba with and without fastlvm."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np

import fastlvm
from apple_cases import TEMPERATURE
from apple_check import chosen, wide
from apple_rivals import scan_loop, torch_device
from apple_timing import CPU, LOOP, MLX_LM, OURS, PATCHED, TORCH, Contender, reasons, rounds, verdict
from fastlvm.compat import patch_mlx_lm
from fastlvm.models import mlx as models

_RATE = 1e-4
_LOSS_APART = 1e-3  # of two contenders' first steps, in float32
_LOGITS_APART = {"float32": 1e-4, "bfloat16": 1e-1}  # norm-wise, of the patched model from its own


# --- a training step


@contextlib.contextmanager
def scanning(module: str, scan: Callable[..., Any]) -> Iterator[None]:
    """What the Mamba blocks of a module call for a scan meanwhile."""
    owner: Any = importlib.import_module(module)
    kept, owner.ssm_scan = owner.ssm_scan, scan
    try:
        yield
    finally:
        owner.ssm_scan = kept


@dataclass(frozen=True)
class Training:
    """Windows of 5 context vectors and their target; the loss is InfoNCE over the batch, the optimizer AdamW."""

    batch: int = 256
    dim: int = 768
    layers: int = 8
    state: int = 128
    context: int = 5

    section = "train"

    @property
    def id(self) -> str:
        return f"bench-train-mamba-s-{self.batch}-{self.dim}-{self.layers}-{self.state}"

    @property
    def title(self) -> str:
        return f"training step of Mamba-S, {self.batch} windows of {self.context} x {self.dim}, {self.layers} layers"

    def small(self) -> Training:
        return Training(batch=8, dim=32, layers=2, state=16)

    def vectors(self, seed: int) -> Any:
        x = np.random.default_rng(seed).standard_normal((self.batch, self.context + 1, self.dim), np.float32)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def measured(self, seconds: float, bytes_per_s: float) -> dict[str, Any]:
        found: list[dict[str, Any]] = []
        ready: list[Contender] = []
        for name, make in ((OURS, self._ours), (CPU, self._on_cpu), (LOOP, self._loop), (TORCH, self._torch)):
            entry: dict[str, Any] = {"name": name}
            found.append(entry)
            with reasons(entry):
                one = make()
                with one.around():
                    entry["loss"] = self.loss(one)
                one.prepare(seconds)
                ready.append(one)
        rounds(ready, found)
        ours = found[0].get("loss")
        apart = [abs(ours - one["loss"]) for one in found if "loss" in one] if ours is not None else [0.0]
        error = float(np.max(apart))  # its own is among them: NaN where it is not finite
        if not error <= _LOSS_APART:
            found[0] |= {"wrong": True, "error": error if math.isfinite(error) else None}
            found[0] |= {"tolerance": _LOSS_APART, "error_of": "loss, from the others'"}
        for one in found:
            if "loss" in one and not math.isfinite(one["loss"]):
                one["loss"] = None  # JSON has no NaN
        row = {"id": self.id, "kind": "bench", "title": self.title, "dtype": "float32", "windows": self.batch}
        return row | {"backend": self._backend(), "ok": verdict(found[0]), "contenders": found}

    def loss(self, one: Contender) -> float:
        """Of a first step; weights and windows are the same for all."""
        found = one.call(one.sets[0])
        one.wait(found)
        return float(found[0].item())

    def _backend(self) -> str:
        u, B, inner = mx.zeros((1, 2 * self.dim, 5)), mx.zeros((1, self.state, 5)), 2 * self.dim
        return chosen("ssm_scan", {"u": u, "delta": u, "A": -mx.ones((inner, self.state)), "B": B, "C": B})

    def _model(self) -> Any:
        """Its head stands alone: one that corrects a mixture starts at zero, and the loss knows of no scan then."""
        mx.random.seed(0)
        sizes = {"vector_dim": self.dim, "d_model": self.dim, "n_layers": self.layers, "d_state": self.state}
        model = models.create("mamba-s", residual=False, dropout=0.0, **sizes)
        mx.eval(model.parameters())
        return model

    def _ours(self, name: str = OURS) -> Contender:
        model, optimizer = self._model(), optimizers.AdamW(_RATE)

        def loss_of(given: Any) -> Any:
            return fastlvm.info_nce(model(given[:, :-1]), given[:, -1], TEMPERATURE)

        both = nn.value_and_grad(model, loss_of)

        def call(given: Any) -> list[Any]:
            loss, grads = both(given)
            optimizer.update(model, grads)
            return [loss, model.parameters(), optimizer.state]

        return Contender(name, [mx.array(self.vectors(seed)) for seed in range(2)], call)

    def _on_cpu(self) -> Contender:
        one = self._ours(CPU)
        one.around = lambda: mx.stream(mx.cpu)
        return one

    def _loop(self) -> Contender:
        def scan(*args: Any, delta_softplus: bool) -> Any:
            return scan_loop(*args)[0]

        one = self._ours(LOOP)
        one.around = lambda: scanning("fastlvm.models.mlx.ssm", scan)
        return one

    def _torch(self) -> Contender:
        torch, device, synchronize = torch_device()
        twin, mine = importlib.import_module("fastlvm.models"), self._model()
        model = twin.create(mine.config).to(device).train()
        model.load_state_dict({name: torch.from_numpy(x) for name, x in models.weights(mine).items()})
        optimizer = torch.optim.AdamW(model.parameters(), _RATE, weight_decay=0.01)

        def call(given: Any) -> list[Any]:
            optimizer.zero_grad(set_to_none=True)
            loss = fastlvm.info_nce(model(given[:, :-1]), given[:, -1], TEMPERATURE)
            loss.backward()
            optimizer.step()
            return [loss.detach()]

        sets = [torch.from_numpy(self.vectors(seed)).to(device) for seed in range(2)]
        scan = functools.partial(fastlvm.ssm_scan, backend="reference")
        return Contender(TORCH, sets, call, lambda _: synchronize(), lambda: scanning("fastlvm.models.ssm", scan))


# --- mlx-lm


@dataclass(frozen=True)
class LanguageModel:
    """mlx-lm's Mamba of the 130M config with random weights: `length` tokens at once, or one token after them."""

    decode: bool
    dtype: str = "float32"
    hidden: int = 768
    layers: int = 24
    vocabulary: int = 50280
    length: int = 512

    section = "mlx-lm"

    @property
    def id(self) -> str:
        return f"bench-mlx-lm-{'decode' if self.decode else 'prefill'}-{self.length}-{self.dtype}"

    @property
    def title(self) -> str:
        what = f"a token after {self.length}" if self.decode else f"prefill of {self.length} tokens"
        return f"mlx-lm Mamba 130M, {what}, {self.dtype}"

    def small(self) -> LanguageModel:
        return LanguageModel(self.decode, self.dtype, hidden=32, layers=2, vocabulary=100, length=12)

    def model(self) -> Any:
        mamba = importlib.import_module("mlx_lm.models.mamba")
        sizes = {"hidden_size": self.hidden, "intermediate_size": 2 * self.hidden, "state_size": 16, "conv_kernel": 4}
        kinds = {"model_type": "mamba", "use_bias": False, "use_conv_bias": True}
        args = mamba.ModelArgs(
            **kinds, **sizes, vocab_size=self.vocabulary, num_hidden_layers=self.layers,
            time_step_rank=math.ceil(self.hidden / 16)
        )  # fmt: skip
        mx.random.seed(0)
        model = mamba.Model(args)
        model.set_dtype(getattr(mx, self.dtype))
        mx.eval(model.parameters())
        return model

    def measured(self, seconds: float, bytes_per_s: float) -> dict[str, Any]:
        row: dict[str, Any] = {"id": self.id, "kind": "bench", "title": self.title, "dtype": self.dtype}
        found: list[dict[str, Any]] = [{"name": PATCHED}, {"name": MLX_LM}]
        ready: list[Contender] = []
        logits: dict[str, Any] = {}
        for entry in found:
            with reasons(entry):
                one = self._contender(entry["name"], self.model())
                with one.around():
                    logits[one.name] = wide(one.call(one.sets[0])[0])
                one.prepare(seconds)
                ready.append(one)
        rounds(ready, found)
        if len(logits) == 2:
            size = np.linalg.norm(logits[MLX_LM])
            error = float(np.linalg.norm(logits[PATCHED] - logits[MLX_LM]) / size)
            found[0] |= {"error": error, "tolerance": _LOGITS_APART[self.dtype], "error_of": "logits, from mlx-lm's"}
            if not error <= _LOGITS_APART[self.dtype]:
                found[0] |= {"wrong": True, "error": error if math.isfinite(error) else None}
        return row | {"ok": verdict(found[0]), "contenders": found}

    def _contender(self, name: str, model: Any) -> Contender:
        rng = np.random.default_rng(0)
        prompts = [mx.array(rng.integers(0, self.vocabulary, (1, self.length))) for _ in range(3)]
        around = _patched if name == PATCHED else contextlib.nullcontext
        if not self.decode:
            return Contender(name, prompts, lambda ids: [model(ids, model.make_cache())[:, -1]], around=around)
        cache = model.make_cache()
        with around():
            mx.eval(model(prompts[0], cache), [one.state for one in cache])

        def call(ids: Any) -> list[Any]:
            return [model(ids, cache)[:, -1], *(one.state for one in cache)]

        return Contender(name, [ids[:, :1] for ids in prompts], call, around=around)


def _patched() -> Any:
    return patch_mlx_lm("mamba", strict=True)


def rows() -> Iterator[Training | LanguageModel]:
    yield Training()
    for dtype in ("float32", "bfloat16"):
        yield LanguageModel(decode=False, dtype=dtype)
        yield LanguageModel(decode=True, dtype=dtype)
