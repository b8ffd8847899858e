"""What the reference backends share: they run wherever torch is, for any arguments."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def supports(*args: Any) -> tuple[bool, str]:
    if find_spec("torch") is None:
        return False, "torch is not installed"
    return True, describe()


def describe() -> str:
    return "plain PyTorch"
