"""What the reference backends share: they run wherever torch is, for any arguments; for mlx arrays they are mlx's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fastlvm.ops import _arrays

if TYPE_CHECKING:
    from torch import Tensor


def supports(x: Any, *args: Any) -> tuple[bool, str]:
    if _arrays.kind(x) != "mlx" and find_spec("torch") is None:
        return False, "torch is not installed"
    return True, describe()


def describe() -> str:
    return "plain PyTorch; plain mlx for its arrays"


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which products of matrices on x's device keep their dtypes, whatever torch.autocast says."""
    import torch

    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def each_sequence(
    op: str, cu_seqlens: Tensor, length: int, run: Callable[[slice, slice | None], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Packed sequences one by one: outputs [1, D, L] and final states [S, D, ..].

    `run(times, sequence)` gives output and final state of one sequence from its slices of time and of the states; no
    sequence stands for a zero state.
    """
    import torch

    offsets = checked_offsets(op, cu_seqlens, length)
    if len(offsets) == 1:  # no sequence at all
        out, state = run(slice(0, 0), None)
        return out, state[:0]
    pairs = enumerate(pairwise(offsets))
    outs, states = zip(*(run(slice(begin, end), slice(s, s + 1)) for s, (begin, end) in pairs), strict=True)
    return torch.cat(outs, dim=-1), torch.cat(states)


def checked_offsets(op: str, cu_seqlens: Any, length: int) -> list[int]:
    """The offsets as numbers; ValueError unless they run from 0 to `length` without a fall."""
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"{op}: cu_seqlens begins with {offsets[0]}; wants 0")
    for before, after in pairwise(offsets):
        if after < before:
            raise ValueError(f"{op}: cu_seqlens falls from {before} to {after}; wants offsets that do not fall")
    if offsets[-1] != length:
        raise ValueError(f"{op}: cu_seqlens ends with {offsets[-1]}; wants the length {length}")
    return offsets
