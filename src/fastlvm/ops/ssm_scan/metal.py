"""The selective scan on an Apple GPU: launches of kernels/metal/ssm_scan*.metal for mlx arrays."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fastlvm.ops import _metal

STEPS = 8  # of a block of time
SUMMED = 16  # states whose sums over channels the long backward has in threadgroup memory
TURNS = 8  # channels one after the other that it adds up there, at most
ENOUGH = 32768  # threads of a forward, from where on a lane takes more states: first 16, then 8, then 4
BATCHES = 64  # that a threadgroup takes in turn, at most
SHORT, SHORT_STATES = 8, 4  # steps, and states of a lane, of a backward that keeps all of them in registers
SUMS = 512 << 20  # bytes of sums over channels, from where on a threadgroup takes more channels in turn
GRADIENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


class Shape(NamedTuple):
    """What a launch asks about a call. A unit is a run of channels that share a group of B and one of C."""

    batch: int
    channels: int
    length: int
    state: int
    groups_B: int
    groups_C: int
    units: int
    sequences: int

    @classmethod
    def of(cls, u: Any, A: Any, B: Any, C: Any, cu_seqlens: Any) -> Shape:
        batch, channels, length = u.shape
        in_B, in_C = (M.shape[1] if M.ndim == 4 else 1 for M in (B, C))
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return cls(batch, channels, length, A.shape[1], in_B, in_C, math.lcm(in_B, in_C), sequences)

    @property
    def per_unit(self) -> int:
        return self.channels // self.units

    @property
    def chunk(self) -> int:
        """Steps between the states that are kept for the backward, a multiple of the lanes of a simdgroup."""
        return 128 if self.state <= SUMMED else 256

    @property
    def empty(self) -> bool:
        """Whether nothing is to be scanned: no step, no state, or nothing at all."""
        return not (self.sequences and self.channels and self.length and self.state)

    @property
    def keeps(self) -> bool:
        """Whether there are states to keep for the backward: a sequence may have a second chunk."""
        return not self.empty and self.length > self.chunk

    @property
    def kept_rows(self) -> int:
        """States before every chunk, those before the first one included."""
        if self.sequences == self.batch:
            return self.batch * -(-self.length // self.chunk)
        return self.length // self.chunk + self.sequences


def scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    delta_bias: Any,
    delta_softplus: bool,
    initial_state: Any,
    cu_seqlens: Any,
    return_final_state: bool,
    keep: bool = False,
) -> tuple[Any, Any, Any]:
    """Output [B, D, L] in u's dtype, final state [B or S, D, N] in float32 or None, and what `scan_bwd` takes as kept.

    `keep` leaves the states before every chunk of steps for the backward; None where no sequence has a second chunk.
    """
    import mlx.core as mx

    shape = Shape.of(u, A, B, C, cu_seqlens)
    keep = keep and shape.keeps
    final_shape = (shape.sequences, shape.channels, shape.state)
    if shape.empty:
        return *_without_steps(u, D, z, initial_state, final_shape, return_final_state), None
    lanes, states = _forward_lanes(shape)
    rows = _metal.rows_of(shape.per_unit, lanes, copies=shape.units * shape.sequences)
    blocks = -(-shape.per_unit // rows)
    turns = 1
    if cu_seqlens is None and shape.length <= STEPS:
        turns = max(1, min(BATCHES, shape.batch * shape.units * blocks // _metal.GROUPS))
    flags = _flags(D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, B, C)
    flags |= _metal.KEEP * keep | _metal.FINAL * return_final_state
    results = _metal.launch(
        "ssm_scan",
        inputs={
            **_operands(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens),
            "plan": mx.array([flags, shape.per_unit, blocks, turns, shape.sequences, shape.state], dtype=mx.int32),
        },
        outputs={
            "out": (u.shape, u.dtype),
            "final_state": (final_shape if return_final_state else None, mx.float32),
            "kept": ((shape.kept_rows, shape.channels, shape.state) if keep else None, mx.float32),
        },
        template={
            "T": u.dtype,
            "LANES": lanes,
            "S": states,
            "STEPS": STEPS,
            "STAGED": 2 * STEPS * lanes * states * 4 <= 3 * _metal.SHARED_BYTES // 4,
            "CHUNK": shape.chunk,
        },
        grid=(shape.units * blocks, -(-shape.sequences // turns), 1),
        group=rows * lanes,
    )
    return results["out"], results["final_state"], results["kept"]


def _forward_lanes(shape: Shape) -> tuple[int, int]:
    """Lanes of a channel and states of a lane: the fewer lanes, the more channels share what a threadgroup stages."""
    for most in (16, 8):
        lanes, states = _metal.lanes_of(shape.state, most)
        if shape.sequences * shape.channels * lanes >= ENOUGH:
            return lanes, states
    return _metal.lanes_of(shape.state, 4)


def _without_steps(
    u: Any, D: Any, z: Any, initial_state: Any, final_shape: tuple[int, ...], return_final_state: bool
) -> tuple[Any, Any]:
    """Where nothing is to be scanned."""
    import mlx.core as mx

    final = None
    if return_final_state:
        final = mx.zeros(final_shape) if initial_state is None else initial_state.astype(mx.float32)
    y = mx.zeros(u.shape)
    if D is not None:
        y = D.astype(mx.float32)[:, None] * u.astype(mx.float32)
    if z is not None:
        gate = z.astype(mx.float32)
        y = y * gate * mx.sigmoid(gate)
    return y.astype(u.dtype), final


def _flags(
    D: Any, z: Any, delta_bias: Any, delta_softplus: bool, initial_state: Any, cu_seqlens: Any, B: Any, C: Any
) -> int:
    return _metal.flags(
        {
            _metal.HAS_D: D is not None,
            _metal.HAS_Z: z is not None,
            _metal.HAS_BIAS: delta_bias is not None,
            _metal.SOFTPLUS: delta_softplus,
            _metal.HAS_INITIAL: initial_state is not None,
            _metal.PACKED: cu_seqlens is not None,
            _metal.B_CONSTANT: B.ndim == 2,
            _metal.C_CONSTANT: C.ndim == 2,
        }
    )


def _operands(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, initial_state: Any, cu_seqlens: Any
) -> dict[str, Any]:
    return {
        "u": u,
        "delta": delta,
        "A": _metal.contiguous(A),
        "B": _four_axes(B),
        "C": _four_axes(C),
        "D": _metal.contiguous(D),
        "z": z,
        "delta_bias": _metal.contiguous(delta_bias),
        "initial": _metal.contiguous(initial_state),
        "offsets": _metal.integers(cu_seqlens),
    }


def _four_axes(M: Any) -> Any:
    """B or C in any layout as [B, G, N, L], a constant one as [1, D, N, 1]: views."""
    if M.ndim == 2:
        return M[None, :, :, None]
    return M[:, None] if M.ndim == 3 else M


def scan_bwd(
    grad_out: Any,
    grad_final_state: Any,
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    delta_bias: Any,
    delta_softplus: bool,
    initial_state: Any,
    cu_seqlens: Any,
    kept: Any = None,
) -> tuple[Any, ...]:
    """Gradients of the arrays in `GRADIENTS`, each in its shape and dtype, None for what was not given.

    Either of the two cotangents, [B, D, L] and [B or S, D, N], may be None. `kept` is what `scan` with keep=True left;
    without it that scan is run once more where it is needed.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens)
    shape = Shape.of(u, A, B, C, cu_seqlens)
    if shape.empty:
        return _bwd_without_steps(grad_out, grad_final_state, inputs)
    if kept is None and shape.keeps:
        kept = scan(*inputs, return_final_state=False, keep=True)[2]
    short = cu_seqlens is None and shape.length <= SHORT and shape.state <= SHORT_STATES * _metal.LANES
    found = (_short_bwd if short else _long_bwd)(shape, grad_out, grad_final_state, inputs, kept)
    names = {"u": "du", "delta": "ddelta", "z": "dz", "initial_state": "dinitial"}
    sums = {"A": "dA", "D": "dD", "delta_bias": "dbias"}
    grads = {key: found[name] for key, name in names.items()}
    grads |= {key: None if found[name] is None else found[name].sum(0) for key, name in sums.items()}
    for key, name, groups, M in (("B", "dB", shape.groups_B, B), ("C", "dC", shape.groups_C, C)):
        grads[key] = found[name].sum(0) if M.ndim == 2 else _by_group(found[name], groups, M.ndim)
    given = dict(zip(GRADIENTS, (u, delta, A, B, C, D, z, delta_bias, initial_state), strict=True))
    return tuple(None if x is None else grads[key].astype(x.dtype) for key, x in given.items())


