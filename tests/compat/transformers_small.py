"""Models of transformers with a few thousand random weights each."""

from __future__ import annotations

import torch

VOCABULARY = 61

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_MAMBA = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4}
_BAMBA = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}

SMALL = {  # model -> its class, and the class and the sizes of its config
    "mamba": ("MambaForCausalLM", "MambaConfig", _MAMBA),
    "falcon_mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", _MAMBA),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_ATTENTION,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "state_size": 16,
            "chunk_size": 8,
        },
    ),
    "bamba": ("BambaForCausalLM", "BambaConfig", {**_ATTENTION, **_BAMBA, "attn_layer_indices": [1]}),
    "zamba2": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 48,
            "n_mamba_heads": 8,
            "mamba_ngroups": 2,
            "mamba_d_state": 16,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        },
    ),
    "falcon_h1": ("FalconH1ForCausalLM", "FalconH1Config", {**_ATTENTION, **_BAMBA, "mamba_d_ssm": 64}),
}


def small(transformers, model, **options):
    """A model in eval mode, the same weights at every call, none of them at a value that hides an error."""
    name, config, sizes = SMALL[model]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**{**_TOKENS, **sizes, **options})
    made = getattr(transformers, name)(config)
    with torch.no_grad():
        for x in made.parameters():
            x.add_(torch.randn_like(x) * 0.1)
    return made.eval()


def cache_of(out):
    """The cache of a model's output, under the name of the argument that takes it."""
    name = next(x for x in ("cache", "cache_params", "past_key_values") if x in out)
    return {name: out[name]}
