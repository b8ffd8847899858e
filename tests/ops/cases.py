"""The grid every backend is held to: small in batch and channels, wide in everything a kernel branches on."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass

import torch

from . import oracle

ALL = ("D", "z", "delta_bias", "delta_softplus", "initial_state")


@dataclass(frozen=True)
class Scan:
    """One selective scan. `B` and `C` name a layout: "dn", "bnl", or the number of groups of "bgnl"."""

    batch: int = 2
    channels: int = 4
    state: int = 5
    length: int = 6
    B: str | int = "bnl"
    C: str | int = "bnl"
    options: tuple[str, ...] = ALL
    step: float = 0.5  # scale of the step sizes
    decay: float = 1.0  # scale of A

    def __str__(self) -> str:
        size = f"B{self.batch}D{self.channels}N{self.state}L{self.length}"
        extra = "" if (self.step, self.decay) == (0.5, 1.0) else f"-step{self.step}-decay{self.decay}"
        return f"{size}-{self.B}-{self.C}-{'+'.join(self.options) or 'bare'}{extra}"

    def inputs(self, dtype=torch.float32, weights=torch.float32, seed=0) -> dict:
        """Arguments of the op as torch tensors: activations in `dtype`, parameters and state in `weights`."""
        g = torch.Generator().manual_seed(seed)
        b, d, n, length = self.batch, self.channels, self.state, self.length

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        delta = self.step * normal(b, d, length)
        args = {
            "u": normal(b, d, length).to(dtype),
            "delta": (delta if "delta_softplus" in self.options else delta.abs()).to(dtype),
            "A": (-self.decay * normal(d, n).exp()).to(weights),
        }
        for name in "BC":
            layout = getattr(self, name)
            shape = {"dn": (d, n), "bnl": (b, n, length)}.get(layout, (b, layout, n, length))
            args[name] = normal(*shape).to(weights if layout == "dn" else dtype)
        optional = {
            "D": normal(d).to(weights),
            "z": normal(b, d, length).to(dtype),
            "delta_bias": 0.1 * normal(d).abs().to(weights),
            "delta_softplus": True,
            "initial_state": normal(b, d, n).to(weights),
        }
        return args | {name: optional[name] for name in self.options}

    def cotangents(self, seed=1) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        out = torch.randn(self.batch, self.channels, self.length, generator=g)
        return out, torch.randn(self.batch, self.channels, self.state, generator=g)


def _scans() -> list[Scan]:
    cases = [Scan(length=n, state=16) for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 64, 257)]
    # From a zero state as many steps as are unrolled, and one more.
    cases += [Scan(length=n, options=tuple(o for o in ALL if o != "initial_state")) for n in range(1, 10)]
    cases += [Scan(state=n, length=9, B=2) for n in (1, 5, 16, 128, 300)]
    cases += [
        Scan(B=b, C=c) for b in ("dn", "bnl", 1, 2, 4) for c in ("dn", "bnl", 1, 2, 4) if (b, c) != ("bnl", "bnl")
    ]
    cases += [Scan(options=o) for o in [(), *((name,) for name in ALL)]]
    cases += [Scan(options=tuple(o for o in ALL if o != name)) for name in ALL]
    sizes = [(0, 4, 5), (2, 0, 5), (2, 4, 0), (1, 1, 16), (1, 7, 1), (5, 1, 1), (3, 17, 33)]
    cases += [Scan(batch=b, channels=d, state=n) for b, d, n in sizes]
    # Steps on both sides of the softplus threshold; a state that is gone, or kept whole, after one step.
    cases += [Scan(step=25.0, decay=1e-3), Scan(decay=200.0), Scan(decay=1e-7, length=64)]
    cases += [Scan(batch=1, channels=2, state=128, length=65, B=1, C="dn", options=("z", "initial_state"))]
    return list(dict.fromkeys(cases))


@dataclass(frozen=True)
class Conv:
    """One causal convolution."""

    batch: int = 2
    channels: int = 4
    width: int = 4
    length: int = 6
    options: tuple[str, ...] = ("bias", "activation", "initial_state")

    def __str__(self) -> str:
        size = f"B{self.batch}D{self.channels}W{self.width}L{self.length}"
        return f"{size}-{'+'.join(self.options) or 'bare'}"

    def inputs(self, dtype=torch.float32, weights=torch.float32, seed=0) -> dict:
        g = torch.Generator().manual_seed(seed)
        b, d, w = self.batch, self.channels, self.width
        optional = {
            "bias": torch.randn(d, generator=g).to(weights),
            "activation": "silu",
            "initial_state": torch.randn(b, d, w - 1, generator=g).to(dtype),
        }
        return {
            "x": torch.randn(b, d, self.length, generator=g).to(dtype),
            "weight": torch.randn(d, w, generator=g).to(weights),
        } | {name: optional[name] for name in self.options}

    def cotangents(self, seed=1) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        out = torch.randn(self.batch, self.channels, self.length, generator=g)
        return out, torch.randn(self.batch, self.channels, self.width - 1, generator=g)


def _convs() -> list[Conv]:
    cases = [Conv(length=n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 64, 257)]
    cases += [Conv(width=w, length=n) for w in (1, 2, 3, 4, 5, 9) for n in (2, 16, 33)]
    cases += [Conv(options=o) for o in [(), ("bias",), ("activation",), ("initial_state",), ("bias", "activation")]]
    cases += [Conv(batch=b, channels=d) for b, d in [(0, 4), (2, 0), (1, 1), (3, 17)]]
    return list(dict.fromkeys(cases))


SCANS = _scans()
CONVS = _convs()


@functools.cache
def truth(case: Scan | Conv, dtype=torch.float32, weights=torch.float32) -> tuple[list[torch.Tensor], dict]:
    """Outputs and gradients of the oracle for the case's inputs as rounded to the dtypes."""
    op = oracle.ssm_scan if isinstance(case, Scan) else oracle.causal_conv1d
    cotangents = tuple(g.to(dtype) if i == 0 or isinstance(case, Conv) else g for i, g in enumerate(case.cotangents()))
    return oracle.run(op, case.inputs(dtype, weights), cotangents)


def gradients(op, case: Scan | Conv, dtype=torch.float32, weights=torch.float32, **kwargs):
    """Outputs and gradients of `op` (a fastlvm op) for the same inputs and cotangents as `truth`."""
    inputs = case.inputs(dtype, weights)
    tensors = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    outputs = op(**inputs, return_final_state=True, **kwargs)
    cotangents = [g.to(o.dtype) for o, g in zip(outputs, case.cotangents(), strict=True)]
    grads = torch.autograd.grad(outputs, list(tensors.values()), cotangents, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in outputs], dict(zip(tensors, grads, strict=True))


def custom_ops(name: str):
    """The custom op of that name and its backward, as torch knows them."""
    importlib.import_module(f"fastlvm.ops.{name}.autograd")  # registers both
    return getattr(torch.ops.fastlvm, name).default, getattr(torch.ops.fastlvm, f"{name}_bwd").default