def _long_bwd(shape: Shape, grad_out: Any, grad_final: Any, inputs: tuple[Any, ...], kept: Any) -> dict[str, Any]:
    import mlx.core as mx

    lanes = _metal.LANES
    steps = next(k for k in (1, 2, 4, 8) if k * lanes >= min(shape.length, shape.chunk))
    rows = _metal.rows_of(shape.per_unit, lanes)
    most = -(-shape.per_unit // rows)
    sums = 8 * shape.units * most * shape.batch * shape.state * shape.length  # bytes, with a block for every `rows`
    turns = -(-sums // SUMS)
    if shape.state <= SUMMED:
        turns = max(turns, min(TURNS, shape.units * most * shape.sequences // _metal.BUSY))
    blocks = -(-most // max(1, min(most, turns)))
    turns = -(-most // blocks)
    plan = [shape.per_unit, blocks, turns, shape.state, shape.groups_B, shape.groups_C]
    carried = inputs[9] is not None or shape.length > steps * lanes
    return _metal.launch(
        "ssm_scan_bwd",
        inputs={
            **_bwd_operands(grad_out, grad_final, inputs),
            "kept": kept,
            "plan": mx.array([_bwd_flags(grad_out, grad_final, inputs), *plan], dtype=mx.int32),
        },
        outputs=_bwd_outputs(shape, inputs, shape.sequences, shape.units * blocks, carried),
        template={
            **_bwd_types(inputs),
            "K": steps,
            "ROWS": rows,
            "CHUNK": shape.chunk,
            "SUMMED": SUMMED * (shape.state <= SUMMED),
        },
        grid=(shape.units * blocks, shape.sequences, 1),
        group=rows * lanes,
    )


def _short_bwd(shape: Shape, grad_out: Any, grad_final: Any, inputs: tuple[Any, ...], kept: None) -> dict[str, Any]:
    import mlx.core as mx

    lanes, states = _metal.lanes_of(shape.state, SHORT_STATES)
    rows = _metal.rows_of(shape.batch, lanes)
    groups = -(-shape.batch // rows)
    turns = max(1, min(shape.per_unit, shape.channels * groups // _metal.GROUPS))  # channels of a block
    blocks = -(-shape.per_unit // turns)
    plan = [shape.per_unit, blocks, turns, shape.state, shape.groups_B, shape.groups_C]
    return _metal.launch(
        "ssm_scan_bwd_short",
        inputs={
            **_bwd_operands(grad_out, grad_final, inputs),
            "plan": mx.array([_bwd_flags(grad_out, grad_final, inputs), *plan], dtype=mx.int32),
        },
        outputs=_bwd_outputs(shape, inputs, groups, shape.units * blocks, inputs[9] is not None),
        template={
            **_bwd_types(inputs),
            "LANES": lanes,
            "S": states,
            "T": next(steps for steps in (2, 5, SHORT) if steps >= shape.length),
            "ROWS": rows,
        },
        grid=(shape.units * blocks, groups, 1),
        group=rows * lanes,
    )


def _bwd_operands(grad_out: Any, grad_final: Any, inputs: tuple[Any, ...]) -> dict[str, Any]:
    u, delta, A, B, C, D, z, delta_bias, _, initial_state, cu_seqlens = inputs
    operands = _operands(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    return operands | {"grad_out": grad_out, "grad_final": _metal.contiguous(grad_final)}


def _bwd_outputs(
    shape: Shape, inputs: tuple[Any, ...], groups: int, blocks: int, carried: bool
) -> dict[str, tuple[Any, Any]]:
    """`groups` of sequences and `blocks` of channels have sums of their own."""
    import mlx.core as mx

    u, delta, _, B, C, D, z, delta_bias, *_ = inputs
    constant = (groups, shape.channels, shape.state)
    varying = (blocks, shape.batch, shape.state, shape.length)
    return {
        "du": (u.shape, u.dtype),
        "ddelta": (u.shape, delta.dtype),
        "dz": (None, mx.float32) if z is None else (u.shape, z.dtype),
        "dA": (constant, mx.float32),
        "dB": (constant if B.ndim == 2 else varying, mx.float32),
        "dC": (constant if C.ndim == 2 else varying, mx.float32),
        "dD": (None if D is None else constant[:2], mx.float32),
        "dbias": (None if delta_bias is None else constant[:2], mx.float32),
        "dinitial": ((shape.sequences, shape.channels, shape.state) if carried else None, mx.float32),
    }


def _bwd_types(inputs: tuple[Any, ...]) -> dict[str, Any]:
    import mlx.core as mx

    u, delta, *_, z, _, _, _, _ = inputs
    return {"T_u": u.dtype, "T_delta": delta.dtype, "T_z": mx.float32 if z is None else z.dtype}


def _bwd_flags(grad_out: Any, grad_final: Any, inputs: tuple[Any, ...]) -> int:
    _, _, _, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens = inputs
    flags = _flags(D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, B, C)
    return flags | _metal.HAS_DOUT * (grad_out is not None) | _metal.HAS_DFINAL * (grad_final is not None)


def _by_group(partial: Any, groups: int, rank: int) -> Any:
    """The gradient of B or C, [B, N, L] or [B, G, N, L], from sums over parts of each group's channels."""
    total = partial.reshape(groups, -1, *partial.shape[1:]).sum(1)  # [G, B, N, L]
    return total[0] if rank == 3 else total.transpose(1, 0, 2, 3)


def _bwd_without_steps(grad_out: Any, grad_final: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Where nothing was scanned: out is D u silu(z), the final state the initial one."""
    import mlx.core as mx

    u, delta, A, B, C, D, z, delta_bias, _, initial_state, _ = inputs
    given = dict(zip(GRADIENTS, (u, delta, A, B, C, D, z, delta_bias, initial_state), strict=True))
    grads = {key: None if x is None else mx.zeros(x.shape, x.dtype) for key, x in given.items()}
    if initial_state is not None and grad_final is not None:
        grads["initial_state"] = grad_final.astype(initial_state.dtype)
    if grad_out is not None and D is not None:
        x, g = u.astype(mx.float32), grad_out.astype(mx.float32)
        skipped = D.astype(mx.float32)[:, None] * x
        if z is not None:
            gate = z.astype(mx.float32)
            part = mx.sigmoid(gate)
            grads["z"] = (g * skipped * part * (1 + gate * (1 - part))).astype(z.dtype)
            g = g * gate * part
        grads["u"] = (D.astype(mx.float32)[:, None] * g).astype(u.dtype)
        grads["D"] = (g * x).sum((0, 2)).astype(D.dtype)
    return tuple(grads[key] for key in GRADIENTS)
