"""The payload's side of a two-tower model: a residual layer that payload and context go through after the whitening."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F


class Tower(nn.Module):
    """w [.., dim] of length 1 ↦ normalize(w + down(gelu(up(√dim · w)))); an untrained one leaves w as it is."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.scale = math.sqrt(dim)  # the components of a vector of length 1 are small
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, w: Tensor) -> Tensor:
        branch = self.down(self.dropout(F.gelu(self.up(self.dropout(self.scale * w)))))
        return F.normalize(w + branch, dim=-1)


def arrays(weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """A tower's state dict as `fastlvm.Space` takes it."""
    found = {name: weight.detach().numpy().copy() for name, weight in weights.items()}
    found["up.weight"] *= np.float32(math.sqrt(found["up.weight"].shape[1]))
    return found
