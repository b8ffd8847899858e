"""A checkpoint with the names and shapes of mamba_ssm's loads strictly, and gives the logits of plain formulas."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from fastlvm.compat.mamba_ssm import InferenceParams, MambaConfig, MambaLMHeadModel

from . import plain

VOCABULARY, ROWS, DIM, LAYERS = 40, 48, 16, 3  # rows: the next multiple of 16
MAMBA = {
    "A_log": (32, 16),
    "D": (32,),
    "in_proj.weight": (64, 16),
    "conv1d.weight": (32, 1, 4),
    "conv1d.bias": (32,),
    "x_proj.weight": (1 + 2 * 16, 32),
    "dt_proj.weight": (32, 1),
    "dt_proj.bias": (32,),
    "out_proj.weight": (16, 32),
}
MAMBA2 = {
    "dt_bias": (4,),
    "A_log": (4,),
    "D": (4,),
    "in_proj.weight": (2 * 32 + 2 * 2 * 8 + 4, 16),
    "conv1d.weight": (32 + 2 * 2 * 8, 1, 4),
    "conv1d.bias": (32 + 2 * 2 * 8,),
    "norm.weight": (32,),
    "out_proj.weight": (16, 32),
}
MLP = {"fc1.weight": (2 * 128, 16), "fc2.weight": (16, 128)}
KINDS = {
    "mamba": (MAMBA, {}),
    "mamba2": (MAMBA2, {"layer": "Mamba2", "headdim": 8, "d_state": 8, "ngroups": 2}),
}
OPTIONS = [
    {},
    {"tie_embeddings": False},
    {"rms_norm": False},
    {"residual_in_fp32": False},
    {"fused_add_norm": False},
    {"fused_add_norm": False, "residual_in_fp32": False, "rms_norm": False, "tie_embeddings": False},
    {"d_intermediate": 100},
    {"d_intermediate": 128, "fused_add_norm": False},
]
each_kind = pytest.mark.parametrize("kind", KINDS)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def _close(got, want, options):
    """To 1e-4 and 1e-5; behind an MLP, whose logits are larger, the latter is of the greatest of them."""
    scale = max(1.0, want.abs().max().item()) if "d_intermediate" in options else 1.0
    plain.close(got, want, 1e-4, 1e-5 * scale, plain.OUR_FORWARD)


def _config(kind, options):
    sizes = {"d_model": DIM, "n_layer": LAYERS, "vocab_size": VOCABULARY, "pad_vocab_size_multiple": 16}
    return {**sizes, "ssm_cfg": KINDS[kind][1], **options}


def _checkpoint(kind, options):
    """The state dict of an original, its head tied to its embedding unless `options` say otherwise."""
    g = torch.Generator().manual_seed(4)
    norms = ("weight",) if options.get("rms_norm", True) else ("weight", "bias")
    shapes = {"backbone.embedding.weight": (ROWS, DIM)} | {f"backbone.norm_f.{part}": (DIM,) for part in norms}
    for i in range(LAYERS):
        layer = {f"mixer.{name}": shape for name, shape in KINDS[kind][0].items()}
        layer |= {f"norm.{part}": (DIM,) for part in norms}
        if "d_intermediate" in options:
            layer |= {f"mlp.{name}": shape for name, shape in MLP.items()}
            layer |= {f"norm2.{part}": (DIM,) for part in norms}
        shapes |= {f"backbone.layers.{i}.{name}": shape for name, shape in layer.items()}
    if not options.get("tie_embeddings", True):
        shapes["lm_head.weight"] = (ROWS, DIM)
    weights = {name: torch.randn(shape, generator=g) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    for name in weights:
        if name.endswith((".D", "norm.weight", "norm2.weight", "norm_f.weight")):
            weights[name] += 1
    weights.setdefault("lm_head.weight", weights["backbone.embedding.weight"])
    return weights


def _mamba(x, w):
    A = -torch.exp(w["A_log"])
    x, z = (x @ w["in_proj.weight"].T).transpose(1, 2).chunk(2, 1)
    x = plain.conv1d(x, w["conv1d.weight"][:, 0], w["conv1d.bias"], "silu")[0]
    dt, B, C = (x.transpose(1, 2) @ w["x_proj.weight"].T).split([1, 16, 16], -1)
    delta = (dt @ w["dt_proj.weight"].T).transpose(1, 2)
    y, _ = plain.selective_scan(x, delta, A, B.transpose(1, 2), C.transpose(1, 2), w["D"], z, w["dt_proj.bias"], True)
    return y.transpose(1, 2) @ w["out_proj.weight"].T


def _mamba2(x, w):
    z, xbc, dt = (x @ w["in_proj.weight"].T).split([32, 64, 4], -1)
    xbc = plain.conv1d(xbc.transpose(1, 2), w["conv1d.weight"][:, 0], w["conv1d.bias"], "silu")[0].transpose(1, 2)
    x, B, C = xbc.split([32, 16, 16], -1)
    x, B, C = x.unflatten(-1, (4, 8)), B.unflatten(-1, (2, 8)), C.unflatten(-1, (2, 8))
    y, _ = plain.ssd(x, dt, -torch.exp(w["A_log"]), B, C, w["D"], None, w["dt_bias"], None, True)
    gated = (y.flatten(2) * plain.silu(z)).unflatten(-1, (2, 16))
    return plain.rms(gated, w["norm.weight"].view(2, 16), 1e-5).flatten(2) @ w["out_proj.weight"].T


def _norm(x, weights, name):
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if bias is None:
        return plain.rms(x, weight, 1e-5)
    return plain.rms(x - x.mean(-1, keepdim=True), weight, 1e-5) + bias


def _logits(kind, weights, tokens, dtype=torch.float64):
    weights = {name: x.to(dtype) for name, x in weights.items()}
    total = weights["backbone.embedding.weight"][tokens]
    for i in range(LAYERS):
        prefix = f"backbone.layers.{i}."
        layer = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("mixer."): x for name, x in layer.items() if name.startswith("mixer.")}
        total = total + {"mamba": _mamba, "mamba2": _mamba2}[kind](_norm(total, layer, "norm"), mixer)
        if "mlp.fc1.weight" in layer:
            value, gate = (_norm(total, layer, "norm2") @ layer["mlp.fc1.weight"].T).chunk(2, -1)
            total = total + (value * plain.silu(gate)) @ layer["mlp.fc2.weight"].T
    return _norm(total, weights, "backbone.norm_f") @ weights["lm_head.weight"].T


def _loaded(kind, options):
    model, weights = MambaLMHeadModel(MambaConfig(**_config(kind, options))), _checkpoint(kind, options)
    model.load_state_dict(weights, strict=True)
    return model, weights


def _tokens():
    return torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))


@each_kind
@every_option
@torch.no_grad()
def test_the_logits_of_a_checkpoint(kind, options):
    model, weights = _loaded(kind, options)
    _close(model(_tokens()).logits, _logits(kind, weights, _tokens()), options)


@each_kind
@every_option
@torch.no_grad()
def test_the_logits_of_a_folder(kind, options, tmp_path):
    weights = _checkpoint(kind, options)
    save_file({name: x.clone() for name, x in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(_config(kind, options)))
    model = MambaLMHeadModel.from_pretrained(tmp_path)
    _close(model(_tokens()).logits, _logits(kind, weights, _tokens()), options)


@each_kind
@every_option
@torch.no_grad()
def test_the_logits_in_bfloat16_are_nearer_than_the_formulas_in_bfloat16(kind, options):
    model, _ = _loaded(kind, options)
    logits, weights = model.bfloat16()(_tokens()).logits, model.state_dict()
    wanted = _logits(kind, weights, _tokens())
    formula = _logits(kind, weights, _tokens(), torch.bfloat16)
    assert logits.dtype == torch.bfloat16
    assert (logits - wanted).norm() < (formula - wanted).norm()


@each_kind
@every_option
@torch.no_grad()
def test_the_logits_token_by_token(kind, options):
    model, weights = _loaded(kind, options)
    cache, tokens = InferenceParams(max_seqlen=11, max_batch_size=2), _tokens()
    logits = [model(tokens[:, :4], inference_params=cache).logits]
    for t in range(4, 11):
        cache.seqlen_offset = t
        logits.append(model(tokens[:, t : t + 1], inference_params=cache).logits)
    _close(torch.cat(logits, 1), _logits(kind, weights, tokens), options)


@each_kind
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[5], OPTIONS[6]], ids=str)
def test_the_gradients_of_a_checkpoint(kind, options):
    model, weights = _loaded(kind, options)
    names = [name for name, _ in model.named_parameters()]
    weights = {name: weights[name].double().requires_grad_() for name in names}
    tied = {"lm_head.weight": weights.get("lm_head.weight", weights["backbone.embedding.weight"])}
    grads = torch.autograd.grad(model(_tokens()).logits.square().sum(), list(model.parameters()))
    wanted = torch.autograd.grad(_logits(kind, weights | tied, _tokens()).square().sum(), list(weights.values()))
    for name, grad, want in zip(names, grads, wanted, strict=True):
        plain.close(grad, want, 1e-3, 1e-3 * want.abs().max(), plain.OUR_GRADIENT, name)
