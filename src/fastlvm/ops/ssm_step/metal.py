"""One token of the selective scan on an Apple GPU: launches of kernels/metal/ssm_step.metal for mlx arrays."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _metal

MOST_STATES = 8  # of a lane
ROWS = 16  # of the batch that a threadgroup takes in turn, at most


def step(
    state: Any,
    x: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    delta_bias: Any,
    delta_softplus: bool,
    state_indices: Any,
) -> tuple[Any, Any]:
    """Output [b, D] in x's dtype and the states [S, D, N] after the token, in the state's dtype; `state` is left alone.

    A row whose index is negative gives zeros, one whose index is S or more NaN; neither moves a state.
    """
    import mlx.core as mx

    (rows, channels), size = x.shape, A.shape[1]
    if not (rows and channels and state.shape[0]):
        return mx.zeros(x.shape, x.dtype), state
    held = state if size else mx.zeros((state.shape[0], channels, 1))
    lanes, states = _metal.lanes_of(max(size, 1), MOST_STATES)
    channel_rows = _metal.rows_of(channels, lanes)
    blocks = -(-channels // channel_rows)
    turns = max(1, min(ROWS, rows * blocks // _metal.GROUPS))
    flags = _metal.flags(
        {
            _metal.HAS_D: D is not None,
            _metal.HAS_Z: z is not None,
            _metal.HAS_BIAS: delta_bias is not None,
            _metal.SOFTPLUS: delta_softplus,
            _metal.INDEXED: state_indices is not None,
        }
    )
    results = _metal.launch(
        "ssm_step",
        inputs={
            "state": held,
            "x": x,
            "delta": delta,
            "A": _metal.contiguous(A) if size else None,
            "B": _grouped(B if size else None),
            "C": _grouped(C if size else None),
            "D": _metal.contiguous(D),
            "z": z,
            "delta_bias": _metal.contiguous(delta_bias),
            "indices": _metal.integers(state_indices),
            "plan": mx.array([flags, turns, rows, state.shape[0], size], dtype=mx.int32),
        },
        outputs={"out": (x.shape, x.dtype), "moved": ((rows, channels, max(size, 1)), held.dtype)},
        template={"T": x.dtype, "T_state": held.dtype, "LANES": lanes, "S": states},
        grid=(blocks, -(-rows // turns), 1),
        group=channel_rows * lanes,
    )
    return results["out"], _metal.put(state, state_indices, results["moved"]) if size else state


def _grouped(M: Any) -> Any:
    """B or C as [b, G, N]."""
    return M[:, None] if M is not None and M.ndim == 2 else M
