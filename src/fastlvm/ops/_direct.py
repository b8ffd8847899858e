"""Past torch's dispatcher where it would only find the kernel: its way there costs more than a call on few elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter
from torch.overrides import has_torch_function

# Private to torch, which has no public name for them. A torch without one of them dispatches every call.
try:
    _included_keys = torch._C._dispatch_tls_local_include_set
    _INFERENCE = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    _QUIET: tuple[Any, ...] = (_INFERENCE | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView), _INFERENCE)
except AttributeError:
    _QUIET = ()


def unless_watched(op: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, called through its custom op `op` wherever anyone could tell the difference.

    That is while a gradient is recorded, while torch traces, transforms (vmap, jvp) or profiles, under a mode of torch
    functions or of dispatch, in forward-mode AD, for a subclass of Tensor, and for a tensor that its memory alone does
    not describe.
    """

    def call(*args: Any) -> Any:
        return kernel(*args) if _unwatched(args) else op(*args)

    return call


def _unwatched(args: tuple[Any, ...]) -> bool:
    if torch.compiler.is_compiling() or has_torch_function(args):  # true under a mode of torch functions, too
        return False
    if not _QUIET or _included_keys() not in _QUIET:  # modes of dispatch, torch.func and tracers add keys
        return False
    if getattr(forward_ad, "_current_level", 0) >= 0 or getattr(profiler, "_is_profiler_enabled", True):
        return False
    recording = torch.is_grad_enabled()
    for x in args:
        if type(x) is Tensor or type(x) is Parameter:
            if (recording and x.requires_grad) or x.is_neg() or not x.data_ptr():  # zeros without memory, or no element
                return False
        elif isinstance(x, Tensor):
            return False
    return True
