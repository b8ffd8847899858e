"""The Mamba predictor in plain PyTorch, without fastlvm's own ops: what the rivals run, compile and export."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Twin(nn.Module):
    """A `MambaPredictor` with that model's own weights, for contexts of its full length.

    What does not depend on the context is computed once: A and the mixture's weights. The scan is unrolled over the
    positions, starts without a decay of the zero state, and leaves its sum over the states to a matrix product; of the
    forms tried it is the quickest one, or within the noise of it, under every rival.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.input, self.embed, self.norm, self.head = model.input, model.embed, model.norm, model.head
        self.blocks = nn.ModuleList(_Block(block) for block in model.blocks)
        with torch.no_grad():
            self.register_buffer("weights", model.mixture.weights(model.config.context)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(self.input(x))  # [n, L, d_model]
        for block in self.blocks:
            h = h + block(h)
        y = self.head(self.norm(h[:, -1])) + (x * self.weights).sum(dim=1)
        return F.normalize(y, dim=-1)


class _Block(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.split = block.split
        self.norm, self.conv = block.norm, block.conv
        self.in_proj, self.x_proj, self.dt_proj, self.out_proj = (
            block.in_proj,
            block.x_proj,
            block.dt_proj,
            block.out_proj,
        )
        self.D = block.D
        with torch.no_grad():
            self.register_buffer("A", -torch.exp(block.A_log))

    def forward(self, h: Tensor) -> Tensor:
        x, z = self.in_proj(self.norm(h)).chunk(2, dim=-1)  # [n, L, d_inner] each
        x = self._convolved(x)
        dt, B, C = self.x_proj(x).split(self.split, dim=-1)
        delta = F.softplus(self.dt_proj(dt))
        y = self._scanned(x, delta, B, C) + self.D * x
        return self.out_proj(y * F.silu(z))

    def _convolved(self, x: Tensor) -> Tensor:
        channels, width = self.conv.weight.shape
        out = F.conv1d(
            x.transpose(1, 2), self.conv.weight[:, None], self.conv.bias, padding=width - 1, groups=channels
        )  # [n, d_inner, L + width - 1]
        return F.silu(out[..., : x.shape[1]]).transpose(1, 2)

    def _scanned(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        columns = delta[..., None], (delta * x)[..., None], B[:, :, None], C[..., None]
        state, ys = None, []
        for delta_t, input_t, B_t, C_t in zip(*(part.unbind(1) for part in columns), strict=True):
            added = input_t * B_t  # [n, d_inner, N]
            state = added if state is None else torch.exp(delta_t * self.A) * state + added
            ys.append(state @ C_t)  # [n, d_inner, 1]
        return torch.cat(ys, dim=2).transpose(1, 2)
