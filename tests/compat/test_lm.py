"""MambaLMHeadModel and MixerModel: how they start, what they hand to their layers, what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastlvm.compat.mamba_ssm import MambaConfig, MambaLMHeadModel, MixerModel, create_block
from fastlvm.errors import InputError

VOCABULARY, DIM, LAYERS = 61, 32, 4
MAMBA2 = {"layer": "Mamba2", "headdim": 8, "d_state": 16}
each_kind = pytest.mark.parametrize("ssm_cfg", [{}, MAMBA2], ids=["Mamba", "Mamba2"])


def _model(ssm_cfg=None, initializer_cfg=None, **options):
    torch.manual_seed(0)
    sizes = {"d_model": DIM, "n_layer": LAYERS, "vocab_size": VOCABULARY}
    return MambaLMHeadModel(MambaConfig(**sizes, ssm_cfg=ssm_cfg or {}, **options), initializer_cfg)


def _tokens(batch=2, length=9):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def test_the_defaults_of_a_config():
    config = MambaConfig()
    assert (config.d_model, config.d_intermediate, config.n_layer, config.vocab_size) == (2560, 0, 64, 50277)
    assert (config.ssm_cfg, config.attn_layer_idx, config.attn_cfg) == ({}, [], {})
    assert config.rms_norm and config.residual_in_fp32 and config.fused_add_norm and config.tie_embeddings
    assert config.pad_vocab_size_multiple == 8
    assert MambaConfig().ssm_cfg is not config.ssm_cfg


@pytest.mark.parametrize("multiple, rows", [(1, 61), (8, 64), (61, 61), (100, 100)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_is_padded_and_the_head_tied(multiple, rows, tied):
    model = _model(pad_vocab_size_multiple=multiple, tie_embeddings=tied)
    assert (model.lm_head.weight is model.backbone.embedding.weight) == tied
    assert model.backbone.embedding.weight.shape == model.lm_head.weight.shape == (rows, DIM)
    assert model(_tokens()).logits.shape == (2, 9, rows)


@each_kind
def test_what_adds_to_the_residual_stream_starts_smaller(ssm_cfg):
    """As nn.Linear starts, over the square root of the layers."""
    for rescaled, factor in ((True, LAYERS**-0.5), (False, 1.0)):
        model = _model(ssm_cfg, {"rescale_prenorm_residual": rescaled}, d_intermediate=128)
        for layer in model.backbone.layers:
            for weight in (layer.mixer.out_proj.weight, layer.mlp.fc2.weight):
                bound = factor * weight.shape[1] ** -0.5
                assert 0.95 * bound < weight.abs().max() <= bound
            assert layer.mixer.in_proj.weight.abs().max() > 0.95 * DIM**-0.5


@each_kind
def test_the_embedding_starts_normal_and_biases_at_zero_but_those_of_the_step_sizes(ssm_cfg):
    model = _model({**ssm_cfg, "bias": True})
    assert math.isclose(model.backbone.embedding.weight.std().item(), 0.02, rel_tol=0.05)
    wide = _model(initializer_cfg={"initializer_range": 0.5})
    assert math.isclose(wide.backbone.embedding.weight.std().item(), 0.5, rel_tol=0.05)
    for layer in model.backbone.layers:
        assert not layer.mixer.in_proj.bias.any() and not layer.mixer.out_proj.bias.any()
        biases = layer.mixer.dt_bias if ssm_cfg else layer.mixer.dt_proj.bias
        steps = nn.functional.softplus(biases)
        assert 0.00099 < steps.min() < steps.max() < 0.101


def test_a_seed_gives_the_same_model():
    first, second = _model().state_dict(), _model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@each_kind
@torch.no_grad()
def test_logits_of_the_last_tokens(ssm_cfg):
    model, tokens = _model(ssm_cfg), _tokens()
    logits = model(tokens).logits
    (last,) = model(tokens, position_ids=torch.zeros(2, 9), num_last_tokens=3)
    torch.testing.assert_close(last, logits[:, -3:])
    torch.testing.assert_close(model.lm_head(model.backbone(tokens)), logits)


@each_kind
def test_the_states_of_every_layer_are_allocated(ssm_cfg):
    model = _model(ssm_cfg)
    shapes = [(3, 64 + 32, 4), (3, 8, 8, 16)] if ssm_cfg else [(3, 64, 4), (3, 64, 16)]
    for holder in (model, model.backbone):
        states = holder.allocate_inference_cache(3, 20, dtype=torch.bfloat16)
        assert list(states) == list(range(LAYERS))
        for both in states.values():
            assert [tuple(state.shape) for state in both] == shapes
            assert {state.dtype for state in both} == {torch.bfloat16}


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_every_layer_keeps_and_norms_the_residual_stream_as_the_config_says(wide, fused):
    """Fused, the sum is normed as it is; else it is rounded to the weights' dtype first."""
    model = _model(residual_in_fp32=wide, fused_add_norm=fused).bfloat16()
    sums, rounded = [], []
    for layer in model.backbone.layers:
        layer.register_forward_hook(lambda layer, given, out: sums.append(out[1].dtype))
        layer.norm.register_forward_pre_hook(lambda norm, given: rounded.append(given[0].dtype))
    model.backbone.norm_f.register_forward_pre_hook(lambda norm, given: rounded.append(given[0].dtype))
    model(_tokens())
    assert sums == LAYERS * [torch.float32 if wide else torch.bfloat16]
    assert rounded == ([] if fused else (LAYERS + 1) * [torch.bfloat16])


