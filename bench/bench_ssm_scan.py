"""The selective scan, forward and backward, on every backend and instruction set that can run here.

Each timing stands beside a check of the very result that was timed against a float64 recurrence.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import fastlvm
from fastlvm import _C

# name: batch, channels, length, state
SHAPES = {"lvm B1 D1536 L5 N128": (1, 1536, 5, 128), "long B1 D1536 L512 N16": (1, 1536, 512, 16)}
ISAS = [f"cpu-{isa}" for isa in _C.isas()]
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def arguments(shape: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
    """float32, channels last in memory as a model holds them."""
    batch, channels, length, state = shape
    rng = np.random.default_rng(0)

    def draw(*sizes: int) -> np.ndarray:
        return rng.standard_normal(sizes, np.float32)

    return {
        "u": draw(batch, length, channels).transpose(0, 2, 1),
        "delta": draw(batch, length, channels).transpose(0, 2, 1),
        "A": -np.exp(0.5 * draw(channels, state)),
        "B": draw(batch, length, state).transpose(0, 2, 1),
        "C": draw(batch, length, state).transpose(0, 2, 1),
        "D": draw(channels),
        "z": draw(batch, length, channels).transpose(0, 2, 1),
        "delta_bias": draw(channels) - 2,
    }


def recurrence(args: dict[str, np.ndarray]) -> np.ndarray:
    """The scan in float64, one step at a time."""
    u, delta, A, B, C, D, z, bias = (args[name].astype(np.float64) for name in NAMES)
    step = np.logaddexp(0, delta + bias[:, None])  # softplus
    h = np.zeros((*u.shape[:2], A.shape[1]))
    out = np.empty_like(u)
    for t in range(u.shape[2]):
        h = np.exp(step[..., t, None] * A) * h + (step[..., t] * u[..., t])[..., None] * B[:, None, :, t]
        out[..., t] = (h * C[:, None, :, t]).sum(-1) + D * u[..., t]
    return out * z / (1 + np.exp(-z))


@pytest.fixture(params=[*ISAS, "reference"])
def backend(request):
    """A backend's name, with the instruction set pinned where there is one."""
    name, _, isa = request.param.partition("-")
    before = _C.isa()
    if isa:
        _C.set_isa(isa)
    yield name
    _C.set_isa(before)


def slow(name: str, backend: str) -> bool:
    """The reference takes seconds for a long sequence."""
    return backend == "reference" and SHAPES[name][2] > 100


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.benchmark(group="ssm_scan forward")
def test_forward(name, backend, timed):
    args = arguments(SHAPES[name])
    given = {key: torch.from_numpy(value) for key, value in args.items()} if backend == "reference" else args
    with torch.no_grad():
        out = timed(
            lambda: fastlvm.ssm_scan(**given, delta_softplus=True, backend=backend),
            once=slow(name, backend),
            shape=SHAPES[name],
        )
    assert relative(np.asarray(out), recurrence(args)) <= 1e-5


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.benchmark(group="ssm_scan backward")
def test_backward(name, backend, timed):
    """The gradients of every argument by torch, of a scalar over the output; the forward is not in the time."""
    loss, leaves = graph(name, torch.float32, backend)
    found = timed(
        lambda: torch.autograd.grad(loss, leaves, retain_graph=True), once=slow(name, backend), shape=SHAPES[name]
    )
    for key, got, wanted in zip(NAMES, found, exact_gradients(name), strict=True):
        assert relative(got.double().numpy(), wanted.numpy()) <= 1e-4, key


def graph(name: str, dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A scalar over the scan's output, and the arguments it depends on."""
    args = arguments(SHAPES[name])
    leaves = [torch.from_numpy(args[key]).to(dtype).requires_grad_() for key in NAMES]
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal(args["u"].shape)).to(dtype)
    out = fastlvm.ssm_scan(*leaves, delta_softplus=True, backend=backend)
    return (out * weight).sum(), leaves


@functools.cache
def exact_gradients(name: str) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(*graph(name, torch.float64, "reference"))
