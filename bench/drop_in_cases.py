"""MambaForCausalLM of the 130M config with random weights: prefill, a token, a training step, and who computes them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SLOW, PATCHED, MAMBAPY, LLAMA = "transformers", "transformers + fastlvm", "mambapy", "llama.cpp"
VOCABULARY, WIDTH, STATE, LAYERS, PROMPT = 50280, 768, 16, 24, 512
TIMED = {
    SLOW: "MambaForCausalLM as it is without mamba_ssm: its slow path",
    PATCHED: "the same model after fastlvm.compat.patch_transformers()",
    MAMBAPY: "the same sizes by mambapy, the head on the last token alone as in the others; its forward gives no "
    "states to go on from, so that its steps start from none",
    LLAMA: "the same weights in llama.cpp, llama_decode on as many threads",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Call = Callable[[], Any]


@dataclass(frozen=True)
class Pass:
    """What is timed: where the slow path would take minutes, one layer, with a head as small a part of it as of 24."""

    name: str
    title: str
    batch: int
    length: int
    layers: int = LAYERS
    vocabulary: int = VOCABULARY
    target: float | None = None  # how many times as quick as the slow path


PREFILL = Pass("prefill", "prefill of 512 tokens", 1, PROMPT, target=4)
TOKEN = Pass("token", "a token", 1, 1, target=1.5)
STEP = Pass(
    "training", "a training step, 2 x 512 tokens, 1 of the 24 layers", 2, PROMPT, 1, VOCABULARY // LAYERS, target=4
)
WHOLE_STEP = Pass("whole training", "a training step, 2 x 512 tokens", 2, PROMPT)
PASSES = (PREFILL, TOKEN, STEP, WHOLE_STEP)
CONTENDERS = {
    PREFILL: (PATCHED, SLOW, MAMBAPY, LLAMA),
    TOKEN: (PATCHED, SLOW, MAMBAPY, LLAMA),
    STEP: (PATCHED, SLOW, MAMBAPY),
    WHOLE_STEP: (PATCHED,),
}
LEFT_OUT = {
    (WHOLE_STEP, SLOW): "not run: a layer alone takes a minute or so",
    (WHOLE_STEP, MAMBAPY): "not run: 24 times the memory below",
}


def ids(timed: Pass, length: int | None = None) -> Tensor:
    size = timed.batch, length or timed.length
    return torch.randint(0, timed.vocabulary, size, generator=torch.Generator().manual_seed(1))


@functools.cache
def model(dtype: torch.dtype, layers: int = LAYERS, vocabulary: int = VOCABULARY) -> Any:
    """Weights of 0.02: with the config's own 0.1, rounding errors grow a thousandfold through 24 random layers."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns that the path timed here is slow
    import transformers

    torch.manual_seed(0)
    config = transformers.MambaConfig(
        hidden_size=WIDTH, num_hidden_layers=layers, state_size=STATE, vocab_size=vocabulary, initializer_range=0.02
    )
    return transformers.MambaForCausalLM(config).to(dtype)


@functools.cache
def by_mambapy(dtype: torch.dtype, layers: int = LAYERS, vocabulary: int = VOCABULARY) -> Any:
    """The same sizes; mambapy.lm itself imports mamba_ssm."""
    from mambapy.mamba import Mamba, MambaConfig, RMSNorm

    torch.manual_seed(0)
    parts = {
        "embedding": torch.nn.Embedding(vocabulary, WIDTH),
        "mamba": Mamba(MambaConfig(d_model=WIDTH, n_layers=layers, d_state=STATE)),
        "norm": RMSNorm(WIDTH),
        "head": torch.nn.Linear(WIDTH, vocabulary, bias=False),
    }
    parts["head"].weight = parts["embedding"].weight
    return torch.nn.ModuleDict(parts).to(dtype)


def patch() -> None:
    from fastlvm.compat import patch_transformers

    patch_transformers("mamba", strict=True)


def unpatch() -> None:
    from fastlvm.compat import unpatch_transformers

    unpatch_transformers("mamba")


def call_of(timed: Pass, name: str, dtype: torch.dtype) -> Call:
    """Runs the pass; the logits of the last token come back, or the loss."""
    if name == LLAMA:
        import drop_in_llama

        call = drop_in_llama.prefill if timed == PREFILL else drop_in_llama.token
        return call(model(dtype), ids(timed, PROMPT if timed == PREFILL else 8))
    if name == MAMBAPY:
        return {PREFILL: _mambapy_prefill, TOKEN: _mambapy_token}.get(timed, _mambapy_step)(timed, dtype)
    return {PREFILL: _prefill, TOKEN: _token}.get(timed, _step)(timed, dtype)


def _prefill(timed: Pass, dtype: torch.dtype) -> Call:
    net, prompt = model(dtype), ids(timed)

    def call() -> Tensor:
        with torch.no_grad():
            return net.eval()(prompt, use_cache=True, logits_to_keep=1).logits

    return call


def _token(timed: Pass, dtype: torch.dtype) -> Call:
    net, prompt = model(dtype).eval(), ids(timed, 8)
    with torch.no_grad():
        cache = net(prompt, use_cache=True).cache_params

    def call() -> Tensor:
        with torch.no_grad():
            return net(prompt[:, :1], cache_params=cache, use_cache=True).logits

    return call


def _step(timed: Pass, dtype: torch.dtype) -> Call:
    net, tokens = model(dtype, timed.layers, timed.vocabulary), ids(timed)

    def call() -> Tensor:
        net.train().zero_grad(set_to_none=True)
        loss = net(tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    return call


def _mambapy_prefill(timed: Pass, dtype: torch.dtype) -> Call:
    net, prompt = by_mambapy(dtype), ids(timed)

    def call() -> Tensor:
        with torch.no_grad():
            return net["head"](net["norm"](net["mamba"](net["embedding"](prompt))[:, -1:]))

    return call


def _mambapy_token(timed: Pass, dtype: torch.dtype) -> Call:
    net, token = by_mambapy(dtype), ids(timed)[:, 0]
    caches = [(None, torch.zeros(timed.batch, 2 * WIDTH, 3, dtype=dtype)) for _ in net["mamba"].layers]

    def call() -> Tensor:
        nonlocal caches
        with torch.no_grad():
            x, caches = net["mamba"].step(net["embedding"](token), caches)
            return net["head"](net["norm"](x))

    return call


def _mambapy_step(timed: Pass, dtype: torch.dtype) -> Call:
    net, tokens = by_mambapy(dtype, timed.layers, timed.vocabulary), ids(timed)

    def call() -> Tensor:
        net.zero_grad(set_to_none=True)
        logits = net["head"](net["norm"](net["mamba"](net["embedding"](tokens))))[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    return call
