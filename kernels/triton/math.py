"""What the kernels share: functions of floats, in float32.

Those of libdevice flush subnormal numbers to zero, which spares each exponential three instructions that scale them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

COMPILED: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter knows no libdevice
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(x):
    if COMPILED:
        return libdevice.exp2(x)
    else:
        return tl.exp2(x)


@triton.jit
def divide(x, y):
    """x / y, two units in the last place off at most; 0 where y is beyond 2^126."""
    if COMPILED:
        return libdevice.fast_dividef(x, y)
    else:
        return x / y


@triton.jit
def sigmoid(x):
    return divide(1.0, 1.0 + exp2(x * -LOG2E))


@triton.jit
def softplus(x):
    """log(1 + exp(x)); x itself above 20, as the reference has it."""
    e = exp2(x * LOG2E)
    # 1 + e drops what is small in e, where a few terms of the series are exact.
    series = e * (1.0 + e * (-0.5 + e * (1 / 3 + e * (-0.25 + e * (0.2 + e * (-1 / 6))))))
    y = tl.where(e < 0.0625, series, tl.log(1.0 + e))
    return tl.where(x > 20.0, x, y)