@torch.no_grad()
def test_packed_sequences_reach_every_layer():
    model, tokens = _model(MAMBA2).double(), _tokens(1)
    rows = torch.tensor([[0] * 4 + [1] * 5], dtype=torch.int32)
    logits = model(tokens, seq_idx=rows).logits
    torch.testing.assert_close(logits[:, :4], model(tokens[:, :4]).logits)
    torch.testing.assert_close(logits[:, 4:], model(tokens[:, 4:]).logits)


@each_kind
@pytest.mark.parametrize("options", [{}, {"d_intermediate": 64, "rms_norm": False}], ids=str)
def test_every_parameter_has_a_gradient(ssm_cfg, options):
    model, tokens = _model(ssm_cfg, tie_embeddings=False, **options), _tokens()
    logits = model(tokens).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@each_kind
@torch.no_grad()
def test_a_model_in_bfloat16(ssm_cfg):
    config = MambaConfig(d_model=DIM, n_layer=2, vocab_size=VOCABULARY, ssm_cfg=ssm_cfg)
    model = MambaLMHeadModel(config, device="cpu", dtype=torch.bfloat16)
    assert model.backbone.layers[0].mixer.D.dtype == torch.float32
    logits = model(_tokens()).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert model.generate(_tokens(), 12).shape == (2, 12)


REFUSED = [
    ({"attn_layer_idx": [1, 3]}, r"attn_layer_idx is \[1, 3\]; fastlvm has no attention layers"),
    ({"ssm_cfg": {"layer": "Mamba3"}}, 'layer of ssm_cfg is \'Mamba3\'; fastlvm has "Mamba1" and "Mamba2"'),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=["attention", "Mamba-3"])
def test_layers_that_are_not_here(options, message):
    with pytest.raises(InputError, match=message) as caught:
        _model(**options)
    assert isinstance(caught.value, NotImplementedError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["headdim", "d_model", "device", "layers"])
def test_an_argument_that_the_mixer_has_not(name):
    with pytest.raises(InputError, match=f"ssm_cfg has '{name}'; Mamba takes d_state, d_conv"):
        create_block(DIM, 0, {"layer": "Mamba1", name: 8})


def test_a_config_is_left_as_it_is():
    model = _model(MAMBA2)
    assert model.config.ssm_cfg == {"layer": "Mamba2", "headdim": 8, "d_state": 16}


def test_a_backbone_alone():
    model = MixerModel(DIM, 2, 0, VOCABULARY, rms_norm=True)
    assert model(_tokens()).shape == (2, 9, DIM)
    assert [layer.layer_idx for layer in model.layers] == [0, 1]
