"""What the triton backends of all ops share: where they run, on what, and how their custom ops are named.

On a GPU the kernels are compiled on their first call. With TRITON_INTERPRET=1 in the environment before that they run
on the CPU instead, element by element in numpy: slow, and what the tests without a GPU hold them to.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fastlvm.ops import _arrays, _plain

if TYPE_CHECKING:
    from torch import Tensor

INSTALLED = find_spec("triton") is not None  # asked once: a compiler cannot trace the question
SUFFIX = "_triton"  # of the custom ops, beside those of the cpu backend


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on tensors in main memory."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def supports(*arrays: Any) -> tuple[bool, str]:
    """Whether the kernels can take a call with these arrays (None is skipped), and why not."""
    lead = arrays[0]
    if _arrays.kind(lead) != "torch":
        return False, "wants torch tensors on a GPU"
    kind = lead.device.type
    if kind != "cuda" and not (kind == "cpu" and interpreted()):
        return False, f"arrays are on {lead.device}, wants a GPU"
    if not INSTALLED:
        return False, "triton is not installed"
    if any(x is not None and _arrays.dtype_name(x) == "float64" for x in arrays):
        return False, "float64 has no kernel; wants float32, float16 or bfloat16"
    return True, "kernels in Triton"


def yields(*args: Any) -> str:
    """Why "auto" goes on to the next backend: numpy runs the kernels as a test only."""
    return "its kernels are interpreted here" if interpreted() else ""


def describe() -> str:
    """What would run: Triton's version and the device."""
    return f"Triton {_version()}, {'interpreted' if interpreted() else _device()}"


@cache
def _version() -> str:
    from importlib.metadata import version

    return version("triton")


@cache
def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def on_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, with the device of its first tensor as the current one, where Triton launches."""

    def run(*args: Any) -> Any:
        import torch

        device = next(x for x in args if isinstance(x, torch.Tensor)).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return kernel(*args)
        with torch.cuda.device(device):
            return kernel(*args)

    return run


def offsets(op: str, cu_seqlens: Tensor, length: int, device: Any) -> tuple[Tensor, int]:
    """The offsets of packed sequences, int64 on the device, and the length of the longest.

    Raises:
        ValueError: they do not begin with 0, fall, or do not end with `length`.
    """
    import torch

    values = _plain.checked_offsets(op, cu_seqlens, length)
    longest = max((after - before for before, after in pairwise(values)), default=0)
    return torch.tensor(values, dtype=torch.int64).to(device), longest
