"""What is timed: shapes, their arguments, and the figures they are held to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


@dataclass(frozen=True)
class Scan:
    """A call of ssm_scan in float32: u, delta and z [B, D, L], A [D, N], B and C [B, N, L]."""

    batch: int
    channels: int
    length: int
    state: int
    gradient: bool = False  # forward and backward

    op = "ssm_scan"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.length, self.state

    @property
    def title(self) -> str:
        return f"{self.shape} {'forward + backward' if self.gradient else 'forward'}"

    @property
    def id(self) -> str:
        return (
            f"B{self.batch}-D{self.channels}-L{self.length}-N{self.state}-{'gradient' if self.gradient else 'forward'}"
        )

    @property
    def array(self) -> int:
        """Bytes of one array [B, D, L, N]."""
        return 4 * self.batch * self.channels * self.length * self.state

    def tensors(self) -> list[torch.Tensor]:
        """The arguments in the order of NAMES, channels last in memory as a model holds them."""
        rng = np.random.default_rng(0)

        def draw(*sizes: int) -> np.ndarray:
            return rng.standard_normal(sizes, np.float32)

        batch, channels, length, state = self.shape
        rows, projection = (batch, length, channels), (batch, length, state)
        u, delta, z = (draw(*rows).transpose(0, 2, 1) for _ in range(3))
        B, C = (draw(*projection).transpose(0, 2, 1) for _ in range(2))
        A, D, bias = -np.exp(0.5 * draw(channels, state)), draw(channels), draw(channels) - 2
        arrays = (u, delta, A, B, C, D, z, bias)
        return [torch.from_numpy(array).requires_grad_(self.gradient) for array in arrays]

    def cotangent(self) -> torch.Tensor:
        """A gradient of the output [B, D, L]."""
        batch, channels, length, _ = self.shape
        rows = np.random.default_rng(1).standard_normal((batch, length, channels), np.float32)
        return torch.from_numpy(rows).transpose(1, 2)


@dataclass(frozen=True)
class Conv:
    """A call of causal_conv1d in float32 with bias and SiLU: x [B, D, L], weight [D, W]."""

    batch: int
    channels: int
    length: int
    width: int

    op = "causal_conv1d"
    gradient = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.length, self.width

    @property
    def title(self) -> str:
        return f"causal_conv1d ({self.batch}, {self.channels}, {self.length}), width {self.width}"

    @property
    def id(self) -> str:
        return f"B{self.batch}-D{self.channels}-L{self.length}-W{self.width}"

    def tensors(self) -> list[torch.Tensor]:
        """x, channels last in memory, weight and bias."""
        rng = np.random.default_rng(0)
        sizes = ((self.batch, self.length, self.channels), (self.channels, self.width), (self.channels,))
        x, weight, bias = (torch.from_numpy(rng.standard_normal(size, np.float32)) for size in sizes)
        return [x.transpose(1, 2), weight, bias]


@dataclass(frozen=True)
class Target:
    """A figure that a case is held to: at least or at most `limit`, on `threads` threads."""

    kind: str  # "ms", "reference", "torch.compile", "bound", "threads", "avx2" or "memory"
    limit: float

    @property
    def text(self) -> str:
        return {
            "ms": f"≤ {self.limit:g} ms",
            "bound": f"kernel ≤ {self.limit:g} × the bound",
            "threads": f"2 threads ≥ {self.limit:g} × as fast as 1",
            "avx2": f"AVX2 1.5 to {self.limit:g} × slower than AVX-512",
            "memory": f"backward ≤ {self.limit:g} × (inputs + outputs) + 64 MB more",
        }.get(self.kind, f"≥ {self.limit:g} × {self.kind}")


def _scan(case: Scan, **speed: float) -> tuple[Scan, tuple[Target, ...]]:
    """The case and its targets: those named, and those every case has."""
    named = [Target(kind.replace("_", "."), limit) for kind, limit in speed.items()]
    bound = Target("bound", 1.5 if case.batch == 256 else 2.0)
    memory = [Target("memory", 1.5)] if case.gradient else []
    return case, (*named, bound, Target("threads", 1.7), Target("avx2", 3.0), *memory)


# On 2 AVX-512 cores.
SCANS: dict[Scan, tuple[Target, ...]] = dict(
    (
        _scan(Scan(1, 1536, 5, 128), ms=0.05, reference=40),
        _scan(Scan(256, 1536, 5, 128), reference=30, torch_compile=10),
        _scan(Scan(256, 1536, 5, 128, gradient=True), reference=15, torch_compile=10),
        _scan(Scan(1, 1536, 2048, 16), reference=30),
        _scan(Scan(1, 1536, 2048, 16, gradient=True), reference=15),
        _scan(Scan(1, 1536, 2048, 128), reference=30),
        _scan(Scan(8, 1536, 512, 16, gradient=True), reference=15),
    )
)
CONVS = (Conv(1, 1536, 5, 4), Conv(1, 1536, 2048, 4))
