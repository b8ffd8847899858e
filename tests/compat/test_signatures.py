"""Names, order, kinds and defaults of arguments are those of the originals."""

from __future__ import annotations

import inspect
import math

import pytest
from torch import nn

from fastlvm.compat import causal_conv1d, mamba_ssm

REQUIRED = inspect.Parameter.empty
INF = math.inf
SCAN = [("u", REQUIRED), ("delta", REQUIRED), ("A", REQUIRED), ("B", REQUIRED), ("C", REQUIRED), ("D", None)]
SCAN += [("z", None), ("delta_bias", None), ("delta_softplus", False), ("return_last_state", False)]
INNER = ["xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight", "out_proj_weight", "out_proj_bias"]
INNER = [(name, REQUIRED) for name in [*INNER, "A"]]
INNER += [(name, None) for name in ("B", "C", "D", "delta_bias", "B_proj_bias", "C_proj_bias")]
INNER += [("delta_softplus", True)]
NORM = [("x", REQUIRED), ("weight", REQUIRED), ("bias", REQUIRED), ("residual", None), ("x1", None), ("weight1", None)]
NORM += [("bias1", None), ("eps", 1e-6), ("dropout_p", 0.0), ("rowscale", None), ("prenorm", False)]
NORM += [("residual_in_fp32", False)]
LAYERS = [("ssm_cfg", None), ("attn_layer_idx", None), ("attn_cfg", None), ("norm_epsilon", 1e-5), ("rms_norm", False)]
FACTORY = [("device", None), ("dtype", None)]
GATED_NORM = [("x", REQUIRED), ("weight", REQUIRED), ("bias", REQUIRED), ("z", None), ("eps", 1e-6)]
GATED_NORM += [("group_size", None), ("norm_before_gate", True)]
GATED = [("hidden_size", REQUIRED), ("eps", 1e-5), ("group_size", None), ("norm_before_gate", True), *FACTORY]
CHOICE = [("top_k", 1), ("top_p", 0.0), ("min_p", 0.0), ("temperature", 1.0)]
DECODE = [*CHOICE, ("repetition_penalty", 1.0), ("eos_token_id", None), ("teacher_outputs", None)]
DECODE += [("vocab_size", None), ("cg", False), ("enable_timing", False), ("output_scores", False), ("streamer", None)]
FUNCTIONS = {
    mamba_ssm.selective_scan_fn: SCAN,
    mamba_ssm.selective_scan_ref: SCAN,
    mamba_ssm.mamba_inner_fn: [
        *INNER,
        ("checkpoint_lvl", 1),
        ("b_rms_weight", None),
        ("c_rms_weight", None),
        ("dt_rms_weight", None),
        ("b_c_dt_rms_eps", 1e-6),
    ],
    mamba_ssm.mamba_inner_ref: INNER,
    mamba_ssm.selective_state_update: [
        *[(name, REQUIRED) for name in ("state", "x", "dt", "A", "B", "C")],
        ("D", None),
        ("z", None),
        ("dt_bias", None),
        ("dt_softplus", False),
        ("state_batch_indices", None),
    ],
    mamba_ssm.mamba_chunk_scan_combined: [
        *[(name, REQUIRED) for name in ("x", "dt", "A", "B", "C", "chunk_size")],
        *[(name, None) for name in ("D", "z", "dt_bias", "initial_states", "seq_idx", "cu_seqlens")],
        ("dt_softplus", False),
        ("dt_limit", (0.0, INF)),
        ("return_final_states", False),
        ("return_varlen_states", False),
        ("state_dtype", None),
    ],
    mamba_ssm.mamba_split_conv1d_scan_combined: [
        *[(name, REQUIRED) for name in ("zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A", "D", "chunk_size")],
        ("initial_states", None),
        ("seq_idx", None),
        ("dt_limit", (0.0, INF)),
        ("return_final_states", False),
        ("activation", "silu"),
        ("rmsnorm_weight", None),
        ("rmsnorm_eps", 1e-6),
        ("outproj_weight", None),
        ("outproj_bias", None),
        ("headdim", None),
        ("ngroups", 1),
        ("norm_before_gate", True),
    ],
    mamba_ssm.layer_norm_fn: [*NORM, ("is_rms_norm", False), ("return_dropout_mask", False)],
    mamba_ssm.rms_norm_fn: [*NORM, ("return_dropout_mask", False)],
    mamba_ssm.layernorm_fn: [*GATED_NORM, ("is_rms_norm", False)],
    mamba_ssm.rmsnorm_fn: GATED_NORM,
    mamba_ssm.RMSNorm: [
        ("hidden_size", REQUIRED),
        ("eps", 1e-5),
        ("dropout_p", 0.0),
        ("device", None),
        ("dtype", None),
    ],
    mamba_ssm.RMSNorm.forward: [
        ("self", REQUIRED),
        ("x", REQUIRED),
        ("residual", None),
        ("prenorm", False),
        ("residual_in_fp32", False),
    ],
    mamba_ssm.LayerNormGated: GATED,
    mamba_ssm.LayerNormGated.forward: [("self", REQUIRED), ("x", REQUIRED), ("z", None)],
    mamba_ssm.RMSNormGated: GATED,
    mamba_ssm.RMSNormGated.forward: [("self", REQUIRED), ("x", REQUIRED), ("z", None)],
    mamba_ssm.Mamba: [
        ("d_model", REQUIRED),
        ("d_state", 16),
        ("d_conv", 4),
        ("expand", 2),
        ("dt_rank", "auto"),
        ("dt_min", 0.001),
        ("dt_max", 0.1),
        ("dt_init", "random"),
        ("dt_scale", 1.0),
        ("dt_init_floor", 1e-4),
        ("conv_bias", True),
        ("bias", False),
        ("use_fast_path", True),
        ("layer_idx", None),
        ("device", None),
        ("dtype", None),
    ],
    mamba_ssm.Mamba.forward: [("self", REQUIRED), ("hidden_states", REQUIRED), ("inference_params", None)],
    mamba_ssm.Mamba2: [
        ("d_model", REQUIRED),
        ("d_state", 128),
        ("d_conv", 4),
        ("conv_init", None),
        ("expand", 2),
        ("headdim", 64),
        ("d_ssm", None),
        ("ngroups", 1),
        ("A_init_range", (1, 16)),
        ("D_has_hdim", False),
        ("rmsnorm", True),
        ("norm_before_gate", False),
        ("dt_min", 0.001),
        ("dt_max", 0.1),
        ("dt_init_floor", 1e-4),
        ("dt_limit", (0.0, INF)),
        ("bias", False),
        ("conv_bias", True),
        ("chunk_size", 256),
        ("use_mem_eff_path", True),
        ("layer_idx", None),
        ("process_group", None),
        ("sequence_parallel", True),
        ("device", None),
        ("dtype", None),
    ],
    mamba_ssm.Mamba2.forward: [
        ("self", REQUIRED),
        ("u", REQUIRED),
        ("seqlen", None),
        ("seq_idx", None),
        ("cu_seqlens", None),
        ("inference_params", None),
    ],
    mamba_ssm.Block: [
        ("dim", REQUIRED),
        ("mixer_cls", REQUIRED),
        ("mlp_cls", REQUIRED),
        ("norm_cls", nn.LayerNorm),
        ("fused_add_norm", False),
        ("residual_in_fp32", False),
    ],
    mamba_ssm.GatedMLP: [
        ("in_features", REQUIRED),
        ("hidden_features", None),
        ("out_features", None),
        ("activation", nn.functional.silu),
        ("bias", False),
        ("multiple_of", 128),
        *FACTORY,
    ],
    mamba_ssm.create_block: [
        ("d_model", REQUIRED),
        ("d_intermediate", REQUIRED),
        *LAYERS,
        ("residual_in_fp32", False),
        ("fused_add_norm", False),
        ("layer_idx", None),
        *FACTORY,
    ],
    mamba_ssm.MixerModel: [
        *[(name, REQUIRED) for name in ("d_model", "n_layer", "d_intermediate", "vocab_size")],
        *LAYERS,
        ("initializer_cfg", None),
        ("fused_add_norm", False),
        ("residual_in_fp32", False),
        *FACTORY,
    ],
    mamba_ssm.MambaLMHeadModel: [("config", REQUIRED), ("initializer_cfg", None), *FACTORY],
    mamba_ssm.MambaLMHeadModel.save_pretrained: [("self", REQUIRED), ("save_directory", REQUIRED)],
    mamba_ssm.load_config_hf: [("model_name", REQUIRED)],
    mamba_ssm.load_state_dict_hf: [("model_name", REQUIRED), *FACTORY],
    mamba_ssm.sample: [("logits", REQUIRED), *CHOICE],
    mamba_ssm.decode: [("input_ids", REQUIRED), ("model", REQUIRED), ("max_length", REQUIRED), *DECODE],
    mamba_ssm.modify_logits_for_top_k_filtering: [("logits", REQUIRED), ("top_k", REQUIRED)],
    mamba_ssm.modify_logits_for_top_p_filtering: [("logits", REQUIRED), ("top_p", REQUIRED)],
    mamba_ssm.modify_logits_for_min_p_filtering: [("logits", REQUIRED), ("min_p", REQUIRED)],
    mamba_ssm.modify_logit_for_repetition_penalty: [
        ("logits", REQUIRED),
        ("prev_output_tokens", REQUIRED),
        ("repetition_penalty", 1.0),
    ],
    causal_conv1d.causal_conv1d_fn: [
        ("x", REQUIRED),
        ("weight", REQUIRED),
        ("bias", None),
        ("seq_idx", None),
        ("initial_states", None),
        ("return_final_states", False),
        ("final_states_out", None),
        ("activation", None),
    ],
    causal_conv1d.causal_conv1d_update: [
        ("x", REQUIRED),
        ("conv_state", REQUIRED),
        ("weight", REQUIRED),
        ("bias", None),
        ("activation", None),
        ("cache_seqlens", None),
        ("conv_state_indices", None),
    ],
    causal_conv1d.causal_conv1d_varlen_states: [("x", REQUIRED), ("cu_seqlens", REQUIRED), ("state_len", REQUIRED)],
}
for kind in (mamba_ssm.Mamba, mamba_ssm.Mamba2):
    FUNCTIONS[kind.step] = [(n, REQUIRED) for n in ("self", "hidden_states", "conv_state", "ssm_state")]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__qualname__)
