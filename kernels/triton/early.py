"""Launches that begin before the kernel ahead of them has ended (programmatic dependent launch, from sm_90 on).

Such a kernel asks for its weights first, then waits for what the one before it wrote: every kernel in the chain calls
`wait` before it reads or writes what another one touches, so that none overtakes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_WANTED: ContextVar[bool] = ContextVar("early launches", default=False)


@triton.jit
def begin(EARLY: tl.constexpr):
    """The kernel that follows may begin."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait(EARLY: tl.constexpr):
    """Until the kernel before has ended and what it wrote can be seen."""
    if EARLY:
        gdc_wait()


@triton.jit
def here(value, EARLY: tl.constexpr):
    """The value, of which no conversion between layouts comes before this: a barrier among loads makes each wait."""
    if EARLY:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], value.dtype, is_pure=False, pack=1)
    else:
        return value


@triton.jit
def all_here(values, EARLY: tl.constexpr):
    found = ()
    for i in tl.static_range(len(values)):
        found += (here(values[i], EARLY),)
    return found


@contextmanager
def early(wanted: bool = True) -> Iterator[None]:
    """Inside, kernels that can are launched early where the GPU can."""
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


def options() -> dict[str, Any]:
    """What a launch of a kernel with EARLY is given."""
    if not _WANTED.get() or triton.knobs.runtime.interpret:
        return {"EARLY": False}
    target: Any = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or target.arch < 90:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}
