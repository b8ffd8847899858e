"""What the kernels share: functions of floats, in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)); x itself above 20, as the reference has it."""
    e = tl.exp(tl.minimum(x, 20.0))
    # log(1 + e) loses what is small in e; log(w) e / (w - 1) with w = 1 + e does not, wherever 1 + e rounds.
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(x > 20.0, x, log1p)
