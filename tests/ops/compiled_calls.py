"""The calls whose kernels are compiled ahead of time, for GPUs that need not be there, and the table of what came out.

Needs a process without TRITON_INTERPRET. From the folder tests: `python -m ops.compiled_calls sm_90` prints JSON, and
`python -m ops.compiled_calls --write` makes bench/results/triton-kernels.md anew, for all targets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

TESTS = Path(__file__).parent.parent
TABLE = TESTS.parent / "bench" / "results" / "triton-kernels.md"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FIELDS = ("kernel", "call", "dtype", "registers", "limit", "spilled", "shared", "warps")


class Call(NamedTuple):
    """One call of an op: `tuned` if its sizes are those that the kernels were tuned for."""

    name: str
    make: Callable[[torch.dtype], None]
    tuned: bool = True
    everywhere: bool = True  # or for sm_90 alone


def empty(*shape, dtype):
    """Of any size, and without memory: nothing is computed."""
    return torch.empty(shape, dtype=dtype, device="meta")


def offsets(length):
    return torch.tensor([0, length // 3, length // 3, length], dtype=torch.int32)


def ssm_scan(batch, channels, length, state, *, gradient=False, packed=False):
    def make(dtype):
        from fastlvm.ops.ssm_scan import triton_op

        u, delta, z = (empty(batch, channels, length, dtype=dtype) for _ in range(3))
        B, C = (empty(batch, state, length, dtype=dtype) for _ in range(2))
        A, D, bias = (empty(channels, *rest, dtype=torch.float32) for rest in ((state,), (), ()))
        cu_seqlens = offsets(length) if packed else None
        inputs = (u, delta, A, B, C, D, z, bias, True, None, cu_seqlens)
        *_, kept = triton_op._scan(*inputs, False, gradient)
        if gradient:
            triton_op._scan_bwd(torch.empty_like(u), None, *inputs, kept, [True] * 8 + [False])

    return make


def ssd_scan(batch, length, heads, dim, state, *, gradient=False, packed=False):
    def make(dtype):
        from fastlvm.ops.ssd_scan import triton_op

        x, dt = empty(batch, length, heads, dim, dtype=dtype), empty(batch, length, heads, dtype=dtype)
        B, C = (empty(batch, length, 1, state, dtype=dtype) for _ in range(2))
        A, D, bias = (empty(heads, dtype=torch.float32) for _ in range(3))
        inputs = (x, dt, A, B, C, D, None, bias, True, None, offsets(length) if packed else None)
        if gradient:
            wanted = [True] * 6 + [False, True, False]
            triton_op._scan_bwd(torch.empty_like(x), None, *inputs, wanted)
        else:
            triton_op._scan(*inputs, False)

    return make


def causal_conv1d(batch, channels, length, width=4, *, gradient=False, packed=False):
    def make(dtype):
        from fastlvm.ops.causal_conv1d import triton_op

        x, weight, bias = (
            empty(*size, dtype=dtype) for size in ((batch, channels, length), (channels, width), (channels,))
        )
        inputs = (x, weight, bias, True, None, offsets(length) if packed else None)
        if gradient:
            sums = [torch.empty_like(p, dtype=torch.float32) for p in (weight, bias)]
            triton_op._conv_bwd(torch.empty_like(x), None, *inputs, torch.empty_like(x), *sums, None)
        else:
            sequences = 3 if packed else batch
            triton_op._conv(*inputs, torch.empty_like(x), empty(sequences, channels, width - 1, dtype=dtype))

    return make


def ssm_step(rows, channels, state, *, narrow=False):
    def make(dtype):
        from fastlvm.kernels.triton import ssm_step as kernels

        x, delta, z, out = (empty(rows, channels, dtype=dtype) for _ in range(4))
        B, C = (empty(rows, state, dtype=dtype) for _ in range(2))
        A, D, bias = (empty(channels, *rest, dtype=torch.float32) for rest in ((state,), (), ()))
        states = empty(rows, channels, state, dtype=dtype if narrow else torch.float32)
        kernels.ssm_step(states, x, delta, A, B, C, D, z, bias, True, None, out)

    return make


def ssd_step(rows, heads, dim, state):
    def make(dtype):
        from fastlvm.kernels.triton import ssd_step as kernels

        x, z, out = (empty(rows, heads, dim, dtype=dtype) for _ in range(3))
        B, C = (empty(rows, 1, state, dtype=dtype) for _ in range(2))
        A, D, bias = (empty(heads, dtype=torch.float32) for _ in range(3))
        states, dt = empty(rows, heads, dim, state, dtype=torch.float32), empty(rows, heads, dtype=dtype)
        kernels.step(states, x, dt, A, B, C, D, z, bias, True, None, out)

    return make


def causal_conv1d_step(rows, channels, width=4):
    def make(dtype):
        from fastlvm.kernels.triton import causal_conv1d_step as kernels

        x, out, bias = (empty(*size, dtype=dtype) for size in ((rows, channels), (rows, channels), (channels,)))
        weight, state = empty(channels, width, dtype=dtype), empty(rows, channels, width - 1, dtype=dtype)
        kernels.step(x, state, weight, bias, True, torch.empty_like(x[:, 0], dtype=torch.int32), out)

    return make


def info_nce(rows, dim, *, again=False):
    def make(dtype):
        from fastlvm.kernels.triton import info_nce as kernels

        queries, keys = (empty(rows, dim, dtype=dtype) for _ in range(2))
        losses, log_sums = empty(rows, dtype=torch.float32), empty(2, rows, dtype=torch.float32)
        gradients = [torch.empty_like(x, dtype=torch.float32) for x in (queries, keys)]
        if again:
            kernels.backward(losses, queries, keys, 0.07, True, None, None, None, log_sums, *gradients)
        else:
            kernels.forward(queries, keys, 0.07, False, None, None, None, losses, log_sums, *gradients)

    return make


CALLS = [
    Call("ssm_scan (256, 1536, 5, 128) forward", ssm_scan(256, 1536, 5, 128), everywhere=False),
    Call("ssm_scan (256, 1536, 5, 128) forward + backward", ssm_scan(256, 1536, 5, 128, gradient=True)),
    Call("ssm_scan (8, 1536, 2048, 16) forward", ssm_scan(8, 1536, 2048, 16), everywhere=False),
    Call("ssm_scan (8, 1536, 2048, 16) forward + backward", ssm_scan(8, 1536, 2048, 16, gradient=True)),
    Call("ssm_scan (1, 1536, 16384, 16) forward", ssm_scan(1, 1536, 16384, 16)),
    Call(
        "ssm_scan (8, 2048, 4096, 256) forward + backward",
        ssm_scan(8, 2048, 4096, 256, gradient=True),
        everywhere=False,
    ),
    Call(
        "ssm_scan (1, 64, 600, 5) packed forward + backward",
        ssm_scan(1, 64, 600, 5, gradient=True, packed=True),
        tuned=False,
        everywhere=False,
    ),
    Call("ssd_scan (8, 4096, 24, 64, 128) forward", ssd_scan(8, 4096, 24, 64, 128)),
    Call("ssd_scan (8, 4096, 24, 64, 128) backward", ssd_scan(8, 4096, 24, 64, 128, gradient=True)),
    Call("ssd_scan (256, 5, 24, 64, 128) forward", ssd_scan(256, 5, 24, 64, 128)),
    Call("ssd_scan (256, 5, 24, 64, 128) backward", ssd_scan(256, 5, 24, 64, 128, gradient=True), everywhere=False),
    Call(
        "ssd_scan (1, 600, 4, 32, 16) packed forward",
        ssd_scan(1, 600, 4, 32, 16, packed=True),
        tuned=False,
        everywhere=False,
    ),
    *(
        Call(f"causal_conv1d {size} {name}", causal_conv1d(*size, gradient=name == "backward"))
        for size in ((256, 1536, 5), (8, 1536, 2048))
        for name in ("forward", "backward")
    ),
    Call(
        "causal_conv1d (1, 64, 600) packed backward",
        causal_conv1d(1, 64, 600, gradient=True, packed=True),
        tuned=False,
        everywhere=False,
    ),
    Call("ssm_step (256, 1536, 128)", ssm_step(256, 1536, 128)),
    Call("ssm_step (256, 1536, 128), narrow state", ssm_step(256, 1536, 128, narrow=True), everywhere=False),
    Call("ssd_step (256, 24, 64, 128)", ssd_step(256, 24, 64, 128)),
    Call("causal_conv1d_step (256, 1536)", causal_conv1d_step(256, 1536)),
    Call("info_nce (32768, 768) forward and gradients", info_nce(32768, 768)),
    Call("info_nce (32768, 768) symmetric backward", info_nce(32768, 768, again=True), everywhere=False),
]


def compiled(target: str, dtype: str, *, everywhere: bool = False) -> list[dict[str, Any]]:
    """A row for every kernel of every call, or of those for all targets."""
    from . import compiled as compiler

    rows = []
    for call in CALLS:
        if everywhere and not call.everywhere:
            continue
        with compiler.compiling(target) as kernels:
            call.make(DTYPES[dtype])
        for kernel in kernels:
            numbers = (kernel.registers, kernel.limit, kernel.spilled, kernel.shared, kernel.warps)
            rows.append(dict(zip(FIELDS, (kernel.name, call.name, dtype, *numbers), strict=True)))
    return rows


def in_a_process(target: str) -> dict[str, Any]:
    """What `python -m ops.compiled_calls TARGET` says, in a process whose kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ops.compiled_calls", target]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise RuntimeError(f"the kernels do not compile for {target}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, dict[str, Any]]) -> str:
    """The Markdown table of what `in_a_process` says of each target."""
    lines = [
        "# Kernels in Triton, compiled ahead of time",
        "",
        "Made without a GPU by `python -m ops.compiled_calls --write` in the folder tests, whose module has the calls.",
        "Registers are those of a thread (on gfx942 vector registers), limit how many the launcher allows, where it",
        "says so, spilled what a thread keeps in local memory in bytes, shared the bytes of a program. Sizes are",
        "(B, D, L, N) of ssm_scan, (B, L, H, P, N) of ssd_scan, (B, D, L) of causal_conv1d. A kernel has several rows",
        "in a call that launches it in several forms.",
    ]
    for target, entry in found.items():
        tools = f"Triton {entry['triton']}" + (f", ptxas {entry['ptxas']}" if "ptxas" in entry else "")
        lines += ["", f"## {target}", tools, "", "| " + " | ".join(FIELDS) + " |", "|---" * len(FIELDS) + "|"]
        lines += [
            "| " + " | ".join("" if row[name] is None else str(row[name]) for name in FIELDS) + " |"
            for row in entry["rows"]
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ops.compiled_calls", description=__doc__)
    parser.add_argument("target", nargs="?", help="print what is compiled for it as JSON")
    parser.add_argument("--write", action="store_true", help=f"compile for every target, into {TABLE.name}")
    given = parser.parse_args()

    from . import compiled as compiler

    if given.write:
        TABLE.write_text(table({target: in_a_process(target) for target in compiler.TARGETS}))
    elif given.target == "sm_90":
        rows = compiled("sm_90", "bf16") + compiled("sm_90", "fp32", everywhere=True)
        print(json.dumps({**compiler.versions(given.target), "rows": rows}))
    elif given.target in compiler.TARGETS:
        print(json.dumps({**compiler.versions(given.target), "rows": compiled(given.target, "bf16", everywhere=True)}))
    else:
        parser.error(f"target is {given.target!r}, wants one of {', '.join(compiler.TARGETS)}, or --write")


if __name__ == "__main__":
    main()
