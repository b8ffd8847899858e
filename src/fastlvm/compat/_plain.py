"""The weights of a Mamba block as `fastlvm.mamba_step` takes them, where they are all that its modules compute with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

_FEW = 8  # rows up to which a token's products take as long as reading the weights
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TENSORS = (Tensor, nn.Parameter)  # quantizers bring classes of their own
_PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


def step_weights(block: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
    """Arguments in_proj to out_proj_bias of `fastlvm.mamba_step` for few rows x [B, ...] on the CPU.

    Modules and parameters have the names of mamba_ssm's `Mamba`. None where anybody wants a gradient or looks in:
    autocast, hooks, adapters and the like, torch.compile.
    """
    if torch.compiler.is_compiling() or x.shape[0] > _FEW or x.dtype not in _DTYPES or x.device.type != "cpu":
        return None
    if torch.is_autocast_enabled("cpu") or hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return None
    parts: dict[str, Any] = block._modules  # looked up in turn, which costs a module microseconds a name
    convolution = parts["conv1d"]
    linear = [parts[name] for name in _PROJECTIONS]
    if not is_only(convolution, nn.Conv1d) or not all(is_only(part, nn.Linear) for part in linear):
        return None
    matrices, biases = zip(*((part._parameters["weight"], part._parameters["bias"]) for part in linear), strict=True)
    if any(matrix.dtype != x.dtype or type(matrix) not in _TENSORS for matrix in matrices):
        return None
    if torch.is_grad_enabled() and any(one.requires_grad for one in (x, *block.parameters())):
        return None
    (in_proj, x_proj, dt_proj, out_proj), (in_bias, _, dt_bias, out_bias) = matrices, biases
    filters, filter_bias = convolution._parameters["weight"][:, 0], convolution._parameters["bias"]
    A_log, D = block._parameters["A_log"], block._parameters["D"]
    return in_proj, filters, x_proj, dt_proj, A_log, out_proj, D, in_bias, filter_bias, dt_bias, out_bias


def is_only(part: nn.Module, kind: type) -> bool:
    """Whether calling `part` is what its class does: no adapter, quantizer, parametrization, hook or offloading."""
    held = part.__dict__
    return (
        type(part) is kind and "forward" not in held and not held["_forward_hooks"] and not held["_forward_pre_hooks"]
    )
