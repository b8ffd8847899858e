"""The ops once more in float64, written apart from the reference, and the one measure of error.

Everything is torch float64 on the CPU; gradients are torch's own, over these loops.
"""

from __future__ import annotations

import numpy as np
import torch

GRADIENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def ssm_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None):
    """Output [B, D, L] and final state [B, D, N], channel by channel."""
    batch, channels, length = u.shape
    rows, states = [], []
    Bs, Cs = (_by_channel_and_time(M, channels, batch, length) for M in (B, C))
    for d in range(channels):
        dt = delta[:, d] if delta_bias is None else delta[:, d] + delta_bias[d]  # [B, L]
        if delta_softplus:
            dt = _softplus(dt)
        h = u.new_zeros(batch, A.shape[1]) if initial_state is None else initial_state[:, d]  # [B, N]
        row = []
        for t in range(length):
            decay = torch.exp(torch.outer(dt[:, t], A[d]))
            h = decay * h + torch.einsum("b,bn->bn", dt[:, t] * u[:, d, t], Bs[d][t])
            row.append(torch.einsum("bn,bn->b", h, Cs[d][t]))
        y = torch.stack(row, dim=1) if row else u.new_zeros(batch, 0)
        if D is not None:
            y = y + u[:, d] * D[d]
        if z is not None:
            y = y * z[:, d] * torch.sigmoid(z[:, d])
        rows.append(y)
        states.append(h)
    if not channels:
        return torch.zeros_like(u), u.new_zeros(batch, 0, A.shape[1])
    return torch.stack(rows, dim=1), torch.stack(states, dim=1)


def _by_channel_and_time(M, channels, batch, length):
    """B or C as lists [D][L] of [B, N]."""
    if M.ndim == 2:
        return [[M[d].expand(batch, -1)] * length for d in range(channels)]
    groups = [M] if M.ndim == 3 else M.unbind(1)
    rows = [group.unbind(-1) for group in groups]
    return [rows[d * len(rows) // channels] for d in range(channels)]


def _softplus(x):
    return torch.where(x > 20, x, torch.log1p(torch.exp(x.clamp(max=20))))


def causal_conv1d(x, weight, bias=None, activation=None, initial_state=None):
    """Output [B, D, L] and final state [B, D, W-1], as torch's own convolution."""
    channels, width = weight.shape
    past = x.new_zeros(*x.shape[:2], width - 1) if initial_state is None else initial_state
    line = torch.cat([past, x], dim=-1)
    if x.numel():
        y = torch.nn.functional.conv1d(line, weight[:, None], bias, groups=channels)
    else:
        y = torch.zeros_like(x)
    if activation is not None:
        y = y * torch.sigmoid(y)
    return y, line[..., line.shape[-1] - width + 1 :]


def run(op, inputs: dict, cotangents: tuple | None = None):
    """Outputs of `op` in float64 and, given cotangents of the two outputs, the gradient of every tensor by name."""
    leaves = {k: _double(v) for k, v in inputs.items()}
    if cotangents is None:
        return list(op(**leaves)), {}
    tensors = {k: v.requires_grad_() for k, v in leaves.items() if isinstance(v, torch.Tensor)}
    outputs = op(**leaves)
    loss = sum((o * _double(g)).sum() for o, g in zip(outputs, cotangents, strict=True))
    if not loss.requires_grad:  # nothing was computed from anything
        return [o.detach() for o in outputs], {k: torch.zeros_like(v) for k, v in tensors.items()}
    grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, materialize_grads=True)
    return [o.detach() for o in outputs], dict(zip(tensors, grads, strict=True))


def _double(value):
    if isinstance(value, torch.Tensor):
        return value.detach().double()
    return torch.from_numpy(value.astype(np.float64)) if isinstance(value, np.ndarray) else value


def relative_error(got, want) -> float:
    """Euclidean norm of the difference over that of the truth; where the truth is 0, the norm of what came instead.

    A NaN is an infinite error: as NaN it would pass under the max of several errors, which compares it with none.
    """
    got, want = (torch.as_tensor(np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x) for x in (got, want))
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    want = want.detach().double()
    norm = float(want.norm())
    error = float((got.detach().double() - want).norm()) / (norm if norm > 0 else 1.0)
    return np.inf if np.isnan(error) else error


def extremes(names) -> list[tuple[str, float]]:
    """Each name with NaN and with two of the other values, each of them with several names."""
    others = [np.inf, -np.inf, 1e38, -1e38, 1e-42]
    return [
        (name, value)
        for i, name in enumerate(names)
        for value in (np.nan, others[i % len(others)], others[(i + 2) % len(others)])
    ]
