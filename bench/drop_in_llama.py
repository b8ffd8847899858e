"""The model of drop_in_cases.py by llama.cpp: its weights written as a GGUF file, and calls of its C interface.

`pip install llama-cpp-python gguf` builds llama.cpp, which takes many minutes: `make bench` installs neither, and times
llama.cpp where both are there.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACKAGES = ("llama_cpp_python", "gguf")
_CONTEXT = 2048
_NAMES = {
    "norm": "attn_norm",
    "mixer.in_proj": "ssm_in",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.x_proj": "ssm_x",
    "mixer.dt_proj": "ssm_dt",
    "mixer.out_proj": "ssm_out",
}


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fastlvm-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def write(net: Any) -> Path:
    """A MambaForCausalLM as GGUF: matrices in its dtype, float32 where llama.cpp wants that."""
    import gguf

    config, path = net.config, _folder() / f"{net.dtype}-{net.config.num_hidden_layers}.gguf".replace("torch.", "")
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.intermediate_size)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.time_step_rank)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, x in net.backbone.state_dict().items():
        _add(writer, name, x)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def _add(writer: Any, name: str, x: Tensor) -> None:
    import gguf

    part, _, kind = name.rpartition(".")
    if name in ("embeddings.weight", "norm_f.weight"):
        called = {"embeddings.weight": "token_embd.weight", "norm_f.weight": "output_norm.weight"}[name]
    else:
        layer, _, inner = part.removeprefix("layers.").partition(".")
        if kind == "A_log":
            called, x = f"blk.{layer}.ssm_a", -torch.exp(x.float())
        elif kind == "D":
            called = f"blk.{layer}.ssm_d"
        else:
            called = f"blk.{layer}.{_NAMES[inner]}.{kind}"
    x = x.squeeze(1) if x.ndim == 3 else x  # filters [D, 1, W]
    if x.ndim == 2 and x.dtype == torch.bfloat16 and "conv1d" not in called:
        bits = x.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(called, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(called, x.float().contiguous().numpy())


class Model:
    """A GGUF file in llama.cpp: `decode` adds tokens to the sequence and returns the last one's logits."""

    def __init__(self, path: Path) -> None:
        from llama_cpp import llama_cpp as api

        self.api = api
        self._quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = _CONTEXT, _CONTEXT, 512
        self.context = api.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot load {path}")

    def forget(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def decode(self, tokens: np.ndarray) -> Tensor:
        threads = torch.get_num_threads()
        self.api.llama_set_n_threads(self.context, threads, threads)
        held = (ctypes.c_int32 * len(tokens))(*tokens.tolist())
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(held, len(tokens))):
            raise RuntimeError("llama.cpp cannot decode")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (self.vocabulary,)).copy())

    @functools.cached_property
    def vocabulary(self) -> int:
        return int(self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model)))


_loaded: dict[int, Model] = {}


def _load(net: Any) -> Model:
    if id(net) not in _loaded:  # of the few that drop_in_cases.py keeps
        _loaded[id(net)] = Model(write(net))
    return _loaded[id(net)]


def prefill(net: Any, prompt: Tensor) -> Callable[[], Tensor]:
    loaded, tokens = _load(net), prompt[0].numpy()

    def call() -> Tensor:
        loaded.forget()
        return loaded.decode(tokens)[None, None]

    return call


def token(net: Any, prompt: Tensor) -> Callable[[], Tensor]:
    loaded, tokens = _load(net), prompt[0].numpy()
    loaded.forget()
    loaded.decode(tokens)
    return lambda: loaded.decode(tokens[:1])[None, None]
