"""The whole forward at seed size: the model, its contexts, and the figures our predictor is held to.

The name of whoever is timed ends in the precision of its weights: "fastlvm int8", "OpenVINO bf16".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cases import Scan

OURS = "fastlvm"
CONTEXT, DIM = 5, 768
BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
# Calls of a paired round, untimed and timed: weights settle in the third cache after up to 15 passes over 140 MB,
# others' bytes have to leave it first.
WARM_CALLS, TIMED_CALLS = 20, 4
CHECKED = 64  # contexts whose predictions are compared with the model's
# Cosines to the float32 model, smallest and mean, that ours have to reach; a rival is not timed below the last one.
COSINES = {"fp32": (0.999999, 0.999999), "bf16": (0.9999, 0.9999), "int8": (0.999, 0.9995)}
PRECISIONS = tuple(COSINES)
RIVAL_COSINE = 0.99


def name_of(precision: str) -> str:
    return f"{OURS} {precision}"


def model() -> torch.nn.Module:
    """Mamba-S with random weights, A as uneven as a trained one: whole numbers, alike in all layers, otherwise."""
    import bench_predictor

    made = bench_predictor.model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in made.blocks:
            block.A_log += 0.1 * torch.randn(block.A_log.shape, generator=generator)
    return made


def contexts(n: int) -> np.ndarray:
    """float32 [n, context, dim], unit vectors; the first CHECKED repeat."""
    vectors = np.random.default_rng(0).standard_normal((min(n, CHECKED), CONTEXT, DIM), np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    return np.ascontiguousarray(np.resize(vectors, (n, CONTEXT, DIM)))


def scans(config: object) -> Scan:
    """The scans of all blocks as one: a block stands for a sequence of its own."""
    return Scan(config.n_layers, config.d_inner, CONTEXT, config.d_state)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Target:
    """A figure one precision is held to on a number of threads: at least or at most `limit`."""

    kind: str  # "ms", "rivals", "spread", "bound", "hog" or "batch"
    precision: str
    threads: int
    limit: float

    @property
    def text(self) -> str:
        fastest = "the fastest fp32 rival" if self.precision == "fp32" else "the fastest rival"
        return {
            "ms": f"median ≤ {self.limit:g} ms",
            "rivals": f"≥ {self.limit:g} × as fast as {fastest}",
            "spread": f"P95 ÷ median ≤ {self.limit:g}",
            "bound": f"time ÷ bound ≤ {self.limit:g}",
            "hog": f"busy ÷ quiet median ≤ {self.limit:g}",
            "batch": f"a window of 16 or more ÷ one alone ≤ {self.limit:g}",
        }[self.kind]


def _everywhere(kind: str, limit: float) -> tuple[Target, ...]:
    return tuple(Target(kind, precision, n, limit) for precision in PRECISIONS for n in (2, 1))


# On 2 AVX-512 cores.
TARGETS = (
    Target("ms", "int8", 2, 0.75),
    Target("ms", "int8", 1, 1.35),
    Target("ms", "bf16", 2, 1.1),
    Target("ms", "bf16", 1, 2.0),
    Target("rivals", "int8", 2, 6.5),
    Target("rivals", "bf16", 2, 4),
    Target("rivals", "fp32", 2, 2),
    *_everywhere("spread", 1.25),
    *_everywhere("bound", 1.5),
    *_everywhere("hog", 4),
    *(Target("batch", precision, 2, 0.25) for precision in PRECISIONS),
)
