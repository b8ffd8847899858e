"""The language models of mamba_ssm, parameter for parameter: a stack of blocks, and it with a head."""

from __future__ import annotations

import functools
import inspect
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlvm.compat._checks import UnsupportedError
from fastlvm.compat.mamba_ssm import hf
from fastlvm.compat.mamba_ssm.block import Block, add_norm
from fastlvm.compat.mamba_ssm.config import MambaConfig
from fastlvm.compat.mamba_ssm.generation import GenerationMixin
from fastlvm.compat.mamba_ssm.mamba import Mamba
from fastlvm.compat.mamba_ssm.mamba2 import Mamba2
from fastlvm.compat.mamba_ssm.mlp import GatedMLP
from fastlvm.compat.mamba_ssm.norms import RMSNorm
from fastlvm.errors import InputError

_MIXERS: dict[str, type[nn.Module]] = {"Mamba1": Mamba, "Mamba2": Mamba2}
_OURS = ("self", "d_model", "layer_idx", "device", "dtype")  # arguments of a mixer that the model gives


class CausalLMOutput(NamedTuple):
    logits: Tensor  # [B, L, rows of the embedding]


def create_block(
    d_model: int,
    d_intermediate: int,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """One layer of a model, with a mixer of `ssm_cfg` as `MambaConfig` has it.

    Raises:
        InputError: attention, or a mixer that is not here (a NotImplementedError, too), or an argument it has not.
    """
    if attn_layer_idx:
        why = "fastlvm has no attention layers, take a model without"
        raise UnsupportedError(f"create_block: attn_layer_idx is {list(attn_layer_idx)}; {why}")
    factory = {"device": device, "dtype": dtype}
    norm = functools.partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory)
    mlp: Any = nn.Identity
    if d_intermediate != 0:
        mlp = functools.partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **factory)
    kind, options = _mixer(ssm_cfg or {})
    mixer = functools.partial(kind, layer_idx=layer_idx, **options, **factory)
    block = Block(d_model, mixer, mlp, norm, fused_add_norm, residual_in_fp32)
    block.layer_idx = layer_idx
    return block


def _mixer(ssm_cfg: dict[str, Any]) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class that `ssm_cfg` names and the rest of it, which are arguments of the class."""
    name = ssm_cfg.get("layer", "Mamba1")
    if name not in _MIXERS:
        raise UnsupportedError(f'create_block: layer of ssm_cfg is {name!r}; fastlvm has "Mamba1" and "Mamba2"')
    kind = _MIXERS[name]
    options = {key: value for key, value in ssm_cfg.items() if key != "layer"}
    known = [key for key in inspect.signature(kind).parameters if key not in _OURS]
    if unknown := sorted(options.keys() - set(known)):
        wants = f"{kind.__name__} takes {', '.join(known)}"
        raise InputError(f"create_block: ssm_cfg has {unknown[0]!r}; {wants}")
    return kind, options


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Start the weights of one module, by the scheme of GPT-2: what adds to the residual stream starts smaller."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    elif isinstance(module, nn.Linear) and module.bias is not None and not getattr(module.bias, "_no_reinit", False):
        nn.init.zeros_(module.bias)
    if not rescale_prenorm_residual:
        return
    for name in ("out_proj", "fc2"):
        last = getattr(module, name, None)
        if isinstance(last, nn.Linear):
            nn.init.kaiming_uniform_(last.weight, a=math.sqrt(5))  # as nn.Linear starts
            with torch.no_grad():
                last.weight /= math.sqrt(n_residuals_per_layer * n_layer)


class MixerModel(nn.Module):
    """Embedding, `n_layer` blocks and a norm: tokens [B, L] → [B, L, d_model].

    Arguments, parameters and their names are those of `mamba_ssm.models.mixer_seq_simple.MixerModel`, so that its
    checkpoints load. `initializer_cfg` may hold `initializer_range`, the deviation of the embedding, and
    `rescale_prenorm_residual`.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        options: dict[str, Any] = {"norm_epsilon": norm_epsilon, "rms_norm": rms_norm, **factory}
        options |= {"residual_in_fp32": residual_in_fp32, "fused_add_norm": fused_add_norm}
        layer = functools.partial(create_block, d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, **options)
        self.layers = nn.ModuleList([layer(layer_idx=i) for i in range(n_layer)])
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **factory)
        branches = 1 if d_intermediate == 0 else 2
        init = functools.partial(_init_weights, n_layer=n_layer, n_residuals_per_layer=branches)
        self.apply(functools.partial(init, **(initializer_cfg or {})))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of every layer before the first token, by its index."""
        layers: Any = enumerate(self.layers)
        return {i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs) for i, layer in layers}

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:
        """Tokens [B, L], integers → [B, L, d_model]; with `inference_params` from and into the states it holds.

        `mixer_kwargs`, such as `seq_idx` of Mamba-2, go to every mixer.
        """
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, inference_params=inference_params, **mixer_kwargs)
        return add_norm(self.norm_f, hidden_states, residual, self.fused_add_norm, self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A Mamba or Mamba-2 language model: tokens [B, L] → logits, and `generate`.

    Arguments, parameters and their names are those of `mamba_ssm.MambaLMHeadModel`, so that its checkpoints load, and
    a seed gives the weights that it gives there. `initializer_cfg` is that of `MixerModel`.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory = {"device": device, "dtype": dtype}
        rows = -(-config.vocab_size // config.pad_vocab_size_multiple) * config.pad_vocab_size_multiple
        self.backbone = MixerModel(
            config.d_model,
            config.n_layer,
            config.d_intermediate,
            rows,
            config.ssm_cfg,
            config.attn_layer_idx,
            config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            **factory,
        )
        self.lm_head = nn.Linear(config.d_model, rows, bias=False, **factory)
        # once more, without regard to the MLPs: the original draws its weights so
        self.apply(functools.partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's, where `config` says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of every layer before the first token, by its index."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Any = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Tokens [B, L], integers → `logits` [B, L, rows of the embedding].

        Args:
            input_ids: the tokens.
            position_ids: of no effect.
            inference_params: a first call takes whole prompts; those with `seqlen_offset` above 0 take one token.
            num_last_tokens: logits of that many tokens at the end only; 0 for all.
            mixer_kwargs: go to every mixer, such as `seq_idx` and `cu_seqlens` to `Mamba2`.
        """
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(self.lm_head(hidden_states))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | os.PathLike[str], device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> MambaLMHeadModel:
        """The model of a folder, or of a repository of the Hugging Face hub, with config.json and model.safetensors.

        It may also be one that transformers wrote of its Mamba or Mamba-2. What is fetched is fetched and kept by
        huggingface_hub, which has to be installed for that.

        Args:
            pretrained_model_name: the folder, or the repository, such as "state-spaces/mamba-130m-hf".
            device, dtype, kwargs: go to the model.

        Raises:
            InputError: a file is missing or cannot be read, weights are there as a pickle only, an entry of the config
                is unknown or wrong, or a tensor is missing, unknown or of another shape.
        """
        config = hf.load_config(pretrained_model_name)
        weights = hf.load_state_dict_hf(pretrained_model_name, device, dtype)
        model = cls(config, device=device, dtype=dtype, **kwargs)
        hf.check_weights(weights, model.state_dict(), config.tie_embeddings, pretrained_model_name)
        model.load_state_dict(weights)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors into a folder, which is made; those of before are replaced."""
        hf.save(self.state_dict(), self.config, save_directory)
