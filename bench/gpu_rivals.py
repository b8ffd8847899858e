"""Who is timed in a row of the GPU bench: fastlvm, what there is to compare it with, and why one is missing."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_case import COMPILED, CROSS_ENTROPY, FLA, MAMBA, MAMBA_TRITON, OURS, REFERENCE, Arrays, Case
from gpu_cases import TEMPERATURE, Conv, Nce, Scan, Ssd, Step

CHANNELS_LAST = "fastlvm, channels last"
Result = tuple[Tensor, tuple[Tensor, ...]]
_SHORT = 16  # up to this length torch.compile unrolls the reference within seconds
_MEMORY = 40e9  # bytes that the reference may keep for its gradients


class Missing(Exception):
    """Why there is no such contender here."""


@dataclass
class Contender:
    """`call` takes what `prepare` makes of the inputs, and gives the output and the gradients of the case's leaves."""

    name: str
    call: Callable[[Arrays], Result]
    prepare: Callable[[Arrays], Arrays] = dict
    outputs_alone: bool = False  # its gradients are those of other arrays
    extra: Callable[[Arrays, Tensor], Tensor] | None = None  # what is missing in its output, for the comparison


Forward = Callable[[Mapping[str, Tensor]], Tensor]


def passes(case: Case, forward: Forward, names: tuple[str, ...] | None = None) -> Callable[[Arrays], Result]:
    """The forward, with gradients where the case has them; those of `names` instead of the case's leaves."""
    leaves = case.leaves if names is None else names

    def alone(given: Arrays) -> Result:
        with torch.no_grad():
            out = forward(given)
        return out, tuple(given[name] for name in leaves if name == "state")

    def both(given: Arrays) -> Result:
        out = forward(given)
        return out.detach(), torch.autograd.grad(out, [given[name] for name in leaves], given["cotangent"])

    return both if case.gradient else alone


def contenders(case: Case, backend: str, compiled: bool) -> Iterator[Contender | tuple[str, str]]:
    """fastlvm first; a pair of name and reason stands for one that is not here."""
    yield Contender(OURS, passes(case, lambda given: case.call(given, backend)))
    for name, make in _MAKERS[type(case)].items():
        if name == COMPILED and not compiled:
            yield name, "left out with --no-compile"
            continue
        try:
            yield make(case, backend)
        except Missing as error:
            yield name, str(error)
        except ImportError as error:
            yield name, f"not built: {error}"
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}"


# --- ssm_scan


