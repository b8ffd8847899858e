"""The grid of the Mamba-2 scan, and its oracle: the recurrence in float64, written apart from the reference."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise

import torch

from . import oracle

ALL = ("D", "z", "dt_bias", "dt_softplus", "initial_state")
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
TIMED = ("x", "dt", "B", "C", "z")


@dataclass(frozen=True)
class Ssd:
    """One scan; with `cuts`, of the sequences that these offsets (less the first and the last) cut the length into."""

    batch: int = 2
    length: int = 6
    heads: int = 4
    dim: int = 5
    groups: int = 2
    state: int = 5
    options: tuple[str, ...] = ALL
    D_per_channel: bool = False
    step: float = 0.5  # scale of the step sizes
    decay: float = 1.0  # scale of A
    cuts: tuple[int, ...] | None = None

    def __str__(self) -> str:
        size = f"B{self.batch}L{self.length}H{self.heads}P{self.dim}G{self.groups}N{self.state}"
        extra = "" if (self.step, self.decay) == (0.5, 1.0) else f"-step{self.step}-decay{self.decay}"
        extra += "-D2" if self.D_per_channel else ""
        extra += "" if self.cuts is None else f"-cuts{'_'.join(map(str, self.cuts))}"
        return f"{size}-{'+'.join(self.options) or 'bare'}{extra}"

    @property
    def offsets(self) -> list[int] | None:
        return None if self.cuts is None else [0, *self.cuts, self.length]

    @property
    def sequences(self) -> int:
        return self.batch if self.cuts is None else len(self.cuts) + 1

    def inputs(self, dtype=torch.float32, weights=torch.float32, seed=0) -> dict:
        """Arguments of the op as torch tensors: activations in `dtype`, parameters and state in `weights`."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        time, heads, rows = (self.batch, self.length), (self.heads,), (self.heads, self.dim)
        dt = self.step * normal(*time, *heads)
        args = {
            "x": normal(*time, *rows).to(dtype),
            "dt": (dt if "dt_softplus" in self.options else dt.abs()).to(dtype),
            "A": (-self.decay * normal(*heads).exp()).to(weights),
            "B": normal(*time, self.groups, self.state).to(dtype),
            "C": normal(*time, self.groups, self.state).to(dtype),
        }
        optional = {
            "D": normal(*(rows if self.D_per_channel else heads)).to(weights),
            "z": normal(*time, *rows).to(dtype),
            "dt_bias": 0.1 * normal(*heads).abs().to(weights),
            "dt_softplus": True,
            "initial_state": normal(self.sequences, *rows, self.state).to(weights),
        }
        args |= {name: optional[name] for name in self.options}
        if self.cuts is not None:
            args["cu_seqlens"] = torch.tensor(self.offsets, dtype=torch.int32)
        return args

    def cotangents(self, seed=1) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        out = torch.randn(self.batch, self.length, self.heads, self.dim, generator=g)
        return out, torch.randn(self.sequences, self.heads, self.dim, self.state, generator=g)


def _grid() -> list[Ssd]:
    cases = [Ssd(length=n, state=16) for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 64, 128, 129, 257)]
    cases += [Ssd(length=9, state=n, dim=p) for n, p in [(1, 1), (5, 16), (16, 5), (64, 64), (128, 1), (1, 128)]]
    cases += [Ssd(batch=1, length=5, heads=2, state=n, dim=p) for n, p in [(300, 5), (5, 300), (128, 64), (33, 17)]]
    cases += [Ssd(length=n, heads=h, groups=g) for n in (6, 130) for h, g in [(4, 1), (4, 4), (6, 3), (9, 1)]]
    cases += [Ssd(options=o) for o in [(), *((name,) for name in ALL)]]
    cases += [Ssd(options=tuple(o for o in ALL if o != name)) for name in ALL]
    cases += [Ssd(length=n, state=16, options=("z",)) for n in (1, 5, 16, 64, 128)]
    cases += [Ssd(D_per_channel=True), Ssd(length=130, options=()), Ssd(length=130, options=("z",))]
    zeros = ("batch", "heads", "dim", "state")
    cases += [Ssd(**{name: 0}) for name in zeros]
    # Steps on both sides of the softplus threshold; states that are gone, or kept whole, after one step.
    cases += [Ssd(step=25.0, decay=1e-3, length=80), Ssd(decay=200.0, length=80), Ssd(decay=1e-7, length=140)]
    cases += [Ssd(batch=1, length=9, cuts=c) for c in [(), (9,), (0,), (4,), (1, 1, 6), (0, 2, 9, 9)]]
    cases += [Ssd(batch=1, length=300, cuts=(70, 70, 200), options=o) for o in [ALL, ("z",)]]
    return list(dict.fromkeys(cases))


GRID = _grid()


def ssd_oracle(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, initial_state=None, cu_seqlens=None):
    """Output [B, L, H, P] and final state [B or S, H, P, N], sequence by sequence and token by token."""
    batch, length, heads, dim = x.shape
    cut = [(b, 0, length) for b in range(batch)]
    if cu_seqlens is not None:
        ends = [int(n) for n in cu_seqlens]
        cut = [(0, begin, end) for begin, end in pairwise(ends)]
    zero = x.new_zeros(heads, dim, B.shape[3])
    group = [h * B.shape[2] // heads for h in range(heads)]
    rows, states = [], []
    for s, (b, begin, end) in enumerate(cut):
        H = zero if initial_state is None else initial_state[s]
        for t in range(begin, end):
            step = dt[b, t] if dt_bias is None else dt[b, t] + dt_bias
            if dt_softplus:
                step = oracle._softplus(step)
            grown = torch.einsum("h,hp,hn->hpn", step, x[b, t], B[b, t][group])
            H = torch.exp(step * A)[:, None, None] * H + grown
            y = torch.einsum("hpn,hn->hp", H, C[b, t][group])
            if D is not None:
                y = y + (D[:, None] if D.ndim == 1 else D) * x[b, t]
            rows.append(y if z is None else y * z[b, t] / (1 + torch.exp(-z[b, t])))
        states.append(H)
    out = torch.stack(rows).reshape(x.shape) if rows else torch.zeros_like(x)
    return out, torch.stack(states) if states else x.new_zeros(0, *zero.shape)


@functools.cache
def truth(case: Ssd, dtype=torch.float32, weights=torch.float32) -> tuple[list[torch.Tensor], dict]:
    """Outputs and gradients of the oracle for the case's inputs as rounded to the dtypes."""
    out, state = case.cotangents()
    inputs = case.inputs(dtype, weights)
    offsets = inputs.pop("cu_seqlens", None)
    return oracle.run(functools.partial(ssd_oracle, cu_seqlens=offsets), inputs, (out.to(dtype), state))


def gradients(op, case: Ssd, dtype=torch.float32, weights=torch.float32, **kwargs):
    """Outputs and gradients of `op` for the same inputs and cotangents as `truth`."""
    inputs = case.inputs(dtype, weights)
    tensors = {k: inputs[k].requires_grad_() for k in NAMES if k in inputs}
    outputs = op(**inputs, return_final_state=True, **kwargs)
    cotangents = [g.to(o.dtype) for o, g in zip(outputs, case.cotangents(), strict=True)]
    grads = torch.autograd.grad(outputs, list(tensors.values()), cotangents, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in outputs], dict(zip(tensors, grads, strict=True))
