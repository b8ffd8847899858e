"""Large results lie in huge pages where the system has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastlvm

SMAPS = Path("/proc/self/smaps")
pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not SMAPS.exists(), reason="wants Linux's huge pages"
)


def _asks_for_huge_pages(tensor):
    """Whether the mapping that holds the middle of a tensor was advised so."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in SMAPS.read_text().splitlines():
        key, _, rest = line.partition(" ")
        if key == "VmFlags:" and inside:
            return "hg" in rest.split()
        if not key.endswith(":"):
            begin, end = (int(number, 16) for number in key.split("-"))
            inside = begin <= address < end
    raise AssertionError(f"{address:x} is nowhere")


def _scan(length):
    u = torch.randn(1, length, 64).transpose(1, 2).requires_grad_()
    B = torch.randn(1, 2, length)
    return u, fastlvm.ssm_scan(u, u.detach().abs(), -torch.rand(64, 2), B, B)


def _conv(length):
    x = torch.randn(1, 64, length, requires_grad=True)
    return x, fastlvm.causal_conv1d(x, torch.randn(64, 4))


def _ssd(length):
    x = torch.randn(1, length, 4, 16, requires_grad=True)
    B = torch.randn(1, length, 1, 4)
    return x, fastlvm.ssd_scan(x, torch.rand(1, length, 4), -torch.rand(4), B, B)


# As far as it can be told: an allocator that asks for them itself gives nothing away.
@pytest.mark.parametrize("op", [_scan, _conv, _ssd])
def test_large_outputs_and_gradients_are_asked_for_in_huge_pages(op):
    x, out = op(1 << 18)  # 64 MB: more than malloc ever takes from memory that it has
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert _asks_for_huge_pages(out)
    assert _asks_for_huge_pages(grad)
