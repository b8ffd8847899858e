"""What the Metal kernels load, store and exponentiate, counted in the emulation, over the least a kernel could do.

`cd tests && python -m metal.counts` prints the table in docs/kernels.md. The least is every input loaded once, every
result stored once, one exponential for every state and step (none for the first step of a zero state), and one for each
softplus and each sigmoid. Loads are counted twice: those of threads, of which most are served by registers of the
neighbours, caches or threadgroup memory on a GPU, and different elements that a threadgroup loads.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from fastlvm.ops.causal_conv1d import metal as convolution
from fastlvm.ops.causal_conv1d_step import metal as convolution_step
from fastlvm.ops.ssm_scan import metal as scan
from fastlvm.ops.ssm_step import metal as scan_step

from .emulator import Launch, Recorder

PARTIAL = {"dA", "dB", "dC", "dD", "dbias", "sums"}  # results that are added up once more


@dataclass
class Row:
    """A launch, and the least it could do: elements in and out, and exponentials."""

    kernel: str
    shape: str
    launch: Launch
    loads: int
    stores: int
    exps: int

    @property
    def thread_loads(self) -> float:
        return sum(threads for threads, _ in self.launch.loads.values()) / self.loads

    @property
    def group_loads(self) -> float:
        return sum(elements for _, elements in self.launch.loads.values()) / self.loads

    @property
    def streamed(self) -> float:
        """Loads by threads of the arrays that have both channels and time, or a state, over their elements."""
        names = [key for key in ("u", "delta", "z", "grad_out", "x", "state") if self.launch.loads.get(key, (0,))[0]]
        return sum(self.launch.loads[key][0] for key in names) / sum(self.launch.sizes[key] for key in names)

    @property
    def written(self) -> float:
        return sum(threads for threads, _ in self.launch.stores.values()) / self.stores

    @property
    def results(self) -> float:
        """Stores of what is no partial sum, over their elements."""
        stores = {key: n for key, (n, _) in self.launch.stores.items() if n and key not in PARTIAL}
        return sum(stores.values()) / sum(self.launch.sizes[key] for key in stores)

    @property
    def exponentials(self) -> float:
        return self.launch.exps / self.exps if self.exps else math.nan


def normal(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))


def scan_rows(recorder: Recorder, batch: int, channels: int, length: int, state: int) -> list[Row]:
    """A forward from a zero state that keeps states for the backward, and that backward."""
    u, delta, z, grad = (normal(batch, channels, length) for _ in range(4))
    B, C = normal(batch, state, length), normal(batch, state, length)
    A, D, bias = -mx.exp(normal(channels, state)), normal(channels), normal(channels)
    args = (u, delta, A, B, C, D, z, bias, True, None, None)
    _, _, kept = scan.scan(*args, return_final_state=False, keep=True)
    scan.scan_bwd(grad, None, *args, kept)
    forward, backward = recorder.launches[-2:]
    here = f"({batch}, {channels}, {length}, {state})"
    size, rows = batch * channels * length, channels * (state + 2)
    first = batch * channels * state
    inputs = 3 * size + 2 * batch * state * length + rows
    kept_size = 0 if kept is None else kept.size - first  # none before the first chunk
    # In the long backward the first step takes its exponential: it is an element of the scan over lanes.
    spared = first if backward.name.endswith("short") else 0
    return [
        Row("ssm_scan", here, forward, inputs, size + kept_size, size * (state + 2) - first),
        Row(
            backward.name.removeprefix("fastlvm_"),
            here,
            backward,
            inputs + size + kept_size,
            inputs,
            size * (state + 2) - spared,
        ),
    ]


def conv_rows(recorder: Recorder, batch: int, channels: int, length: int, width: int = 4) -> list[Row]:
    x, grad = normal(batch, channels, length), normal(batch, channels, length)
    weight, bias = normal(channels, width), normal(channels)
    convolution.conv(x, weight, bias, "silu", None, None, False)
    convolution.conv_bwd(grad, None, x, weight, bias, "silu", None, None)
    here, size, rows = f"({batch}, {channels}, {length}), {width} taps", x.size, channels * (width + 1)
    forward, backward = recorder.launches[-2:]
    return [
        Row("causal_conv1d", here, forward, size + rows, size, size),
        Row("causal_conv1d_bwd", here, backward, 2 * size + rows, size + rows, size),
    ]


def step_rows(recorder: Recorder, rows: int, channels: int, state: int, width: int = 4) -> list[Row]:
    x, delta, z = (normal(rows, channels) for _ in range(3))
    B, C, A = normal(rows, state), normal(rows, state), -mx.exp(normal(channels, state))
    pool, D, bias = normal(rows, channels, state), normal(channels), normal(channels)
    scan_step.step(pool, x, delta, A, B, C, D, z, bias, True, None)
    size = rows * channels
    least = 3 * size + pool.size + A.size + 2 * channels + 2 * B.size
    found = [
        Row(
            "ssm_step", f"({rows}, {channels}, {state})", recorder.launches[-1], least, size + pool.size,
            size * (state + 2),
        )
    ]  # fmt: skip
    held, weight = normal(rows, channels, width - 1), normal(channels, width)
    convolution_step.step(x, held, weight, bias, "silu", None)
    least = size + held.size + weight.size + channels
    here = f"({rows}, {channels}), {width} taps"
    return [*found, Row("causal_conv1d_step", here, recorder.launches[-1], least, size + held.size, size)]


def rows(recorder: Recorder) -> list[Row]:
    return [
        *scan_rows(recorder, 256, 1536, 5, 128),
        *scan_rows(recorder, 8, 1536, 1024, 16),
        *conv_rows(recorder, 256, 1536, 5),
        *conv_rows(recorder, 8, 1536, 1024),
        *step_rows(recorder, 256, 1536, 128),
        *step_rows(recorder, 256, 1536, 16)[:1],
    ]


def table(found: list[Row]) -> str:
    lines = ["| kernel | sizes | loads: once read | by threadgroups | by threads | stores: results | all | exps |"]
    lines += ["|" + "---|" * 8]
    for row in found:
        numbers = (row.streamed, row.group_loads, row.thread_loads, row.results, row.written, row.exponentials)
        lines.append(f"| `{row.kernel}` | {row.shape} | " + " | ".join(f"{n:.2f}" for n in numbers) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    recorder = Recorder(most_columns=1)  # which is like every other at these sizes
    mx.fast.metal_kernel = recorder.metal_kernel
    sys.stdout.write(table(rows(recorder)) + "\n")
