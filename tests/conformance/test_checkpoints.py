"""A checkpoint with the names and shapes of mamba_ssm's loads strictly, and gives the logits of plain formulas."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from fastlvm.compat.mamba_ssm import Block, InferenceParams, Mamba, Mamba2, RMSNorm

from . import plain

VOCABULARY, DIM, LAYERS = 40, 16, 3
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
KINDS = {"mamba": (Mamba, MAMBA), "mamba2": (functools.partial(Mamba2, headdim=8, d_state=8, ngroups=2), MAMBA2)}
each_kind = pytest.mark.parametrize("kind", KINDS)


class Model(nn.Module):
    """Embedding, blocks, norm and head, as whoever builds on mamba_ssm stacks them."""

    def __init__(self, mixer, fused):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.embedding = nn.Embedding(VOCABULARY, DIM)
        make = functools.partial(
            Block, DIM, mlp_cls=nn.Identity, norm_cls=RMSNorm, fused_add_norm=fused, residual_in_fp32=True
        )
        blocks = [make(functools.partial(mixer, layer_idx=i)) for i in range(LAYERS)]
        self.backbone.layers = nn.ModuleList(blocks)
        self.backbone.norm_f = RMSNorm(DIM)
        self.lm_head = nn.Linear(DIM, VOCABULARY, bias=False)

    def forward(self, tokens, inference_params=None):
        hidden, residual = self.backbone.embedding(tokens), None
        for layer in self.backbone.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params)
        return self.lm_head(self.backbone.norm_f(hidden + residual))


def _checkpoint(kind, path):
    """A file as the originals' are: a state dict saved by torch, its head tied to its embedding."""
    g = torch.Generator().manual_seed(4)
    shapes = {"backbone.embedding.weight": (VOCABULARY, DIM), "backbone.norm_f.weight": (DIM,)}
    for i in range(LAYERS):
        shapes |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in KINDS[kind][1].items()}
        shapes[f"backbone.layers.{i}.norm.weight"] = (DIM,)
    weights = {name: torch.randn(shape, generator=g) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    for name in weights:
        if "norm" in name or name.endswith(".D"):
            weights[name] += 1
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    torch.save(weights, path)
    return torch.load(path, weights_only=True)


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


def _logits(kind, weights, tokens):
    weights = {name: x.double() for name, x in weights.items()}
    total = weights["backbone.embedding.weight"][tokens]
    for i in range(LAYERS):
        prefix = f"backbone.layers.{i}."
        mixer = {name.removeprefix(f"{prefix}mixer."): x for name, x in weights.items() if name.startswith(prefix)}
        normed = plain.rms(total, weights[f"{prefix}norm.weight"], 1e-5)
        total = total + {"mamba": _mamba, "mamba2": _mamba2}[kind](normed, mixer)
    return plain.rms(total, weights["backbone.norm_f.weight"], 1e-5) @ weights["lm_head.weight"].T


def _loaded(kind, fused, path):
    model, weights = Model(KINDS[kind][0], fused), _checkpoint(kind, path)
    model.load_state_dict(weights, strict=True)
    tokens = torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
    return model, tokens, _logits(kind, weights, tokens)


@each_kind
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_the_logits_of_a_checkpoint(kind, fused, tmp_path):
    model, tokens, wanted = _loaded(kind, fused, tmp_path / "pytorch_model.bin")
    plain.close(model(tokens), wanted, 1e-4, 1e-5, plain.OUR_FORWARD)


@each_kind
@torch.no_grad()
def test_the_logits_token_by_token(kind, tmp_path):
    model, tokens, wanted = _loaded(kind, True, tmp_path / "pytorch_model.bin")
    cache = InferenceParams(max_seqlen=11, max_batch_size=2)
    logits = [model(tokens[:, :4], cache)]
    for t in range(4, 11):
        cache.seqlen_offset = t
        logits.append(model(tokens[:, t : t + 1], cache))
    plain.close(torch.cat(logits, 1), wanted, 1e-4, 1e-5, plain.OUR_FORWARD)


@each_kind
def test_the_gradients_of_a_checkpoint(kind, tmp_path):
    model, tokens, _ = _loaded(kind, False, tmp_path / "pytorch_model.bin")
    weights = {name: x.detach().double().requires_grad_() for name, x in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    grads = torch.autograd.grad(model(tokens).square().sum(), list(model.parameters()))
    wanted = torch.autograd.grad(_logits(kind, weights, tokens).square().sum(), [weights[name] for name in names])
    for name, grad, want in zip(names, grads, wanted, strict=True):
        plain.close(grad, want, 1e-3, 1e-3 * want.abs().max(), plain.OUR_GRADIENT, name)
