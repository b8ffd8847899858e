"""The grid of InfoNCE, and its oracle: query by query in float64, written apart from the reference."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from . import oracle


@dataclass(frozen=True)
class Nce:
    """One loss. `mask` is None, "dense", or the number of columns of labels."""

    batch: int = 7
    keys: int = 7
    dim: int = 5
    temperature: float = 0.5
    symmetric: bool = False
    mask: str | int | None = None
    reduction: str = "mean"
    scale: float = 1.0  # of the vectors

    def __str__(self) -> str:
        size = f"B{self.batch}M{self.keys}D{self.dim}"
        extra = "" if (self.temperature, self.scale) == (0.5, 1.0) else f"-t{self.temperature}-x{self.scale}"
        return f"{size}-{'both' if self.symmetric else 'one'}-{self.mask}-{self.reduction}{extra}"

    def vectors(self, dtype=torch.float32, seed=0) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        shapes = {"queries": (self.batch, self.dim), "keys": (self.keys, self.dim)}
        drawn = {k: self.scale * torch.randn(*shape, generator=g, dtype=torch.float64) for k, shape in shapes.items()}
        return {k: x.to(dtype) for k, x in drawn.items()}

    def left_out(self, seed=2):
        g = torch.Generator().manual_seed(seed)
        if self.mask is None:
            return None
        if self.mask == "dense":
            return torch.rand(self.batch, self.keys, generator=g) < 0.3
        return tuple(torch.randint(-2, 6, (n, self.mask), generator=g) for n in (self.batch, self.keys))

    def inputs(self, dtype=torch.float32) -> dict:
        rest = {"temperature": self.temperature, "symmetric": self.symmetric, "reduction": self.reduction}
        return {**self.vectors(dtype), **rest, "mask": self.left_out()}

    def cotangent(self) -> torch.Tensor:
        shape = (self.batch,) if self.reduction == "none" else ()
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _grid() -> list[Nce]:
    sizes = [(1, 1, 1), (2, 3, 1), (5, 5, 3), (6, 19, 4), (16, 16, 16), (17, 31, 33), (33, 70, 65), (64, 64, 64)]
    sizes += [(65, 130, 7), (130, 517, 31), (270, 270, 20), (0, 0, 4), (0, 3, 4), (3, 5, 0)]
    cases = [Nce(b, m, d, reduction=r) for b, m, d in sizes for r in ("sum", "none")]
    cases += [
        Nce(b, b, d, symmetric=True, reduction=r) for b, _, d in sizes for r in ("mean", "none") if b or r != "mean"
    ]
    masks = ("dense", 1, 3, 16)
    for r in ("mean", "none"):
        cases += [Nce(37, 37, 9, mask=m, symmetric=s, reduction=r) for m in masks for s in (False, True)]
        cases += [Nce(290, 530, 9, mask=m, reduction=r) for m in masks]
    cases += [Nce(300, 300, 9, mask=m, symmetric=True) for m in ("dense", 2)]
    # Probabilities that are nearly flat, and nearly 0 and 1; logits that exp of float32 does not hold.
    cases += [Nce(40, 60, 8, temperature=t, reduction=r) for t in (0.07, 100.0) for r in ("mean", "none")]
    cases += [Nce(20, 30, 8, temperature=0.05, scale=10.0, symmetric=False), Nce(30, 30, 8, scale=20.0, symmetric=True)]
    return list(dict.fromkeys(cases))


GRID = _grid()


def nce_oracle(queries, keys, temperature, symmetric=False, mask=None, reduction="mean"):
    """The loss, from one sum after the other; a key that is left out is never looked at."""
    batch, count = len(queries), len(keys)

    dense = mask.tolist() if isinstance(mask, torch.Tensor) else None
    ours, theirs = (x.tolist() for x in mask) if isinstance(mask, tuple) else ([], [])

    def counts(i, j):  # whether query i and key j are compared
        if i == j or mask is None:
            return True
        if dense:
            return not dense[i][j]
        return not any(a == b >= 0 for a, b in zip(ours[i], theirs[j], strict=True))

    logits = torch.stack([(q * keys).sum(-1) for q in queries]) / temperature if batch else keys.new_zeros(0, count)
    together = [[counts(i, j) for j in range(count)] for i in range(batch)]
    rows = []
    for i in range(batch):
        others = [logits[i, torch.tensor(together[i])]]
        if symmetric:
            others.append(logits[torch.tensor([together[k][i] for k in range(batch)]), i])
        sums = [x.max() + torch.log(torch.exp(x - x.max()).sum()) for x in others]
        rows.append(sum(sums) / len(sums) - logits[i, i])
    losses = torch.stack(rows) if rows else queries.sum(1)
    return (losses if reduction == "none" else losses.sum() / (1 if reduction == "sum" else batch),)


@functools.cache
def truth(case: Nce, dtype=torch.float32):
    """Loss and gradients of the oracle for the case's inputs as rounded to the dtype."""
    op = functools.partial(nce_oracle, mask=case.left_out(), temperature=case.temperature, symmetric=case.symmetric)
    [loss], grads = oracle.run(
        functools.partial(op, reduction=case.reduction), case.vectors(dtype), (case.cotangent(),)
    )
    return loss, grads


def gradients(op, case: Nce, dtype=torch.float32, **kwargs):
    """Loss and gradients of `op` for the same inputs and cotangent as `truth`."""
    inputs = case.inputs(dtype)
    tensors = {k: inputs[k].requires_grad_() for k in ("queries", "keys")}
    loss = op(**inputs, **kwargs)
    grads = torch.autograd.grad(loss, list(tensors.values()), case.cotangent().to(loss.dtype))
    return loss.detach(), dict(zip(tensors, grads, strict=True))
