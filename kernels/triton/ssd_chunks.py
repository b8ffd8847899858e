"""What the kernels of the scan of Mamba-2 share: how a call is cut into chunks, and how tiles are read and written."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
PROGRAMS = 1024  # enough for every multiprocessor of a large GPU, several times


@triton.jit
def wide(i):
    """i in 64 bits, whatever it is: a number known while compiling has no `.to`."""
    return tl.full([], 0, tl.int64) + i


@triton.jit
def span(k, table, length, per_row, Q: tl.constexpr, PACKED: tl.constexpr):
    """Row of the batch, first token and number of tokens of chunk k."""
    if PACKED:
        row, begin = 0 * k, tl.load(table + 2 * k)
        count = tl.load(table + 2 * k + 1)
    else:
        row, begin = k // per_row, k % per_row * Q
        count = tl.minimum(length - begin, Q)
    return wide(row), wide(begin), count


@triton.jit
def chunks_of(sequence, table, per_row, count, PACKED: tl.constexpr):
    """First chunk of a sequence, and of the next one."""
    if PACKED:
        first, end = tl.load(table + 2 * count + sequence), tl.load(table + 2 * count + sequence + 1)
    else:
        first, end = sequence * per_row, sequence * per_row + per_row
    return first, end


@triton.jit
def tile(at, rows, live, columns, strides, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, columns] at `at`: 0 where a row is not live and from column WIDTH on."""
    mask = live[:, None]
    if WIDTH % BLOCK:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(at + rows[:, None] * strides[0] + columns[None, :] * strides[1], mask=mask, other=0.0)


@triton.jit
def put(at, value, rows, live, columns, strides, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write [rows, columns] where `tile` reads them."""
    mask = live[:, None]
    if WIDTH % BLOCK:
        mask = mask & (columns < WIDTH)[None, :]
    tl.store(at + rows[:, None] * strides[0] + columns[None, :] * strides[1], value, mask=mask)


class Plan(NamedTuple):
    """How a call is cut: `count` chunks of Q tokens, rows of `per_row` chunks or, packed, a table of them."""

    Q: int
    T: int  # tokens a program has for itself
    BP: int
    BN: int
    half: bool
    dot: torch.dtype
    precision: str
    count: int
    per_row: int
    sequences: int
    table: Tensor | None  # int32: begin and length of every chunk, then the first chunk of every sequence, then `count`
    across: dict[str, Any]  # how the kernels are launched that go from chunk to chunk
    within: dict[str, Any]  # and those that go from head to head

    @property
    def dots(self) -> dict[str, Any]:
        return {"Q": self.Q, "DOT": _TYPES[self.dot], "PRECISION": self.precision}

    @property
    def where(self) -> dict[str, Any]:
        return {"PACKED": self.table is not None}


def plan(x: Tensor, B: Tensor, C: Tensor, offsets: Sequence[int] | None) -> Plan:
    """The plan for a call; `offsets` are those of packed sequences."""
    batch, length, _, dim = x.shape
    half = x.dtype != torch.float32 and x.dtype == B.dtype == C.dtype
    target, arch = "interpreter", None
    if not triton.knobs.runtime.interpret:
        device = triton.runtime.driver.active.get_current_target()
        target, arch = device.backend, device.arch
    if half:
        dot, precision = x.dtype, "ieee"
        Q, T, BP, BN = 128, 64, 64, 128
    else:
        dot, precision = torch.float32, "tf32x3" if target == "cuda" else "ieee"
        Q, T, BP, BN = 64, 32, 32, 32
    if target == "hip":  # 64 KiB of shared memory
        Q, BN = min(Q, 64), min(BN, 64)
    if target == "interpreter" and dot == torch.bfloat16:
        dot = torch.float32  # it multiplies the bits of bfloat16 as integers
    across, within = {"num_warps": 4, "num_stages": 2}, {"num_warps": 4, "num_stages": 2}
    if half and arch == 90:  # three programs on a multiprocessor; without the limit there is room for two
        across["maxnreg"] = 168
    if max(dim, B.shape[3]) > (256 if arch in (90, 100) else 128):  # no room in shared memory for two stages
        within["num_stages"] = 1
    longest = length if offsets is None else max((b - a for a, b in pairwise(offsets)), default=0)
    Q = min(Q, _block(longest))
    T, BP, BN = min(T, Q), min(BP, _block(dim)), min(BN, _block(B.shape[3]))
    if offsets is None:
        per_row = triton.cdiv(length, Q)
        return Plan(Q, T, BP, BN, half, dot, precision, batch * per_row, per_row, batch, None, across, within)
    chunks, firsts = [], [0]
    for begin, end in pairwise(offsets):
        chunks += [n for at in range(begin, end, Q) for n in (at, min(Q, end - at))]
        firsts.append(len(chunks) // 2)
    table = torch.tensor(chunks + firsts, dtype=torch.int32).to(x.device, non_blocking=True)
    return Plan(Q, T, BP, BN, half, dot, precision, firsts[-1], 0, len(offsets) - 1, table, across, within)


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def near(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, contiguous copies of those inside whose tiles an offset may pass 32 bits."""

    def far(x: Tensor) -> bool:
        return any(stride * min(size, 512) >= 2**30 for stride, size in zip(x.stride()[1:], x.shape[1:], strict=True))

    return [x.contiguous() if x is not None and far(x) else x for x in tensors]


def shares(heads: int, programs: int, wanted: int = PROGRAMS) -> tuple[int, int]:
    """How many of the heads of a group a program takes, and how many programs that is for each of `programs`."""
    parts = min(max(heads, 1), triton.cdiv(wanted, max(programs, 1)))
    share = max(1, triton.cdiv(heads, parts))
    return share, triton.cdiv(heads, share)


def strides(x: Tensor | None, rank: int = 4) -> tuple[int, ...]:
    """Strides of x, 0 for those it lacks."""
    own = () if x is None else x.stride()
    return (*own, *[0] * (rank - len(own)))