def _mamba(case: Scan, backend: str) -> Contender:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    if case.state > 256:
        raise Missing("takes states up to 256")

    def forward(given: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = selective_scan_fn(*(given[name] for name in case.leaves), delta_softplus=True)
        return out

    return Contender(MAMBA, passes(case, forward))


def _reference(case: Case, backend: str) -> Contender:
    if isinstance(case, Scan | Ssd) and case.gradient:
        states = case.batch * case.length * case.state
        states *= case.channels if isinstance(case, Scan) else case.heads * case.dim
        kept = 4 * 4 * states  # the state, its decay, its input and a product, in fp32, of every step
        if kept > _MEMORY:
            raise Missing(f"would keep some {kept / 1e9:.0f} GB for its gradients")
    return Contender(REFERENCE, passes(case, lambda given: case.call(given, REFERENCE)))


def _compiled(case: Scan, backend: str) -> Contender:
    if case.dtype != "bf16":
        raise Missing("compiled for bf16 alone")
    if case.length > _SHORT:
        raise Missing(f"compiling the reference's loop of {case.length} steps takes minutes and more")
    from fastlvm.ops.ssm_scan.reference import scan

    def forward(given: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = scan(*(given[name] for name in case.leaves), True, None)[0]
        return out

    return Contender(COMPILED, passes(case, torch.compile(forward, dynamic=False)))


def _channels_last(case: Scan, backend: str) -> Contender:
    """The layout in which a model has them: the same arrays, with channels or states next to each other in memory."""
    if case.length > _SHORT:
        raise Missing("timed for short rows alone")

    def prepare(given: Arrays) -> Arrays:
        moved = {name: _last(given[name]) for name in ("u", "delta", "z", "B", "C", "cotangent") if name in given}
        return {**given, **moved}

    return Contender(CHANNELS_LAST, passes(case, lambda given: case.call(given, backend)), prepare)


def _last(x: Tensor) -> Tensor:
    moved = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    return moved.requires_grad_(x.requires_grad)


# --- ssd_scan


def _mamba_ssd(case: Ssd, backend: str) -> Contender:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def forward(given: Mapping[str, Tensor]) -> Tensor:
        x, dt, A, B, C, D, bias = (given[name] for name in case.leaves)
        out: Tensor = mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D, dt_bias=bias, dt_softplus=True)
        return out

    return Contender(MAMBA_TRITON, passes(case, forward))


def _fla(case: Ssd, backend: str) -> Contender:
    """Its core alone: a head's own B and C, step sizes, decays and the skip are made before and added after."""
    from fla import utils
    from fla.ops.simple_gla import chunk_simple_gla

    if case.gradient and utils.IS_NVIDIA_HOPPER and utils.TRITON_ABOVE_3_4_0 and not utils.TRITON_ABOVE_3_7_1:
        raise Missing("its backward refuses Triton 3.4 to 3.7.0 on Hopper, which miscompile it (its issue 640)")
    names = ("q", "k", "v", "g")

    def prepare(given: Arrays) -> Arrays:
        with torch.no_grad():
            step = F.softplus(given["dt"].float() + given["dt_bias"])  # [B, L, H]
            v = (given["x"].float() * step[..., None]).to(given["x"].dtype)
            q, k = (given[name].expand(-1, -1, case.heads, -1).contiguous() for name in ("C", "B"))
            found = {"q": q, "k": k, "v": v, "g": step * given["A"]}
        if case.gradient:
            for name in names:
                found[name].requires_grad_()
            found["cotangent"] = given["cotangent"]
        return found

    def forward(given: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = chunk_simple_gla(*(given[name] for name in names), scale=1.0)[0]
        return out

    def skip(given: Arrays, out: Tensor) -> Tensor:
        return out.float() + given["D"][:, None] * given["x"].float()

    return Contender(FLA, passes(case, forward, names), prepare, outputs_alone=True, extra=skip)


# --- the other ops


def _mamba_step(case: Step, backend: str) -> Contender:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    def forward(given: Mapping[str, Tensor]) -> Tensor:
        named = {"D": given["D"], "z": given["z"], "dt_bias": given["delta_bias"], "dt_softplus": True}
        arrays = (given[name] for name in ("state", "x", "delta", "A", "B", "C"))
        out: Tensor = selective_state_update(*arrays, **named)
        return out

    return Contender(MAMBA_TRITON, passes(case, forward))


def _cross_entropy(case: Nce, backend: str) -> Contender:
    labels: dict[torch.device, Tensor] = {}

    def forward(given: Mapping[str, Tensor]) -> Tensor:
        queries, keys = given["queries"], given["keys"]
        if queries.device not in labels:
            labels[queries.device] = torch.arange(len(queries), device=queries.device)
        return F.cross_entropy(queries @ keys.T / TEMPERATURE, labels[queries.device])

    return Contender(CROSS_ENTROPY, passes(case, forward))


def _conv1d(case: Conv, backend: str) -> Contender:
    def forward(given: Mapping[str, Tensor]) -> Tensor:
        weight = given["weight"][:, None]
        out = F.conv1d(given["x"], weight, given["bias"], padding=case.width - 1, groups=case.channels)
        return F.silu(out[..., : case.length])

    return Contender("F.conv1d", passes(case, forward))


_MAKERS: dict[type[Case], dict[str, Callable[[Any, str], Contender]]] = {
    Scan: {CHANNELS_LAST: _channels_last, MAMBA: _mamba, REFERENCE: _reference, COMPILED: _compiled},
    Ssd: {MAMBA_TRITON: _mamba_ssd, FLA: _fla, REFERENCE: _reference},
    Step: {MAMBA_TRITON: _mamba_step, REFERENCE: _reference},
    Nce: {CROSS_ENTROPY: _cross_entropy},
    Conv: {"F.conv1d": _conv1d},
}


def versions() -> dict[str, str]:
    """Of the packages that a row may need; "missing" where one is not installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package, module in (("triton", "triton"), ("mamba-ssm", "mamba_ssm"), ("fla-core", "fla")):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            try:
                found[package] = str(importlib.import_module(module).__version__)
            except Exception:
                found[package] = "missing"
    return found
