"""What is timed: shapes, their arguments, and the figures they are held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def id_of(case: Scan | Conv | Ssd | Step) -> str:
    return "-".join([case.op, *map(str, case.shape), "gradient" if case.gradient else "forward"])


def _passes(gradient: bool) -> str:
    return " forward + backward" if gradient else " forward"


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
        return f"{self.shape}{_passes(self.gradient)}"

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


def _normal(*sizes: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(len(sizes)).standard_normal(sizes, np.float32))


@dataclass(frozen=True)
class Conv:
    """A call of causal_conv1d in float32 with bias and SiLU: x [B, D, L], weight [D, W]."""

    batch: int
    channels: int
    length: int
    width: int
    gradient: bool = False

    op = "causal_conv1d"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.length, self.width

    @property
    def title(self) -> str:
        return f"({self.batch}, {self.channels}, {self.length}), width {self.width}{_passes(self.gradient)}"

    def arguments(self) -> dict[str, Any]:
        """With x channels last in memory."""
        x = _normal(self.batch, self.length, self.channels).transpose(1, 2)
        weight, bias = _normal(self.channels, self.width), _normal(self.channels)
        return {"x": x, "weight": weight, "bias": bias, "activation": "silu"}


@dataclass(frozen=True)
class Ssd:
    """A call of ssd_scan in float32 with D, z, dt_bias and softplus: x [B, L, H, P], B and C [B, L, 1, N]."""

    batch: int
    length: int
    heads: int
    dim: int
    state: int
    gradient: bool = False

    op = "ssd_scan"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.length, self.heads, self.dim, self.state

    @property
    def title(self) -> str:
        return f"{self.shape}{_passes(self.gradient)}"

    def arguments(self) -> dict[str, Any]:
        rows, heads = (self.batch, self.length), (self.heads,)
        x, z = (_normal(*rows, self.heads, self.dim) for _ in range(2))
        B, C = (_normal(*rows, 1, self.state) for _ in range(2))
        dt, A, D, bias = _normal(*rows, self.heads), -_normal(*heads).exp(), _normal(*heads), _normal(*heads) - 2
        return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": bias, "dt_softplus": True}


@dataclass(frozen=True)
class Step:
    """A call of ssm_step in float32 with D, z, delta_bias and softplus: state [b, D, N], x [b, D]."""

    rows: int
    channels: int
    state: int

    op = "ssm_step"
    gradient = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, self.channels, self.state

    @property
    def title(self) -> str:
        return str(self.shape)

    def arguments(self) -> dict[str, Any]:
        x, delta, z = (_normal(self.rows, self.channels) for _ in range(3))
        B, C, A = _normal(self.rows, self.state), _normal(self.rows, self.state), _normal(self.channels, self.state)
        named = {"x": x, "delta": delta, "A": -A.exp(), "B": B, "C": C, "D": _normal(self.channels), "z": z}
        state, bias = _normal(self.rows, self.channels, self.state), _normal(self.channels) - 2
        return {"state": state, **named, "delta_bias": bias, "delta_softplus": True}


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
# No target hangs on these.
OTHERS: tuple[Conv | Ssd | Step, ...] = (
    Conv(1, 1536, 5, 4),
    Conv(1, 1536, 2048, 4),
    Conv(1, 1536, 2048, 4, gradient=True),
    Ssd(1, 2048, 24, 64, 128),
    Ssd(1, 2048, 24, 64, 128, gradient=True),
    Step(1, 1536, 16),
    Step(64, 1536, 16),
)