def test_the_signature_is_the_originals(function):
    parameters = inspect.signature(function).parameters.values()
    assert [(p.name, p.default) for p in parameters] == FUNCTIONS[function]
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


MODULES = [mamba_ssm.Mamba, mamba_ssm.Mamba2, mamba_ssm.Block, mamba_ssm.MixerModel, mamba_ssm.MambaLMHeadModel]


@pytest.mark.parametrize("kind", [*MODULES, mamba_ssm.GenerationMixin], ids=lambda k: k.__name__)
def test_caches_are_allocated_with_the_originals_arguments(kind):
    signature = inspect.signature(kind.allocate_inference_cache)
    assert str(signature.replace(return_annotation=inspect.Signature.empty)).replace("'", "") == (
        "(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any)"
    )


OPEN = {  # those that hand on what they do not know
    mamba_ssm.MixerModel.forward: [("self", REQUIRED), ("input_ids", REQUIRED), ("inference_params", None)],
    mamba_ssm.MambaLMHeadModel.forward: [
        ("self", REQUIRED),
        ("input_ids", REQUIRED),
        ("position_ids", None),
        ("inference_params", None),
        ("num_last_tokens", 0),
    ],
    mamba_ssm.MambaLMHeadModel.from_pretrained: [("pretrained_model_name", REQUIRED), *FACTORY],
    mamba_ssm.GenerationMixin.generate: [
        ("self", REQUIRED),
        ("input_ids", REQUIRED),
        ("max_length", REQUIRED),
        *CHOICE,
        ("return_dict_in_generate", False),
        ("output_scores", False),
    ],
}


@pytest.mark.parametrize("function", OPEN, ids=lambda f: f.__qualname__)
def test_the_signature_is_the_originals_and_takes_more(function):
    *parameters, rest = inspect.signature(function).parameters.values()
    assert [(p.name, p.default) for p in parameters] == OPEN[function]
    assert rest.kind == inspect.Parameter.VAR_KEYWORD


def test_the_config_has_the_originals_fields_in_their_order():
    names = list(inspect.signature(mamba_ssm.MambaConfig).parameters)
    assert names == [
        *("d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm"),
        *("residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings"),
    ]


def test_a_block_hands_its_mixer_what_it_does_not_know():
    parameters = list(inspect.signature(mamba_ssm.Block.forward).parameters.values())
    assert [p.name for p in parameters] == ["self", "hidden_states", "residual", "inference_params", "mixer_kwargs"]
    assert parameters[-1].kind == inspect.Parameter.VAR_KEYWORD
