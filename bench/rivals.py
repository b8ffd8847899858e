"""The selective scan as others compute it, on the same tensors as fastlvm.ssm_scan."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlvm
from cases import Scan
from fastlvm.ops.ssm_scan import reference

PACKAGES = ("fastlvm", "torch", "numpy", "transformers", "mambapy")
ScanCall = Callable[..., Tensor]  # (u, delta, A, B, C, D, z, delta_bias), softplus of delta taken


@dataclass(frozen=True)
class Rival:
    """One way to compute the scan.

    timed: what exactly runs between the two readings of the clock, beside torch.autograd.grad for the gradients.
    arrays: how many arrays [B, D, L, N] it holds at its peak, forward and forward + backward.
    steps, why: the longest sequence that is timed, forward and forward + backward, and why no longer one is.
    """

    name: str
    timed: str
    load: Callable[[], ScanCall]
    arrays: tuple[float, float]
    steps: tuple[int | None, int | None] = (None, None)
    why: str = ""

    def refusal(self, case: Scan) -> str | None:
        """Why this case is not run; None if it can be."""
        longest = self.steps[case.gradient]
        if longest is not None and case.length > longest:
            return f"{self.why}; not run above {longest} steps"
        wanted, there = self.arrays[case.gradient] * case.array, available_memory()
        if there is not None and wanted > 0.9 * there:
            return f"needs about {wanted / 2**30:.0f} GiB, {there / 2**30:.0f} GiB are free"
        return None


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = meminfo.read_text(encoding="utf-8").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def _reference() -> ScanCall:
    return functools.partial(fastlvm.ssm_scan, delta_softplus=True, backend="reference")


def _compiled() -> ScanCall:
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.reset()  # one shape at a time: nothing falls back to eager mode at the limit of recompilations
    torch._inductor.config.force_disable_caches = True  # the number of threads is compiled in

    def scan(u, delta, A, B, C, D, z, delta_bias):
        return reference.scan(u, delta, A, B, C, D, z, delta_bias, True, None)[0]

    return torch.compile(scan, fullgraph=True, dynamic=False)


def _transformers() -> ScanCall:
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns that the path timed here is slow
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return functools.partial(mamba_selective_scan, delta_softplus=True)


def _mambapy() -> ScanCall:
    from mambapy.mamba import MambaBlock

    def scan(u, delta, A, B, C, D, z, delta_bias):
        u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))  # [B, L, ·], which is how they lie
        y = MambaBlock.selective_scan(None, u, F.softplus(delta + delta_bias), A, B, C, D)
        return (y * F.silu(z)).transpose(1, 2)

    return scan


REFERENCE, COMPILED = "reference", "torch.compile"
RIVALS = (
    Rival(
        REFERENCE,
        'fastlvm.ssm_scan(..., backend="reference"): the loop over time in plain PyTorch',
        _reference,
        (1.5, 5),
    ),
    Rival(
        COMPILED,
        "the same loop under torch.compile(fullgraph=True, dynamic=False), compiled before for each number of threads",
        _compiled,
        (1.5, 5),
        (64, 64),
        "torch.compile unrolls the loop over time",
    ),
    Rival(
        "transformers",
        "mamba_selective_scan of transformers.models.mamba.modeling_mamba, which is all of MambaMixer's slow path "
        "between the projections and takes the same arguments; no projection or convolution is in the time",
        _transformers,
        (4.5, 8),
        (None, 64),
        "the backward of every step's slice fills an array (B, D, L, N): work of L² N",
    ),
    Rival(
        "mambapy",
        "MambaBlock.selective_scan of mambapy.mamba, which calls pscan, with softplus before and the gate after it as "
        "in MambaBlock.forward",
        _mambapy,
        (9, 14),
    ),
)


def load(rival: Rival) -> tuple[ScanCall | None, str]:
    """The call, or None and why there is none."""
    try:
        return rival.load(), ""
    except ImportError as error:
        return None, f"cannot be imported: {error}"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of what the figures depend on; "missing" where a package is not installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def gradients(scan: ScanCall, tensors: list[Tensor], cotangent: Tensor) -> Callable[[], Any]:
    """A call of forward and backward: the output and the gradients of all tensors."""

    def call() -> tuple[Tensor, ...]:
        out = scan(*tensors)
        return out.detach(), *torch.autograd.grad(out, tensors, cotangent)

    return call


def outputs(scan: ScanCall, tensors: list[Tensor]) -> Callable[[], Any]:
    """A call of the forward pass alone."""

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (scan(*tensors),)

    return call
