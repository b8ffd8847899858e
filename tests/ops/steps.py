"""The one-token ops: cases, inputs, and each op once more in float64, element by element, apart from the reference."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

import fastlvm

SSM = ("D", "z", "delta_bias", "delta_softplus")
SSD = ("D", "z", "dt_bias", "dt_softplus")


def _generator(seed):
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)


@dataclass(frozen=True)
class Ssm:
    """`B` and `C` are "bn" or the number of groups of (b, G, N). `states` is S where there are indices."""

    batch: int = 3
    channels: int = 4
    state: int = 5
    B: str | int = "bn"
    C: str | int = 2
    options: tuple[str, ...] = SSM
    states: int | None = None
    op = staticmethod(fastlvm.ssm_step)
    name = "ssm_step"

    def __str__(self):
        return f"b{self.batch}D{self.channels}N{self.state}-{self.B}-{self.C}-{'+'.join(self.options) or 'bare'}"

    def inputs(self, dtype=torch.float32, weights=torch.float32, seed=0):
        """Arguments as torch tensors: activations in `dtype`, parameters and state in `weights`."""
        normal, b, d, n = _generator(seed), self.batch, self.channels, self.state
        delta = 0.5 * normal(b, d)
        args = {
            "state": normal(b if self.states is None else self.states, d, n).to(weights),
            "x": normal(b, d).to(dtype),
            "delta": (delta if "delta_softplus" in self.options else delta.abs()).to(dtype),
            "A": -normal(d, n).exp().to(weights),
        }
        for key in "BC":
            groups = getattr(self, key)
            args[key] = normal(*((b, n) if groups == "bn" else (b, groups, n))).to(dtype)
        optional = {
            "D": normal(d).to(weights),
            "z": normal(b, d).to(dtype),
            "delta_bias": 0.1 * normal(d).abs().to(weights),
            "delta_softplus": True,
        }
        return args | {key: optional[key] for key in self.options}

    @staticmethod
    def row(h, i, *, x, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        """Output [D] of row i, whose state h [D, N] is written."""
        out = np.zeros(x.shape[1])
        for d in range(x.shape[1]):
            dt = _step_size(delta[i, d], None if delta_bias is None else delta_bias[d], delta_softplus)
            b, c = (M[i] if M.ndim == 2 else M[i, d * M.shape[1] // x.shape[1]] for M in (B, C))
            h[d] = np.exp(dt * A[d]) * h[d] + dt * b * x[i, d]
            out[d] = np.dot(c, h[d]) + (0.0 if D is None else D[d] * x[i, d])
        return out if z is None else out * _silu(z[i])


@dataclass(frozen=True)
class Conv:
    """`extra` is what the state holds beyond the W - 1 inputs that count."""

    batch: int = 3
    channels: int = 4
    width: int = 4
    extra: int = 0
    options: tuple[str, ...] = ("bias", "activation")
    states: int | None = None
    op = staticmethod(fastlvm.causal_conv1d_step)
    name = "causal_conv1d_step"

    def __str__(self):
        return f"b{self.batch}D{self.channels}W{self.width}+{self.extra}-{'+'.join(self.options) or 'bare'}"

    def inputs(self, dtype=torch.float32, weights=torch.float32, seed=0):
        normal, b, d = _generator(seed), self.batch, self.channels
        optional = {"bias": normal(d).to(weights), "activation": "silu"}
        return {
            "x": normal(b, d).to(dtype),
            "state": normal(b if self.states is None else self.states, d, self.width - 1 + self.extra).to(weights),
            "weight": normal(d, self.width).to(weights),
        } | {key: optional[key] for key in self.options}

    @staticmethod
    def row(h, i, *, x, weight, bias=None, activation=None):
        out = np.zeros(x.shape[1])
        for d, filters in enumerate(weight):
            line = [*h[d], x[i, d]]
            out[d] = sum(w * v for w, v in zip(filters[::-1], line[::-1], strict=False))
            out[d] += 0.0 if bias is None else bias[d]
            h[d] = line[1:]
        return out if activation is None else _silu(out)


@dataclass(frozen=True)
class Ssd:
    """`whole_D`: D is (h, p) instead of (h,)."""

    batch: int = 3
    heads: int = 4
    channels: int = 3
    state: int = 5
    groups: int = 2
    whole_D: bool = False
    options: tuple[str, ...] = SSD
    states: int | None = None
    op = staticmethod(fastlvm.ssd_step)
    name = "ssd_step"

    def __str__(self):
        size = f"b{self.batch}h{self.heads}p{self.channels}n{self.state}g{self.groups}"
        return f"{size}-{'+'.join(self.options) or 'bare'}{'-wholeD' if self.whole_D else ''}"

    def inputs(self, dtype=torch.float32, weights=torch.float32, seed=0):
        normal, b, h, p, n = _generator(seed), self.batch, self.heads, self.channels, self.state
        dt = 0.5 * normal(b, h)
        optional = {
            "D": normal(*((h, p) if self.whole_D else (h,))).to(weights),
            "z": normal(b, h, p).to(dtype),
            "dt_bias": 0.1 * normal(h).abs().to(weights),
            "dt_softplus": True,
        }
        return {
            "state": normal(b if self.states is None else self.states, h, p, n).to(weights),
            "x": normal(b, h, p).to(dtype),
            "dt": (dt if "dt_softplus" in self.options else dt.abs()).to(dtype),
            "A": -normal(h).exp().to(weights),
            "B": normal(b, self.groups, n).to(dtype),
            "C": normal(b, self.groups, n).to(dtype),
        } | {key: optional[key] for key in self.options}

    @staticmethod
    def row(H, i, *, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
        """Output [h, p] of row i, whose state H [h, p, n] is written."""
        heads = x.shape[1]
        out = np.zeros(x.shape[1:])
        for h in range(heads):
            size = _step_size(dt[i, h], None if dt_bias is None else dt_bias[h], dt_softplus)
            b, c = (M[i, h * M.shape[1] // heads] for M in (B, C))
            H[h] = math.exp(size * A[h]) * H[h] + size * np.outer(x[i, h], b)
            out[h] = H[h] @ c + (0.0 if D is None else D[h] * x[i, h])
        return out if z is None else out * _silu(z[i])


Case = Ssm | Conv | Ssd


def _step_size(raw, bias, softplus):
    size = raw if bias is None else raw + bias
    return math.log1p(math.exp(size)) if softplus and size <= 20 else size


def _silu(x):
    return x / (1 + np.exp(-x))


def truth(case: Case, inputs: dict) -> tuple[np.ndarray, np.ndarray]:
    """Output and states after it, in float64, for torch or numpy inputs, which are left alone."""
    given = {key: as_double(value) for key, value in inputs.items() if value is not None}
    state, indices = given.pop("state").copy(), given.pop("state_indices", None)
    slots = range(case.batch) if indices is None else [int(i) for i in indices]
    out = np.zeros(given["x"].shape)
    for i, slot in enumerate(slots):
        if slot >= 0:
            out[i] = case.row(state[slot], i, **given)
    return out, state


@functools.cache
def basic_truth(case: Case, dtype=torch.float32) -> tuple[np.ndarray, np.ndarray]:
    """`truth` for the case's own inputs, all of `dtype`."""
    return truth(case, case.inputs(dtype, dtype))


def as_double(value):
    if isinstance(value, torch.Tensor):
        return value.detach().double().numpy()
    return value.astype(np.float64) if isinstance(value, np.ndarray) else value


def copied(inputs: dict) -> dict:
    """Inputs whose state, and every other array, may be written."""
    copies = {torch.Tensor: lambda x: x.detach().clone(), np.ndarray: lambda x: x.copy()}
    return {key: copies.get(type(value), lambda x: x)(value) for key, value in inputs.items()}


def as_numpy(inputs: dict) -> dict:
    return {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def advance(case: Case, inputs: dict, **kwargs):
    """Output of the op and its states afterwards; the inputs are left alone."""
    inputs = copied(inputs)
    return case.op(**inputs, **kwargs), inputs["state"]


BASIC: tuple[Case, ...] = (Ssm(), Conv(), Ssd())
