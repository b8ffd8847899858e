"""The ops once more in float64 by numpy, with their gradients: what results on an Apple GPU are held to.

Written for machines without torch; `tests/bench/test_apple_bench.py` holds it to the oracles of the tests. Every
function gives the outputs and, for cotangents of them, the gradient of every array by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Found = tuple[list[Array], dict[str, Array]]


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))


def _silu_slope(x: Array) -> Array:
    s = _sigmoid(x)
    return s * (1 + x * (1 - s))


def ssm_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    initial_state: Array | None = None,
    cu_seqlens: Any = None,
    cotangents: Sequence[Array] | None = None,
) -> Found:
    """As `fastlvm.ssm_scan`; outputs are the output [B, D, L] and the final state [B, D, N]."""
    named = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    given = {name: x for name, x in (named | {"initial_state": initial_state}).items() if x is not None}
    if cu_seqlens is None:
        return _scan(given, delta_softplus, cotangents)
    timed = [name for name in ("u", "delta", "z", "B", "C") if name in given and given[name].ndim > 2]

    def run(part: dict[str, Array], cots: Sequence[Array] | None) -> Found:
        return _scan(part, delta_softplus, cots)

    return _packed(run, given, timed, cu_seqlens, cotangents)


def _scan(given: Mapping[str, Array], softplus: bool, cotangents: Sequence[Array] | None) -> Found:
    u, A = given["u"], given["A"]
    (batch, channels, length), state = u.shape, A.shape[1]
    D, z = given.get("D", np.zeros(channels))[:, None], given.get("z")
    raw = given["delta"] + given.get("delta_bias", np.zeros(channels))[:, None]
    step = np.where(raw > 20, raw, np.logaddexp(0, raw)) if softplus else raw  # [B, D, L]
    full = (batch, channels, state, length)
    B, C = (_spread(given[name], full) for name in "BC")
    h = given.get("initial_state", np.zeros((batch, channels, state)))
    states, y = [h], np.zeros(u.shape)
    for t in range(length):
        h = np.exp(step[..., t, None] * A) * h + (step * u)[..., t, None] * B[..., t]
        y[..., t] = (h * C[..., t]).sum(-1)
        states.append(h)
    ungated = y + D * u
    outputs = [ungated if z is None else ungated * z * _sigmoid(z), h]
    if cotangents is None:
        return outputs, {}

    dout, dh = cotangents
    dy = dout if z is None else dout * z * _sigmoid(z)
    du, dstep, dA, dB, dC = D * dy, np.zeros(u.shape), np.zeros((batch, *A.shape)), np.zeros(full), np.zeros(full)
    for t in reversed(range(length)):
        dC[..., t] = dy[..., t, None] * states[t + 1]
        dh = dh + dy[..., t, None] * C[..., t]
        decay = np.exp(step[..., t, None] * A)
        dB[..., t] = dh * (step * u)[..., t, None]
        into = (dh * B[..., t]).sum(-1)
        du[..., t] += into * step[..., t]
        slope = dh * states[t] * decay  # of the decay's exponent
        dstep[..., t] = into * u[..., t] + (slope * A).sum(-1)
        dA += slope * step[..., t, None]
        dh = dh * decay
    draw = dstep * np.where(raw > 20, 1.0, _sigmoid(raw)) if softplus else dstep
    grads = {"u": du, "delta": draw, "A": dA.sum(0), "D": (dy * u).sum((0, 2)), "initial_state": dh}
    grads |= {name: _gathered(grad, given[name].shape) for name, grad in (("B", dB), ("C", dC))}
    grads["delta_bias"] = draw.sum((0, 2))
    if z is not None:
        grads["z"] = dout * ungated * _silu_slope(z)
    return outputs, {name: grads[name] for name in given}


def _spread(M: Array, full: tuple[int, ...]) -> Array:
    """B or C of any layout as a view or copy [B, D, N, L]."""
    if M.ndim == 2:
        M = M[None, :, :, None]
    elif M.ndim == 3:
        M = M[:, None]
    else:
        M = np.repeat(M, full[1] // M.shape[1], axis=1)
    return np.broadcast_to(M, full)


def _gathered(grad: Array, shape: tuple[int, ...]) -> Array:
    """The sum of a gradient [B, D, N, L] over what shares an element of `shape`."""
    if len(shape) == 2:
        return grad.sum((0, 3))
    if len(shape) == 3:
        return grad.sum(1)
    return grad.reshape(*shape[:2], grad.shape[1] // shape[1], *shape[2:]).sum(2)


def _packed(run: Any, given: dict[str, Array], timed: Sequence[str], offsets: Any, cotangents: Any) -> Found:
    """Sequences one by one; time is the last axis of the `timed` arrays, of the output and of its cotangent."""
    outs: list[list[Array]] = []
    grads: list[dict[str, Array]] = []
    for s, (begin, end) in enumerate(pairwise(offsets.tolist())):
        part = {name: x[..., begin:end] if name in timed else x for name, x in given.items()}
        if "initial_state" in part:
            part["initial_state"] = given["initial_state"][s : s + 1]
        cots = None if cotangents is None else (cotangents[0][..., begin:end], cotangents[1][s : s + 1])
        out, grad = run(part, cots)
        outs.append(out)
        grads.append(grad)
    outputs = [np.concatenate([out[0] for out in outs], axis=-1), np.concatenate([out[1] for out in outs])]
    found = {}
    for name in given if cotangents is not None else ():
        parts = [grad[name] for grad in grads]
        if name in timed or name == "initial_state":
            found[name] = np.concatenate(parts, axis=-1 if name in timed else 0)
        else:
            found[name] = sum(parts[1:], parts[0])
    return outputs, found


def ssd_scan(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    initial_state: Array | None = None,
    cu_seqlens: Any = None,
    cotangents: Sequence[Array] | None = None,
) -> Found:
    """As `fastlvm.ssd_scan`, through `ssm_scan`: every channel of a head has the head's step size and decay."""
    batch, length, heads, dim = x.shape
    state = B.shape[3]

    def channels(y: Array) -> Array:  # [B, L, H, P] as [B, HP, L]
        return y.reshape(batch, length, heads * dim).swapaxes(1, 2)

    def back(y: Array) -> Array:
        return y.swapaxes(1, 2).reshape(batch, length, heads, dim)

    named: dict[str, Any] = {"u": channels(x), "delta": np.repeat(dt.swapaxes(1, 2), dim, axis=1)}
    named |= {"A": np.repeat(A, dim)[:, None].repeat(state, axis=1)}
    named |= {name: np.moveaxis(M, 1, 3) for name, M in (("B", B), ("C", C))}  # [B, G, N, L]
    if D is not None:
        named["D"] = (np.repeat(D, dim) if D.ndim == 1 else D.ravel()) + 0.0
    if z is not None:
        named["z"] = channels(z)
    if dt_bias is not None:
        named["delta_bias"] = np.repeat(dt_bias, dim)
    if initial_state is not None:
        named["initial_state"] = initial_state.reshape(-1, heads * dim, state)
    cots = None
    if cotangents is not None:
        cots = channels(cotangents[0]), cotangents[1].reshape(-1, heads * dim, state)
    (out, final), found = ssm_scan(**named, delta_softplus=dt_softplus, cu_seqlens=cu_seqlens, cotangents=cots)
    outputs = [back(out), final.reshape(-1, heads, dim, state)]
    if cotangents is None:
        return outputs, {}
    grads = {"x": back(found["u"]), "dt": back(found["delta"]).sum(3)}
    grads["A"] = found["A"].reshape(heads, -1).sum(1)
    grads |= {name: np.moveaxis(found[name], 3, 1) for name in "BC"}
    if D is not None:
        per_channel = found["D"].reshape(heads, dim)
        grads["D"] = per_channel.sum(1) if D.ndim == 1 else per_channel
    if z is not None:
        grads["z"] = back(found["z"])
    if dt_bias is not None:
        grads["dt_bias"] = found["delta_bias"].reshape(heads, dim).sum(1)
    if initial_state is not None:
        grads["initial_state"] = found["initial_state"].reshape(initial_state.shape)
    return outputs, grads


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    activation: str | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Any = None,
    cotangents: Sequence[Array] | None = None,
) -> Found:
    """As `fastlvm.causal_conv1d`; outputs are the output [B, D, L] and the final state [B, D, W-1]."""
    named = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
    given = {name: y for name, y in named.items() if y is not None}

    def run(part: dict[str, Array], cots: Sequence[Array] | None) -> Found:
        return _convolve(part, activation is not None, cots)

    return run(given, cotangents) if cu_seqlens is None else _packed(run, given, ["x"], cu_seqlens, cotangents)


