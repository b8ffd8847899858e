"""How the Metal kernels are launched through MLX, and what the launchers in ops/<op>/metal.py share.

Launchers take `mlx.core` arrays that passed validation, None for what is missing, and return arrays; nothing is
evaluated and no value is looked at.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

LANES = 32  # of a simdgroup
THREADS = 256  # of a threadgroup, at most
SHARED_BYTES = 32768  # of threadgroup memory, at most
BUSY = 128  # threadgroups that keep a GPU busy
GROUPS = 256  # threadgroups that a launch should have before each takes several sequences in turn
MOST_TAPS = 16  # of a filter, all of which a thread holds in registers

# Bits of plan[0], as in common.metal.
HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS, HAS_INITIAL, PACKED, B_CONSTANT = 1, 2, 4, 8, 16, 32, 64
C_CONSTANT, KEEP, FINAL, HAS_DOUT, HAS_DFINAL, SILU, INDEXED = 128, 256, 512, 1024, 2048, 4096, 8192


def too_wide(weight: Any) -> str:
    """Why there is no kernel for filters [D, W] of more than MOST_TAPS."""
    return f"a filter of {weight.shape[1]} taps has no Metal kernel; wants {MOST_TAPS} or less"


def source(name: str) -> str:
    """The text of kernels/metal/`name`.metal."""
    return (files("fastlvm.kernels") / "metal" / f"{name}.metal").read_text(encoding="utf-8")


@cache
def kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Any:
    """The kernel of that name as MLX makes it, once; MLX compiles it for every set of dtypes and template arguments."""
    import mlx.core as mx

    return mx.fast.metal_kernel(
        name=f"fastlvm_{name}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=source(name),
        header=source("common"),
        ensure_row_contiguous=False,
    )


def launch(
    name: str,
    *,
    inputs: dict[str, Any],
    outputs: dict[str, tuple[Any, Any]],
    template: dict[str, Any],
    grid: tuple[int, int, int],
    group: int,
) -> dict[str, Any]:
    """Run a kernel on `grid` threadgroups of `group` threads.

    `outputs` are (shape, dtype); a shape of None is an output that the kernel leaves alone, and comes back as None.
    """
    results = kernel(name, tuple(inputs), tuple(outputs))(
        inputs=[_nothing() if x is None else x for x in inputs.values()],
        template=list(template.items()),
        grid=(grid[0] * group, grid[1], grid[2]),
        threadgroup=(group, 1, 1),
        output_shapes=[(1,) if shape is None else tuple(shape) for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
    )
    return {key: None if shape is None else x for (key, (shape, _)), x in zip(outputs.items(), results, strict=True)}


@cache
def _nothing() -> Any:
    """Bound where an array is missing; no kernel reads it."""
    import mlx.core as mx

    return mx.array([[[[0.0]]]])


@cache
def _no_integers() -> Any:
    import mlx.core as mx

    return mx.array([0], dtype=mx.int32)


def integers(x: Any) -> Any:
    """Offsets or indices, of mlx or numpy, in row-major order; missing ones have a stand-in of their usual dtype."""
    import mlx.core as mx

    if x is None:
        return _no_integers()
    return mx.contiguous(x) if isinstance(x, mx.array) else mx.array(x)


def contiguous(x: Any) -> Any:
    """`x` in row-major order: itself, unless it is a view that is not."""
    import mlx.core as mx

    return None if x is None else mx.contiguous(x)


def flags(bits: dict[int, bool]) -> int:
    """The bits that are set, for plan[0]."""
    return sum(bit for bit, is_set in bits.items() if is_set)


def put(states: Any, indices: Any, moved: Any) -> Any:
    """`states` [S, ...] with the rows `moved` at `indices` [b]; those outside [0, S) are nobody's."""
    import mlx.core as mx

    if indices is None:
        return moved
    size = states.shape[0]
    pool = mx.concatenate([states, states[:1]])  # the last takes what is nobody's
    pool[mx.where((indices < 0) | (indices >= size), size, indices)] = moved
    return pool[:size]


def lanes_of(state: int, most: int) -> tuple[int, int]:
    """Neighbouring lanes that share a channel's states, a power of two, and how many each has.

    As few lanes as have at most `most` states each, where a simdgroup is enough for that.
    """
    lanes = 1
    while lanes < LANES and -(-state // lanes) > most:
        lanes *= 2
    return lanes, -(-state // lanes)


def rows_of(items: int, lanes: int, copies: int = BUSY) -> int:
    """How many items, with `lanes` lanes each, a threadgroup has: whole simdgroups, not many more than there are.

    Where `copies` of them leave fewer than BUSY threadgroups, those have less, down to two simdgroups.
    """
    rows = LANES // lanes
    while rows < items and 2 * rows * lanes <= THREADS:
        rows *= 2
    while rows * lanes > 2 * LANES and -(-items // rows) * copies < BUSY:
        rows //= 2
    return rows
