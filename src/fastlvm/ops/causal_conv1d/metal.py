"""The causal convolution on an Apple GPU: launches of kernels/metal/causal_conv1d*.metal for mlx arrays."""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _metal

STEPS = 32  # of a channel that a thread has
BATCHES = 16  # that a thread takes in turn, at most
GRADIENTS = ("x", "weight", "bias", "initial_state")


def conv(
    x: Any,
    weight: Any,
    bias: Any,
    activation: str | None,
    initial_state: Any,
    cu_seqlens: Any,
    return_final_state: bool,
) -> tuple[Any, Any]:
    """Output [B, D, L] and, where it is wanted, the final state [B or S, D, W-1], both in x's dtype."""
    import mlx.core as mx

    batch, channels, _ = x.shape
    width = weight.shape[1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_shape = (sequences, channels, width - 1)
    wanted = return_final_state and width > 1
    if not x.size:
        final = mx.zeros(final_shape, x.dtype) if initial_state is None else initial_state.astype(x.dtype)
        return mx.zeros(x.shape, x.dtype), final if return_final_state else None
    flags = _flags(bias, activation, initial_state, cu_seqlens) | _metal.FINAL * wanted
    grid, group, turns = _grid(x)
    results = _metal.launch(
        "causal_conv1d",
        inputs={
            **_operands(x, weight, bias, initial_state, cu_seqlens),
            "plan": mx.array([flags, sequences, turns, batch], dtype=mx.int32),
        },
        outputs={"out": (x.shape, x.dtype), "final_state": (final_shape if wanted else None, x.dtype)},
        template={"T": x.dtype, "W": width, "STEPS": STEPS},
        grid=(grid, -(-batch // turns), 1),
        group=group,
    )
    final = results["final_state"]
    return results["out"], mx.zeros(final_shape, x.dtype) if return_final_state and not wanted else final


def conv_bwd(
    grad_out: Any,
    grad_final_state: Any,
    x: Any,
    weight: Any,
    bias: Any,
    activation: str | None,
    initial_state: Any,
    cu_seqlens: Any,
) -> tuple[Any, ...]:
    """Gradients of the arrays in `GRADIENTS`, each in its shape and dtype, None for what was not given.

    Either of the two cotangents, [B, D, L] and [B or S, D, W-1], may be None.
    """
    import mlx.core as mx

    batch, channels, length = x.shape
    width = weight.shape[1]
    given = (x, weight, bias, initial_state)
    if not x.size:
        zeros = [None if a is None else mx.zeros(a.shape, a.dtype) for a in given]
        if initial_state is not None and grad_final_state is not None:
            zeros[3] = grad_final_state.astype(initial_state.dtype)
        return tuple(zeros)
    if width == 1:  # states without an element, which have no buffer
        initial_state = grad_final_state = None
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    flags = _flags(bias, activation, initial_state, cu_seqlens)
    flags |= _metal.HAS_DOUT * (grad_out is not None) | _metal.HAS_DFINAL * (grad_final_state is not None)
    grid, group, turns = _grid(x)
    spans, tiles = -(-batch // turns), -(-length // STEPS)
    results = _metal.launch(
        "causal_conv1d_bwd",
        inputs={
            **_operands(x, weight, bias, initial_state, cu_seqlens),
            "grad_out": grad_out,
            "grad_final": _metal.contiguous(grad_final_state),
            "plan": mx.array([flags, sequences, turns, batch], dtype=mx.int32),
        },
        outputs={
            "dx": (x.shape, x.dtype),
            "dinitial": (None if initial_state is None else initial_state.shape, mx.float32),
            "sums": ((spans * tiles, channels, width + 1), mx.float32),
        },
        template={"T": x.dtype, "W": width, "STEPS": STEPS},
        grid=(grid, spans, 1),
        group=group,
    )
    sums = results["sums"].sum(0)  # [D, W + 1]
    dinitial = results["dinitial"]
    if width == 1 and given[3] is not None:
        dinitial = mx.zeros(given[3].shape)
    grads = (results["dx"], sums[:, :width], sums[:, width], dinitial)
    return tuple(None if a is None else grad.astype(a.dtype) for a, grad in zip(given, grads, strict=True))


def _grid(x: Any) -> tuple[int, int, int]:
    """Threadgroups for all tiles of STEPS steps of all channels, their threads, and entries of the batch in turn."""
    items = x.shape[1] * -(-x.shape[2] // STEPS)
    group = _metal.rows_of(items, 1)
    groups = -(-items // group)
    return groups, group, max(1, min(BATCHES, x.shape[0] * groups // _metal.GROUPS))


def _flags(bias: Any, activation: str | None, initial_state: Any, cu_seqlens: Any) -> int:
    return _metal.flags(
        {
            _metal.HAS_BIAS: bias is not None,
            _metal.SILU: activation is not None,
            _metal.HAS_INITIAL: initial_state is not None,
            _metal.PACKED: cu_seqlens is not None,
        }
    )


def _operands(x: Any, weight: Any, bias: Any, initial_state: Any, cu_seqlens: Any) -> dict[str, Any]:
    return {
        "x": x,
        "weight": _metal.contiguous(weight),
        "bias": _metal.contiguous(bias),
        "initial": _metal.contiguous(initial_state if weight.shape[1] > 1 else None),
        "offsets": _metal.integers(cu_seqlens),
    }
