"""What the one-token ops share: a state that is written in place, which of its rows, and a torch op that says so.

Every op takes a pool of S states and, with `state_indices`, one index into it for each of its b rows; a negative index
is padding: the output is zero and no state is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlvm.ops import _arrays, _checks, _native

if TYPE_CHECKING:
    from torch import Tensor


def check_arrays(
    op: str,
    scan: str,
    optional: tuple[str, ...],
    named: dict[str, Any],
    state_indices: Any,
    states: tuple[str, ...] = ("state",),
) -> None:
    """`_checks.check_arrays`, the same for the indices, states that can be written, and no gradient wanted.

    Nothing here looks at a value, so that it can be traced; `check_values` does.

    Raises:
        TypeError: as `_checks.check_arrays`; indices that are neither int32 nor int64.
        ValueError: another device, a state that is read-only, expanded or lazily negated, or an argument that requires
            grad in grad mode.
    """
    _checks.check_arrays(op, optional, named)
    kind = _arrays.kind(named[states[0]])
    for state in states if kind != "mlx" else ():  # mlx's arrays are values: theirs are replaced, not written
        _check_writable(op, state, named[state])
    if state_indices is not None:
        _check_indices(op, named["state"], state_indices)
    if kind == "torch":
        _check_tensors(op, scan, named, states)
    if kind == "mlx" and _arrays.device(named[states[0]]) == "cpu":
        _check_values_known(op, scan, [*named.values(), state_indices])


def check_states(op: str, state: Any, state_indices: Any, batch: int, axes: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `state` is [b, *shape], or [S, *shape] with indices [b]; `axes` names `shape`."""
    if state_indices is None:
        _checks.check_shape(op, "state", state, f"(b, {axes})", (batch, *shape))
    else:
        _checks.check_rank(op, "state", state, f"(S, {axes})", len(shape) + 1)
        _checks.check_shape(op, "state", state, f"(S, {axes})", (state.shape[0], *shape))
        _checks.check_shape(op, "state_indices", state_indices, "(b,)", (batch,))


def _check_writable(op: str, name: str, state: Any) -> None:
    if isinstance(state, np.ndarray):
        if not state.flags.writeable:
            raise ValueError(f"{op}: {name} is read-only; wants an array that can be written in place, such as a copy")
        strides = state.strides
    else:
        strides = state.stride()
    for size, stride in zip(state.shape, strides, strict=True):
        if stride == 0 and size > 1 and 0 not in state.shape:
            raise ValueError(f"{op}: {name} has stride 0; wants a place in memory for each element, such as a copy")


def _check_indices(op: str, state: Any, indices: Any) -> None:
    if _arrays.kind(indices) != _arrays.kind(state):
        wants = {"numpy": "a numpy array", "torch": "a torch tensor", "mlx": "an mlx array"}[_arrays.kind(state) or ""]
        raise TypeError(f"{op}: state_indices is a {type(indices).__name__}; wants {wants}, as state is")
    dtype = _arrays.dtype_name(indices)
    if dtype not in ("int32", "int64"):
        raise TypeError(f"{op}: state_indices is {dtype}; wants int32 or int64")
    here, there = _arrays.device(indices), _arrays.device(state)
    if here != there:
        raise ValueError(f"{op}: state_indices is on {here} but state is on {there}; move them to one device")


def _check_tensors(op: str, scan: str, named: dict[str, Any], states: tuple[str, ...]) -> None:
    import torch

    for name in states if not torch.compiler.is_compiling() else ():
        if named[name].is_neg():
            raise ValueError(
                f"{op}: {name} is a view that negates lazily; wants memory to write, pass {name}.resolve_neg()"
            )
    if not torch.is_grad_enabled():
        return
    for name, x in named.items():
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{op}: {name} requires grad, but a step in place has no gradient; "
                f"use fastlvm.{scan}, or call it under torch.no_grad()"
            )


def _check_indices_known(op: str, indices: Any) -> None:
    from fastlvm.ops import _mlx, _mlx_call

    if not _mlx_call.evaluated([indices]):
        raise ValueError(f"{op}: state_indices: {_mlx.TRACED}; wants a constant of the function, made outside it")


def _check_values_known(op: str, scan: str, arrays: list[Any]) -> None:
    from fastlvm.ops import _mlx, _mlx_call

    if not _mlx_call.evaluated(arrays):
        raise ValueError(
            f"{op}: {_mlx.TRACED}, nor is a state written in place; use fastlvm.{scan} with initial_state and "
            "return_final_state"
        )