def _convolve(given: Mapping[str, Array], active: bool, cotangents: Sequence[Array] | None) -> Found:
    x, weight = given["x"], given["weight"]
    (batch, channels, length), width = x.shape, weight.shape[1]
    line = np.concatenate([given.get("initial_state", np.zeros((batch, channels, width - 1))), x], axis=-1)
    y = np.zeros(x.shape) + given.get("bias", np.zeros(channels))[:, None]
    for k in range(width):
        y += weight[:, k, None] * line[..., k : k + length]
    outputs = [y * _sigmoid(y) if active else y, line[..., length:]]
    if cotangents is None:
        return outputs, {}
    dy = cotangents[0] * _silu_slope(y) if active else cotangents[0]
    dline, dweight = np.zeros(line.shape), np.zeros(weight.shape)
    dline[..., length:] += cotangents[1]
    for k in range(width):
        dline[..., k : k + length] += weight[:, k, None] * dy
        dweight[:, k] = (dy * line[..., k : k + length]).sum((0, 2))
    grads = {"x": dline[..., width - 1 :], "weight": dweight, "bias": dy.sum((0, 2))}
    grads["initial_state"] = dline[..., : width - 1]
    return outputs, {name: grads[name] for name in given}


def info_nce(
    queries: Array,
    keys: Array,
    temperature: float,
    symmetric: bool = False,
    mask: Any = None,
    reduction: str = "mean",
    cotangents: Sequence[Array] | None = None,
) -> Found:
    """As `fastlvm.info_nce`; the one output is the loss, [] or [B]."""
    batch, own = len(queries), np.arange(len(queries))
    left_out = np.zeros((batch, len(keys)), bool)
    if isinstance(mask, tuple):
        ours, theirs = mask
        left_out = ((ours[:, None] == theirs[None]) & (ours[:, None] >= 0)).any(-1)
    elif mask is not None:
        left_out = mask.copy()
    left_out[own, own] = False
    logits = queries @ keys.T / temperature
    masked = np.where(left_out, -np.inf, logits)
    ways = [(0.5, 0), (0.5, 1)] if symmetric else [(1.0, 1)]
    losses = -logits[own, own]
    share = np.zeros(logits.shape)  # [B, M], to be weighted by the cotangent of each loss
    if cotangents is None:
        cots = np.zeros(batch)
    else:
        cots = np.broadcast_to(cotangents[0], (batch,)) / (batch if reduction == "mean" else 1)
    for weight, axis in ways:
        top = masked.max(axis, keepdims=True)
        sums = np.exp(masked - top).sum(axis, keepdims=True)
        losses = losses + weight * (np.log(sums) + top).ravel()
        share += weight * np.exp(masked - top) / sums * (cots[:, None] if axis == 1 else cots[None])
    share[own, own] -= cots
    outputs = [np.asarray({"none": losses, "sum": losses.sum(), "mean": losses.sum() / batch}[reduction])]
    if cotangents is None:
        return outputs, {}
    return outputs, {"queries": share @ keys / temperature, "keys": share.T @ queries / temperature}


