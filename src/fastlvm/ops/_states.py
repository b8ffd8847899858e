"""The states of a linear recurrence in torch's own operators, for graphs that leave fastlvm behind.

    h_t = decay_t h_{t-1} + inputs_t

Time is cut into chunks, which all go through their few steps at once; then the same is done to what the chunks end
with (Blelloch, "Prefix sums and their applications", 1990). Factors are multiplied, never divided by: they may vanish.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

_CHUNK = 16
_LONGEST = 1 << 24


def states(
    op: str, decay: Tensor, inputs: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state after every time, [B, L, ..], and after the last of every sequence, [B, ..] or [S, ..].

    Args:
        op: whose length it is, for the message.
        decay, inputs: [B, L, ..], decay with axes of size 1 where it is shared.
        initial_state: [B, ..] or [S, ..]; zero when None.
        cu_seqlens: offsets [S + 1] where B is 1.

    Raises:
        ValueError: the length is a symbol without an upper bound.
    """
    if initial_state is not None:
        initial_state = initial_state.to(inputs.dtype)
    if cu_seqlens is not None:
        return _packed(op, decay, inputs, initial_state, cu_seqlens)
    if initial_state is None:
        initial_state = inputs.new_zeros(inputs.shape[0], *inputs.shape[2:])
    else:
        inputs = inputs + torch.where(_along(_times(inputs) == 0, inputs), decay * initial_state[:, None], 0.0)
    h = _scanned(decay, inputs, _longest(op, inputs.shape[1]))
    return h, torch.cat([initial_state[:, None], h], dim=1)[:, -1]


def _packed(
    op: str, decay: Tensor, inputs: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    begins, ends, sequence = packed_times(cu_seqlens.to(inputs.device), inputs.shape[1])
    first = _along(_times(inputs) == begins.index_select(0, sequence), inputs)
    if initial_state is not None:
        inputs = inputs + torch.where(first, decay * initial_state.index_select(0, sequence), 0.0)
    h = _scanned(torch.where(first, 0.0, decay), inputs, _longest(op, inputs.shape[1]))
    nothing = h.new_zeros(1, *h.shape[2:])
    after = torch.cat([nothing, h[0]]).index_select(0, ends)  # [S, ..], wrong for a sequence without a time
    unmoved = nothing if initial_state is None else initial_state
    return h, torch.where((begins == ends).view(-1, *[1] * (h.ndim - 2)), unmoved, after)


class PackedTimes(NamedTuple):
    """Begin and end of every sequence [S], sequence of every time [L]."""

    begins: Tensor
    ends: Tensor
    sequence: Tensor


def packed_times(cu_seqlens: Tensor, length: Any) -> PackedTimes:
    """What `cu_seqlens` [S + 1] packs into a length; offsets that do not fit are not noticed."""
    offsets = cu_seqlens.long()
    begins, ends = offsets[:-1], offsets[1:]
    ended = torch.zeros(length + 1, dtype=torch.long, device=ends.device).scatter_add(0, ends, torch.ones_like(ends))
    return PackedTimes(begins, ends, ended.cumsum(0)[:length])


def _times(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)


def _along(times: Tensor, x: Tensor) -> Tensor:
    """[L] as [1, L, 1, ..], to go with x [B, L, ..]."""
    return times.view(1, -1, *[1] * (x.ndim - 2))


def _scanned(decay: Tensor, inputs: Tensor, longest: int) -> Tensor:
    """The state after every time, of which there are at most `longest`, from a zero state."""
    length, chunk = inputs.shape[1], min(_CHUNK, longest)
    spare = 0 if isinstance(length, int) else 2  # a number of chunks that might be one would become a constant
    chunks = 1 if longest <= chunk else (length + chunk - 1) // chunk + spare
    whole = isinstance(length, int) and length == chunks * chunk

    def steps(x: Tensor, neutral: float) -> tuple[Tensor, ...]:
        """Those of every chunk, [B, K, ..]; what lacks is filled up."""
        if not whole:
            times = torch.arange(chunks * chunk, device=x.device).clamp(max=length)
            x = torch.cat([x, x.new_full((x.shape[0], 1, *x.shape[2:]), neutral)], dim=1).index_select(1, times)
        return x.unflatten(1, (chunks, chunk)).unbind(2)

    factors: list[Tensor] = []
    states: list[Tensor] = []
    for factor, state in zip(steps(decay, 1.0), steps(inputs, 0.0), strict=True):
        states.append(torch.addcmul(state, factor, states[-1]) if states else state)
        factors.append(factor * factors[-1] if factors else factor)
    h = torch.stack(states, dim=2)
    if longest > chunk:
        ends = _scanned(factors[-1], states[-1], (longest + chunk - 1) // chunk + spare)
        before = torch.cat([ends.new_zeros(ends.shape[0], 1, *ends.shape[2:]), ends], dim=1)[:, :chunks]
        h = torch.addcmul(h, torch.stack(factors, dim=2), before[:, :, None])
    h = h.flatten(1, 2)
    return h if whole else h.index_select(1, _times(inputs))


def _longest(op: str, length: Any) -> int:
    """The length, or the most that a symbol for it can be."""
    if isinstance(length, int):
        return max(length, 1)
    longest = 1
    while not statically_known_true(length <= longest):
        longest *= 2
        if longest > _LONGEST:
            raise ValueError(
                f"{op}: the length {length} may be more than {_LONGEST}, the most that can be decomposed; give it an "
                'upper bound in dynamic_shapes, such as torch.export.Dim("length", max=4096)'
            )
    return longest
