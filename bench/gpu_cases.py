"""The rows of the GPU bench that time an op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlvm
from gpu_case import BYTES, CROSS_ENTROPY, DTYPES, MAMBA, MAMBA_TRITON, REFERENCE, Arrays, Case, Draw, Target, Work

TEMPERATURE = 0.07
_CHUNK = 64  # of the SSD's count of operations


@dataclass(frozen=True)
class Scan(Case):
    """ssm_scan with D, z, delta_bias and softplus: u, delta, z [B, D, L]; B, C [B, N, L]; A, D, delta_bias in fp32."""

    batch: int = 1
    channels: int = 1
    length: int = 1
    state: int = 1

    section, op = "ssm", "ssm_scan"
    leaves = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.length, self.state

    def small(self) -> Case:
        return replace(self, batch=min(2, self.batch), channels=6, length=min(5, self.length), state=min(3, self.state))

    def _draw(self, draw: Draw, dtype: torch.dtype) -> Arrays:
        b, d, length, n = self.shape
        found = {name: draw(b, d, length, dtype=dtype) for name in ("u", "delta", "z")}
        found |= {name: draw(b, n, length, dtype=dtype) for name in ("B", "C")}
        found |= {"A": -torch.exp(0.5 * draw(d, n)), "D": draw(d), "delta_bias": draw(d) - 2}
        return found | ({"cotangent": draw(b, d, length, dtype=dtype)} if self.gradient else {})

    def call(self, given: Mapping[str, Tensor], backend: str) -> Tensor:
        out: Tensor = fastlvm.ssm_scan(*(given[name] for name in self.leaves), True, backend=backend)
        return out

    def work(self) -> Work:
        """The first step decays a state of zero, so it needs no exponential. Softplus and SiLU are two each."""
        b, d, length, n = self.shape
        size, rows, fixed = BYTES[self.dtype], b * d * length, 4 * d * (n + 2)
        special = b * d * max(length - 1, 0) * n + 4 * rows
        forward = size * (4 * rows + 2 * b * n * length) + fixed
        if not self.gradient:
            return Work(forward, special)
        # read: u, delta, z, B, C and the gradient of out; written: those of u, delta, z, B and C
        return Work(forward + size * (7 * rows + 4 * b * n * length) + 2 * fixed, 2 * special)

    def part(self, given: Mapping[str, Tensor]) -> Arrays:
        long = self.length > 2048
        rows, channels = slice(0, 1 if long else 2), slice(0, 16 if long else 32)
        cuts = dict.fromkeys(("u", "delta", "z", "out", "cotangent"), (rows, channels))
        cuts |= {"A": channels, "D": channels, "delta_bias": channels, "B": rows, "C": rows}  # type: ignore[dict-item]
        return {name: x[cuts[name]] for name, x in given.items()}


@dataclass(frozen=True)
class Ssd(Case):
    """ssd_scan with D, dt_bias and softplus: x [B, L, H, P]; dt [B, L, H]; B, C [B, L, 1, N]; A, D, dt_bias in fp32."""

    batch: int = 1
    length: int = 1
    heads: int = 1
    dim: int = 1
    state: int = 1

    section, op = "ssd", "ssd_scan"
    leaves = ("x", "dt", "A", "B", "C", "D", "dt_bias")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.length, self.heads, self.dim, self.state

    def small(self) -> Case:
        return replace(self, batch=2, length=20, heads=2, dim=16, state=16)

    def _draw(self, draw: Draw, dtype: torch.dtype) -> Arrays:
        b, length, h, p, n = self.shape
        found = {"x": draw(b, length, h, p, dtype=dtype), "dt": draw(b, length, h, dtype=dtype)}
        found |= {name: draw(b, length, 1, n, dtype=dtype) for name in ("B", "C")}
        found |= {"A": -torch.exp(0.5 * draw(h)), "D": draw(h), "dt_bias": draw(h) - 3}
        return found | ({"cotangent": draw(b, length, h, p, dtype=dtype)} if self.gradient else {})

    def call(self, given: Mapping[str, Tensor], backend: str) -> Tensor:
        x, dt, A, B, C, D, bias = (given[name] for name in self.leaves)
        out: Tensor = fastlvm.ssd_scan(x, dt, A, B, C, D, None, bias, True, backend=backend)
        return out

    def work(self) -> Work:
        """Products of the states, and of triangles of chunks of 64; the backward counted as two and a half forwards."""
        b, length, h, p, n = self.shape
        size, rows = BYTES[self.dtype], b * length
        flops = rows * (h * 4 * n * p + _CHUNK * n + h * _CHUNK * p)
        forward = size * rows * (2 * h * p + h + 2 * n)
        if not self.gradient:
            return Work(forward, 4 * rows * h, flops)
        return Work(forward + size * rows * (3 * h * p + 2 * h + 4 * n), 8 * rows * h, 3.5 * flops)

    def part(self, given: Mapping[str, Tensor]) -> Arrays:
        rows, heads, every = slice(0, 1), slice(0, 2), slice(None)
        cuts: dict[str, Any] = dict.fromkeys(("x", "dt", "out", "cotangent"), (rows, every, heads))
        cuts |= {"A": heads, "D": heads, "dt_bias": heads, "B": rows, "C": rows}
        return {name: x[cuts[name]] for name, x in given.items()}


@dataclass(frozen=True)
class Step(Case):
    """ssm_step with D, z, delta_bias and softplus: state [b, D, N], in fp32 or narrow too; x [b, D].

    What is compared is the output and the state after it.
    """

    rows: int = 1
    channels: int = 1
    state: int = 1
    narrow_state: bool = False

    section, op = "step", "ssm_step"
    leaves = ("state",)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, self.channels, self.state

    @property
    def id(self) -> str:
        return super().id + f"-state-{self._state}"

    @property
    def title(self) -> str:
        return f"ssm_step {self.shape}, {self.dtype}, state in {self._state}"

    @property
    def _state(self) -> str:
        return self.dtype if self.narrow_state else "fp32"

    def small(self) -> Case:
        return replace(self, rows=2, channels=6, state=3)

    def _draw(self, draw: Draw, dtype: torch.dtype) -> Arrays:
        b, d, n = self.shape
        found = {name: draw(b, d, dtype=dtype) for name in ("x", "delta", "z")}
        found |= {name: draw(b, n, dtype=dtype) for name in ("B", "C")}
        found |= {"A": -torch.exp(0.5 * draw(d, n)), "D": draw(d), "delta_bias": draw(d) - 2}
        return {"state": draw(b, d, n, dtype=DTYPES[self._state]), **found}

    def call(self, given: Mapping[str, Tensor], backend: str) -> Tensor:
        names = ("state", "x", "delta", "A", "B", "C", "D", "z", "delta_bias")
        out: Tensor = fastlvm.ssm_step(*(given[name] for name in names), True, backend=backend)
        return out

    def work(self) -> Work:
        b, d, n = self.shape
        moved = 2 * b * d * n * BYTES[self._state] + BYTES[self.dtype] * (4 * b * d + 2 * b * n) + 4 * d * (n + 2)
        return Work(moved, b * d * n + 4 * b * d)

    def masked(self, given: Arrays) -> Arrays:
        return {**given, "state": given["state"].clone()}

    def part(self, given: Mapping[str, Tensor]) -> Arrays:
        return dict(given)

    def oracle(self, given: Arrays) -> Arrays:
        wide = {name: x.double() for name, x in given.items()}
        return {"out": self.call(wide, REFERENCE), "state": wide["state"]}


@dataclass(frozen=True)
class Nce(Case):
    """info_nce of queries and keys [rows, dim] of length 1, each query near its own key, forward + backward."""

    rows: int = 1
    dim: int = 768

    section, op = "nce", "info_nce"
    leaves = ("queries", "keys")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, self.dim

    def small(self) -> Case:
        return replace(self, rows=40, dim=32)

    def _draw(self, draw: Draw, dtype: torch.dtype) -> Arrays:
        keys, noise = (F.normalize(draw(*self.shape), dim=1) for _ in range(2))
        queries = F.normalize(keys + 2 * noise, dim=1)
        return {"queries": queries.to(dtype), "keys": keys.to(dtype), "cotangent": torch.ones((), device=draw.device)}

    def call(self, given: Mapping[str, Tensor], backend: str) -> Tensor:
        out: Tensor = fastlvm.info_nce(given["queries"], given["keys"], TEMPERATURE, backend=backend)
        return out

    def work(self) -> Work:
        """Three products of [rows, rows] with dim, and an exponential each for the sum and for the gradient."""
        pairs = self.rows * self.rows
        return Work(4 * BYTES[self.dtype] * self.rows * self.dim, 2 * pairs, 6 * pairs * self.dim)

    def masked(self, given: Arrays) -> Arrays:
        return given

    def part(self, given: Mapping[str, Tensor]) -> Arrays:
        return dict(given)

    def oracle(self, given: Arrays) -> Arrays:
        """By hand and in strips, for all logits in float64 take 8.6 GB."""
        q, k = (given[name].detach().double() for name in self.leaves)
        loss, d_q, d_k = q.new_zeros(()), torch.zeros_like(q), torch.zeros_like(k)
        for start in range(0, self.rows, 2048):
            rows = slice(start, start + 2048)
            logits = q[rows] @ k.T / TEMPERATURE
            own = torch.arange(*rows.indices(self.rows), device=q.device)
            loss += (logits.logsumexp(1) - logits.gather(1, own[:, None])[:, 0]).sum()
            p = logits.softmax(1).scatter_add_(1, own[:, None], -q.new_ones(len(own), 1))
            d_q[rows], d_k = p @ k, d_k + p.T @ q[rows]
        scale = 1 / (TEMPERATURE * self.rows)
        return {"out": loss / self.rows, "queries": scale * d_q, "keys": scale * d_k}


@dataclass(frozen=True)
class Conv(Case):
    """causal_conv1d with bias and SiLU: x [B, D, L], weight [D, W], in one dtype."""

    batch: int = 1
    channels: int = 1
    length: int = 1
    width: int = 4

    section, op = "conv", "causal_conv1d"
    leaves = ("x", "weight", "bias")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.length, self.width

    def small(self) -> Case:
        return replace(self, batch=2, channels=6, length=min(9, self.length))

    def _draw(self, draw: Draw, dtype: torch.dtype) -> Arrays:
        b, d, length, w = self.shape
        found = {"x": draw(b, d, length, dtype=dtype), "weight": draw(d, w, dtype=dtype), "bias": draw(d, dtype=dtype)}
        return found | ({"cotangent": draw(b, d, length, dtype=dtype)} if self.gradient else {})

    def call(self, given: Mapping[str, Tensor], backend: str) -> Tensor:
        x, weight, bias = (given[name] for name in self.leaves)
        out: Tensor = fastlvm.causal_conv1d(x, weight, bias, activation="silu", backend=backend)
        return out

    def work(self) -> Work:
        rows = self.batch * self.channels * self.length
        return Work(BYTES[self.dtype] * rows * (5 if self.gradient else 2), rows * (4 if self.gradient else 2))

    def part(self, given: Mapping[str, Tensor]) -> Arrays:
        rows, channels = slice(0, 2), slice(0, 64)
        cuts: dict[str, Any] = dict.fromkeys(("x", "out", "cotangent"), (rows, channels))
        cuts |= {"weight": channels, "bias": channels}
        return {name: x[cuts[name]] for name, x in given.items()}


def _faster(limit: float, rival: str) -> Target:
    return Target("faster", limit, rival)


def _bound(share: float) -> Target:
    return Target("bound", share)


def _cases() -> list[Case]:
    short = {"batch": 256, "channels": 1536, "length": 5, "state": 128}
    long = {"batch": 8, "channels": 1536, "length": 2048, "state": 16}
    ssd = {"batch": 8, "length": 4096, "heads": 24, "dim": 64, "state": 128}
    step = {"rows": 256, "channels": 1536, "state": 128, "targets": (_bound(0.8),)}
    nce = (Target("slower", 1.2, CROSS_ENTROPY), Target("memory", 1 / 20, CROSS_ENTROPY))
    convs = ({"batch": 256, "channels": 1536, "length": 5}, {"batch": 8, "channels": 1536, "length": 2048})
    both = {"gradient": True}
    limit = {"batch": 8, "channels": 2048, "length": 4096, "state": 256}
    return [
        Scan(**short, targets=(_faster(5, MAMBA), _bound(0.6))),
        Scan(**short, **both, targets=(_faster(3, MAMBA), _bound(0.6))),
        Scan(**long, targets=(_faster(1.2, MAMBA),)),
        Scan(**long, **both, targets=(_faster(1.2, MAMBA),)),
        Scan(batch=1, channels=1536, length=16384, state=16, targets=(_faster(1.2, MAMBA),)),
        Scan(**limit, **both, targets=(_bound(0.5),)),
        Ssd(**ssd),
        Ssd(**ssd, **both, targets=(_faster(1, MAMBA_TRITON),)),
        Step(**step),
        Step(**step, narrow_state=True),
        Nce(rows=32768, **both, targets=nce),
        *(Conv(**conv, gradient=gradient) for conv in convs for gradient in (False, True)),
        # No target hangs on these.
        *(Scan(**size, dtype="fp32", gradient=gradient) for size in (short, long) for gradient in (False, True)),
        Ssd(**ssd, **both, dtype="fp32"),
        Nce(rows=32768, **both, dtype="fp32"),
    ]


CASES = _cases()
