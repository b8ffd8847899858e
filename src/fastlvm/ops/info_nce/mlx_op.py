"""InfoNCE on the memory of mlx arrays, with its gradient. Imported when the first mlx array arrives.

The kernels give the loss of every query and the logarithms of the sums, which the backward starts from; the reduction
is mlx's.
"""

from __future__ import annotations

from typing import Any

from fastlvm.ops import _mlx_call
from fastlvm.ops._extension import _C
from fastlvm.ops.info_nce import reference_mlx
from fastlvm.ops.info_nce.reference import split


def run(queries: Any, keys: Any, temperature: float, symmetric: bool, mask: Any, reduction: str) -> Any:
    left_out, *labels = split(mask)
    options = (float(temperature), bool(symmetric), left_out, *map(_contiguous, labels))

    def forward(queries: Any, keys: Any) -> tuple[Any, Any]:
        dtype, batch = _mlx_call.state_dtype(queries), queries.shape[0]
        losses = _mlx_call.empty((batch,), dtype)
        log_sums = _mlx_call.empty((2 if symmetric else 1, batch), dtype)
        given = map(_mlx_call.memory, (queries, keys))
        _C.info_nce(*given, *options, losses, None, log_sums, None, None)
        return losses, log_sums

    def backward(cotangents: Any, results: Any, *inputs: Any) -> list[Any]:
        buffers = _mlx_call.gradient_buffers(inputs)
        given = map(_mlx_call.memory, inputs)
        _C.info_nce_bwd(cotangents[0], *given, *options, results[1], *_mlx_call.written(buffers))
        return _mlx_call.gradients(inputs, buffers)

    def formula(queries: Any, keys: Any) -> tuple[Any, Any]:
        return reference_mlx.losses(queries, keys, *options)

    each, _ = _mlx_call.differentiable((queries, keys), forward, backward, formula)
    return reference_mlx.reduced(each, reduction)


def _contiguous(labels: Any) -> Any:
    if labels is None:
        return None
    import mlx.core as mx

    labels = mx.contiguous(labels)
    mx.eval(labels)
    return labels
