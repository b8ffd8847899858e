"""What the stand-ins refuse, and how packed sequences are told apart by their indices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastlvm.errors import InputError

_ACTIVATIONS = (None, "silu", "swish")


class UnsupportedError(InputError, NotImplementedError):
    """What the original has and fastlvm has not, or what neither has."""


class Runs(NamedTuple):
    """The runs of equal indices in seq_idx [B, L], as the ops take packed sequences."""

    offsets: Tensor  # [S + 1] in main memory, into the B·L tokens of all rows
    first: Tensor  # [B], the number of each row's first run
    last: Tensor  # [B], that of its last


def check_activation(op: str, activation: str | None) -> None:
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(f'{op}: activation is {activation!r}; wants None, "silu" or "swish"')


def refuse_complex(op: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.is_complex():
            raise UnsupportedError(f"{op}: {name} is complex; fastlvm has the real scan only, pass a real {name}")


def check_shape(op: str, name: str, x: Tensor | None, letters: str, shape: tuple[int, ...]) -> None:
    if x is not None and tuple(x.shape) != shape:
        raise InputError(f"{op}: {name} has shape {tuple(x.shape)}; wants {letters} = {shape}")


def check_seq_idx(op: str, seq_idx: Tensor, batch: int, length: int) -> None:
    check_shape(op, "seq_idx", seq_idx, "(B, L)", (batch, length))
    if seq_idx.dtype not in (torch.int32, torch.int64):
        raise InputError(f"{op}: seq_idx is {seq_idx.dtype}; wants torch.int32")


def runs(seq_idx: Tensor) -> Runs:
    """Where the index of a row changes, a sequence ends; so it does at the end of the row. L is at least 1."""
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    places = starts.flatten().nonzero()[:, 0]
    counts = starts.sum(dim=1)
    last = counts.cumsum(0) - 1
    offsets = torch.cat([places, places.new_tensor([seq_idx.numel()])]).cpu()
    return Runs(offsets, last - counts + 1, last)


def before_first(states: Tensor, packed: Runs) -> Tensor:
    """States [B, ...] before the first run of every row as states before all runs [S, ...], zero for the others."""
    return states.new_zeros(len(packed.offsets) - 1, *states.shape[1:]).index_copy(0, packed.first, states)


def one_row(x: Tensor) -> Tensor:
    """[B, L, ...] as [1, B·L, ...]."""
    return x.flatten(0, 1)[None]
