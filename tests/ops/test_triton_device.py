"""Launches go to the device of the tensors, whichever is the current one."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch

from fastlvm.ops import _triton


class _Elsewhere(torch.Tensor):
    """A tensor that says it is on the second GPU."""

    device = SimpleNamespace(type="cuda", index=1)


def test_the_device_of_the_tensors_is_current_while_a_kernel_runs(monkeypatch):
    current = [0]

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    kernel = _triton.on_device(lambda *args: current[-1])
    there = torch.zeros(1).as_subclass(_Elsewhere)
    assert kernel(None, there, torch.zeros(1)) == 1
    assert kernel(torch.zeros(1)) == 0
    current.append(1)
    assert kernel(there) == 1
