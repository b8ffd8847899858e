"""A row of the GPU bench for an op: its inputs, the least work it has to do, its fp64 oracle and its targets.

An oracle is computed for a part of the batch and of the channels or heads, which do not know of the others; for the
comparison the gradient of the output is zero outside of that part, so that sums over channels are those of the part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Arrays = dict[str, Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BYTES = {"bf16": 2, "fp32": 4}
OURS, REFERENCE, COMPILED = "fastlvm", "reference", "torch.compile"
MAMBA, MAMBA_TRITON, FLA = "mamba_ssm CUDA", "mamba_ssm Triton", "fla"
CROSS_ENTROPY = "F.cross_entropy"


@dataclass(frozen=True)
class Target:
    """`kind`: "faster" and "slower" than a rival by a factor, "bound" (share of it), "memory" (share of a rival's),
    "p95" in ms, "rate" a second."""

    kind: str
    limit: float
    rival: str = ""

    @property
    def text(self) -> str:
        return {
            "faster": f"≥ {self.limit:g} × as fast as {self.rival}",
            "slower": f"≤ {self.limit:g} × the time of {self.rival}",
            "bound": f"≥ {100 * self.limit:g} % of the bound",
            "memory": f"≤ 1/{1 / self.limit:.0f} of the extra memory of {self.rival}",
            "p95": f"P95 ≤ {self.limit:g} ms",
            "rate": f"≥ {self.limit:,.0f} a second",
        }[self.kind]


@dataclass(frozen=True)
class Work:
    """The least of it: bytes read or written once each, exponentials and their like, operations of products."""

    bytes: float
    special: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Case:
    """One row. `leaves` are the arguments that get gradients, in the order in which they are asked for."""

    dtype: str = "bf16"
    gradient: bool = False
    targets: tuple[Target, ...] = ()

    section = op = ""
    leaves: ClassVar[tuple[str, ...]] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def id(self) -> str:
        passes = "fwdbwd" if self.gradient else "fwd"
        return "-".join([self.op, *map(str, self.shape), self.dtype, passes])

    @property
    def title(self) -> str:
        return f"{self.op} {self.shape}, {self.dtype}, {'fwd + bwd' if self.gradient else 'fwd'}"

    def small(self) -> Case:
        """The same row at a size for a machine without a GPU."""
        raise NotImplementedError

    def inputs(self, seed: int, device: str) -> Arrays:
        """Drawn anew for every seed; the gradient of the output is among them, as "cotangent"."""
        draw = Draw(seed, device)
        found = self._draw(draw, DTYPES[self.dtype])
        if self.gradient:
            for name in self.leaves:
                found[name].requires_grad_()
        return found

    def _draw(self, draw: Draw, dtype: torch.dtype) -> Arrays:
        raise NotImplementedError

    def call(self, given: Mapping[str, Tensor], backend: str) -> Tensor:
        """The op of fastlvm."""
        raise NotImplementedError

    def work(self) -> Work:
        raise NotImplementedError

    def part(self, given: Mapping[str, Tensor]) -> Arrays:
        """What the oracle is computed for; `given` are arguments, their gradients or "out"."""
        raise NotImplementedError

    def masked(self, given: Arrays) -> Arrays:
        """The inputs with a cotangent that is zero outside of `part`."""
        if not self.gradient:
            return given
        mask = torch.zeros_like(given["cotangent"])
        inside = self.part({"out": mask})["out"]
        inside.copy_(self.part({"out": given["cotangent"]})["out"])
        return {**given, "cotangent": mask}

    def oracle(self, given: Arrays) -> Arrays:
        """Of the part: "out", and the gradients by the name of their argument."""
        wide = {name: x.detach().double() for name, x in self.part(given).items()}
        if not self.gradient:
            with torch.no_grad():
                return {"out": self.call(wide, REFERENCE)}
        for name in self.leaves:
            wide[name].requires_grad_()
        out = self.call(wide, REFERENCE)
        grads = torch.autograd.grad(out, [wide[name] for name in self.leaves], wide["cotangent"])
        return {"out": out.detach(), **dict(zip(self.leaves, grads, strict=True))}

    def error(self, oracle: Arrays, out: Tensor, grads: tuple[Tensor, ...]) -> float:
        """The largest of the relative errors ‖x - oracle‖ / ‖oracle‖ of the output and the gradients."""
        found = self.part({"out": out, **dict(zip(self.leaves, grads, strict=False))})
        return max(relative(x, oracle[name]) for name, x in found.items())


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


class Draw:
    """Random arrays of one seed."""

    def __init__(self, seed: int, device: str) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def __call__(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=self.generator, device=self.device, dtype=dtype)