def ssm_step(
    state: Array,
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    state_indices: Any = None,
) -> Found:
    """As `fastlvm.ssm_step`; outputs are the output [b, D] and the states [S, D, N] after it."""

    def run(before: Array, rows: Any) -> tuple[Array, Array]:
        timed = {"u": x, "delta": delta, "B": B, "C": C, "z": z}
        arrays: dict[str, Any] = {name: None if M is None else M[rows][..., None] for name, M in timed.items()}
        named: dict[str, Any] = {"A": A, "D": D, "delta_bias": delta_bias, "initial_state": before}
        (out, after), _ = ssm_scan(**named, **arrays, delta_softplus=delta_softplus)
        return out[..., 0], after

    return _stepped(run, state, x, state_indices)


def causal_conv1d_step(
    x: Array,
    state: Array,
    weight: Array,
    bias: Array | None = None,
    activation: str | None = None,
    state_indices: Any = None,
) -> Found:
    """As `fastlvm.causal_conv1d_step`; outputs are the output [b, D] and the states [S, D, W-1 or more] after it."""

    def run(before: Array, rows: Any) -> tuple[Array, Array]:
        line = np.concatenate([before, x[rows][..., None]], axis=-1)
        past = line[..., line.shape[-1] - weight.shape[1] : -1]
        (out, _), _ = causal_conv1d(x[rows][..., None], weight, bias, activation, past)
        return out[..., 0], line[..., 1:]

    return _stepped(run, state, x, state_indices)


def _stepped(run: Any, state: Array, x: Array, indices: Any) -> Found:
    rows = np.arange(len(x)) if indices is None else np.flatnonzero(indices >= 0)
    slots = rows if indices is None else indices[rows]
    out, after = np.zeros(x.shape), state.copy()
    out[rows], after[slots] = run(state[slots], rows)
    return [out, after], {}