def check_values(op: str, state: Any, state_indices: Any, name: str = "state") -> None:
    """Check what the kernels check for themselves: elements of the state that overlap, and the values of the indices.

    Skipped where there is no value: while torch traces, and on the meta device.

    Raises:
        ValueError: two elements may share a place; an index is S or more, or used twice, or mlx traces the indices.
    """
    if _arrays.kind(state) == "torch":
        import torch

        if torch.compiler.is_compiling() or state.device.type == "meta":
            return
    if _arrays.kind(state) != "mlx":
        check_apart(op, state, name)
    if state_indices is None:
        return
    if _arrays.kind(state) == "mlx":
        _check_indices_known(op, state_indices)
    used, states = set(), state.shape[0]
    for index in state_indices.tolist():
        if index >= states:
            raise ValueError(
                f"{op}: state_indices: got {index}, wants less than {states}, the number of states, "
                "or a negative number for padding"
            )
        if index >= 0 and index in used:
            raise ValueError(f"{op}: state_indices: got {index} twice, wants every state at most once")
        used.add(index)


def check_apart(op: str, state: Any, name: str = "state") -> None:
    """Raise ValueError unless, from the closest axis on, each stride reaches past all that lies below it."""
    strides, reach = (state.strides, state.itemsize) if isinstance(state, np.ndarray) else (state.stride(), 1)
    if 0 in state.shape:
        return
    for stride, size in sorted((abs(stride), size) for stride, size in zip(strides, state.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(
                f"{op}: {name}: got memory in which elements may overlap, wants a place for each; copy it first"
            )
        reach += stride * (size - 1)


def run_in_place(op: str, kernel: Callable[[np.ndarray], None], state: np.ndarray, name: str = "state") -> None:
    """Call a kernel on `state`, by way of a copy where its elements are no whole number of elements apart."""
    held = _native.aligned(state)
    if held is not state:
        check_apart(op, state, name)
    kernel(held)
    if held is not state:
        state[...] = held


def through_torch(step: Callable[..., Tensor], state: np.ndarray, *args: Any) -> np.ndarray:
    """Call `step(state, *args)`, a torch function that writes its state, on numpy arrays, and write theirs."""
    out, after = _arrays.through_torch(lambda state, *rest: (step(state, *rest), state), state, *args)
    state[...] = after
    return out


def take(state: Tensor, indices: Tensor | None) -> Tensor:
    """The state of every row [b, ...]; zero for padding."""
    return state if indices is None else _padded(state)[_places(indices)]


def put(state: Tensor, indices: Tensor | None, rows: Tensor) -> None:
    """Write the state of every row back; padding goes nowhere, and the other states keep their bits."""
    if indices is not None:
        rows = _padded(state).index_copy(0, _places(indices), rows.to(state.dtype))[1:]
    state.copy_(rows)


def blank(out: Tensor, indices: Tensor | None) -> Tensor:
    """`out` [b, ...] with zeros in the rows that are padding."""
    return out if indices is None else out.masked_fill((indices < 0).view(-1, *[1] * (out.ndim - 1)), 0)


def _padded(state: Tensor) -> Tensor:
    """[1 + S, ...]: the state of padding first."""
    import torch

    return torch.cat([state.new_zeros(1, *state.shape[1:]), state])


def _places(indices: Tensor) -> Tensor:
    return indices.long().clamp(min=-1) + 1


def define(
    name: str, schema: str, *, kernel: Callable[..., Tensor], fake: Callable[..., Tensor], device: str = "cpu"
) -> Callable[..., Any]:
    """Register the op `fastlvm::<name>` with its kernel and fake kernel, and return it; the schema marks its state.

    `device` is where the kernel runs, "default" for wherever its tensors are.
    """
    import torch

    from fastlvm.ops import _transforms

    full = f"fastlvm::{name}"
    torch.library.define(full, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(full, device, kernel)
    torch.library.register_fake(full, fake)
    return _transforms.in_place(getattr(torch.ops.fastlvm, name).default)


def plain_indices(indices: Tensor | None) -> Any:
    """The indices as the extension reads them."""
    return None if indices is None else indices.numpy(force=True)


def tell_autograd(state: Tensor) -> None:
    """Note that `state` was written, so that a backward that had saved it does not use what it has become."""
    import torch

    if not state.is_inference():
        torch.autograd.graph.increment_version(state)
