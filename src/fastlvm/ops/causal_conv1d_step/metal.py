"""One token of the convolution on an Apple GPU: launches of kernels/metal/causal_conv1d_step.metal for mlx arrays."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _metal

ROWS = 16  # of the batch that a thread takes in turn, at most


def step(x: Any, state: Any, weight: Any, bias: Any, activation: str | None, state_indices: Any) -> tuple[Any, Any]:
    """Output [b, D] in x's dtype and the states [S, D, W-1 or more] after the token; `state` is left alone.

    A row whose index is negative gives zeros, one whose index is S or more NaN; neither moves a state.
    """
    import mlx.core as mx

    (rows, channels), held = x.shape, state.shape[2]
    if not (rows and channels and state.shape[0]):
        return mx.zeros(x.shape, x.dtype), state
    flags = _metal.flags(
        {
            _metal.HAS_BIAS: bias is not None,
            _metal.SILU: activation is not None,
            _metal.INDEXED: state_indices is not None,
        }
    )
    group = _metal.rows_of(channels, 1)
    blocks = -(-channels // group)
    turns = max(1, min(ROWS, rows * blocks // _metal.GROUPS))
    results = _metal.launch(
        "causal_conv1d_step",
        inputs={
            "x": x,
            "state": state if held else None,
            "weight": _metal.contiguous(weight),
            "bias": _metal.contiguous(bias),
            "indices": _metal.integers(state_indices),
            "plan": mx.array([flags, state.shape[0], held, turns, rows], dtype=mx.int32),
        },
        outputs={"out": (x.shape, x.dtype), "moved": ((rows, channels, held) if held else None, state.dtype)},
        template={"T": x.dtype, "T_state": state.dtype, "W": weight.shape[1]},
        grid=(blocks, -(-rows // turns), 1),
        group=group,
    )
    return results["out"], _metal.put(state, state_indices, results["moved"]) if held else state
