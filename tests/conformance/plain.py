"""What the functions of mamba_ssm and causal_conv1d compute, in float64 and one step of time after the other.

Written from their equations and apart from fastlvm's references; gradients are torch's own. Beside them the one way the
tests of this folder compare: outputs and gradients of a function on its dtype with those of a formula in float64 on the
same numbers.
"""

from __future__ import annotations

import torch

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
OUR_FORWARD, OUR_GRADIENT = 1e-5, 1e-4  # of the greatest element, in float32


def silu(x):
    return x / (1 + torch.exp(-x))


def softplus(x):
    return torch.where(x > 20, x, torch.log1p(torch.exp(torch.clamp(x, max=20))))


def rms(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def every_channel(M, batch, channels, length):
    """B or C of the selective scan in any layout as [B, D, N, L]."""
    if M.ndim == 2:
        return M[None, :, :, None].expand(batch, channels, M.shape[1], length)
    if M.ndim == 3:
        M = M[:, None]
    group = torch.arange(channels) * M.shape[1] // channels
    return M[:, group]


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Output [B, D, L] and last state [B, D, N]."""
    batch, channels, length = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = softplus(delta)
    B, C = (every_channel(M, batch, channels, length) for M in (B, C))
    state, outputs = u.new_zeros(batch, channels, A.shape[1]), []
    for step, u_t, B_t, C_t in zip(*(M.unbind(-1) for M in (delta, u, B, C)), strict=True):
        state = torch.exp(step[..., None] * A) * state + (step * u_t)[..., None] * B_t
        outputs.append((state * C_t).sum(-1))
    y = torch.stack(outputs, -1)
    if D is not None:
        y = y + D[:, None] * u
    return (y if z is None else y * silu(z)), state


def conv1d(x, weight, bias=None, activation=None, past=None):
    """Output [B, D, L] and the last W-1 inputs."""
    width, length = weight.shape[1], x.shape[2]
    past = x.new_zeros(*x.shape[:2], width - 1) if past is None else past
    line = torch.cat([past, x], dim=-1)
    y = sum(weight[:, k, None] * line[..., k : k + length] for k in range(width))
    if bias is not None:
        y = y + bias[:, None]
    return (y if activation is None else silu(y)), line[..., line.shape[-1] - width + 1 :]


def ssd(x, dt, A, B, C, D=None, z=None, dt_bias=None, start=None, dt_softplus=False, limit=(0.0, float("inf"))):
    """Output [B, L, H, P] and last state [B, H, P, N]."""
    batch, _, heads, dim = x.shape
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    dt = dt.clamp(*limit)
    group = torch.arange(heads) * B.shape[2] // heads
    B, C = B[:, :, group], C[:, :, group]  # [B, L, H, N]
    state = x.new_zeros(batch, heads, dim, B.shape[-1]) if start is None else start
    outputs = []
    for step, x_t, B_t, C_t in zip(*(M.unbind(1) for M in (dt, x, B, C)), strict=True):
        decay = torch.exp(step * A)[..., None, None]
        state = decay * state + (step[..., None] * x_t)[..., None] * B_t[:, :, None]
        outputs.append((state * C_t[:, :, None]).sum(-1))
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]) * x
    return (y if z is None else y * silu(z)), state


def stretches(seq_idx):
    """(begin, end, index) of the runs of equal numbers in a list."""
    ends = [t for t in range(1, len(seq_idx) + 1) if t == len(seq_idx) or seq_idx[t] != seq_idx[t - 1]]
    return [(begin, end, seq_idx[begin]) for begin, end in zip([0, *ends], ends, strict=False)]


def double(x):
    return x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def compare(function, formula, tensors, tolerance, gradients=None):
    """Hold `function(**tensors)` to `formula` of the same numbers in float64, outputs and all gradients.

    `tolerance` is (rtol, atol); `gradients` gives those of a gradient by its tensor's name, where they differ. float32
    is held to this project's own bar as well.
    """
    leaves = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    doubles = {k: double(v).requires_grad_() for k, v in tensors.items()}
    outputs, expected = (_tuple(f(**kwargs)) for f, kwargs in ((function, leaves), (formula, doubles)))
    assert len(outputs) == len(expected)
    generator = torch.Generator().manual_seed(9)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    precise = all(v.dtype == torch.float32 for v in tensors.values())
    for i, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        close(output, wanted, *tolerance, OUR_FORWARD if precise else None, f"output {i}")
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    wanted_grads = torch.autograd.grad(expected, list(doubles.values()), [double(g) for g in cotangents])
    for name, grad, wanted in zip(leaves, grads, wanted_grads, strict=True):
        assert grad.dtype == tensors[name].dtype
        limits = (gradients or {}).get(name, tolerance)
        close(grad, wanted, *limits, OUR_GRADIENT if precise else None, f"gradient of {name}")


def close(actual, wanted, rtol, atol, ours=None, what="output"):
    actual, wanted = actual.detach().double(), wanted.detach().double()
    torch.testing.assert_close(actual, wanted, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")
    if ours is not None and wanted.numel():
        error = (actual - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)
        assert error <= ours, f"{what}: relative error {error:.1e}"


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)
