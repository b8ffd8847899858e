"""InfoNCE, the contrastive loss of a query and its key among all the others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastlvm.ops import _arrays, _checks, dispatch
from fastlvm.ops.info_nce import cpu, mlx, reference, triton

_OP = "info_nce"
_REDUCTIONS = ("mean", "sum", "none")
_MOST_LABELS = 16


def info_nce(
    queries: Any,
    keys: Any,
    temperature: float = 0.07,
    *,
    symmetric: bool = False,
    mask: Any = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Any:
    """Cross-entropy of every query's own key among all keys: `loss_i = log Σ_j exp(q_i·k_j / τ) - q_i·k_i / τ`.

    Key i is the positive of query i; keys from B on are further negatives. The logits [B, M] are never in memory as a
    whole on the cpu and triton backends: peak memory is O((B + M) D), beside one block of logits.

    numpy arrays in, a numpy array out, without gradients; torch tensors or mlx arrays in, the same out, with gradients
    for queries and keys. Any strides are read as they are. Dtypes are float32, float16 and bfloat16 (not numpy's), each
    array its own, with float32 sums; or float64 throughout. torch.autocast changes none of them. Where queries and keys
    are both bfloat16, gradients of the logits may be rounded to bfloat16 before they are summed up. Vectors are taken
    as they are: normalise them for cosines.

    Args:
        queries: [B, D]. Any size may be 0.
        keys: [M, D], M at least B.
        temperature: τ, a positive finite number. A learned one is `info_nce(queries * scale, keys, 1.0)`.
        symmetric: the mean of this loss and of the same with queries and keys changing places (CLIP); M is B then.
        mask: what is no negative; a positive never counts as masked. Either bool [B, M], True for what is left out of
            query i's sum (and key j's, where symmetric). Or, with no array [B, M] at all, a pair of int64 labels
            ([B, G], [M, G]), G from 1 to 16: key j is left out for query i where any column holds the same label of
            0 or more for both.
        reduction: "mean" (NaN for no query, as torch has it), "sum", or "none" for the losses [B].
        backend: "auto", or a name that `fastlvm.explain("info_nce", ...)` lists.

    Returns:
        The loss in float32 (float64 for float64), [] or [B].

    Raises:
        TypeError: an argument is no array, of another kind than queries, or of a dtype that is not taken; the
            temperature is no number.
        ValueError: a rank, a shape, a device, the temperature or the reduction does not fit, or the backend named
            cannot run the call.

    Sources: van den Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018. Over
    tiles: Cheng et al., "Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss", 2024;
    gradients in the forward as in Liger Kernel's fused linear cross-entropy, 2024.
    """
    args = (queries, keys, temperature, symmetric, mask, reduction)
    _check(*args)
    return dispatch.choose(_OP, backend, args).run(*args)


def _check(queries: Any, keys: Any, temperature: float, symmetric: bool, mask: Any, reduction: str) -> None:
    _checks.check_arrays(_OP, (), {"queries": queries, "keys": keys})
    _checks.check_flag(_OP, "symmetric", symmetric)
    _check_temperature(temperature)
    if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
        raise ValueError(f'{_OP}: reduction is {reduction!r}; wants "mean", "sum" or "none"')
    _checks.check_rank(_OP, "queries", queries, "(B, D)", 2)
    _checks.check_rank(_OP, "keys", keys, "(M, D)", 2)
    batch, dim = queries.shape
    count = keys.shape[0]
    _checks.check_shape(_OP, "keys", keys, "(M, D)", (count, dim))
    if count < batch:
        raise ValueError(f"{_OP}: keys has {count} rows; wants {batch} or more, one for each query first")
    if symmetric and count != batch:
        raise ValueError(f"{_OP}: keys has {count} rows; wants {batch}, as queries has, with symmetric=True")
    if mask is not None:
        _check_mask(queries, count, mask)


def _check_temperature(temperature: Any) -> None:
    wants = "wants a positive finite number"
    if _arrays.kind(temperature) in ("torch", "mlx"):
        raise TypeError(
            f"{_OP}: temperature is a {type(temperature).__name__}; {wants}, for a learned one pass queries * scale "
            "and temperature 1.0"
        )
    if isinstance(temperature, (bool, np.bool_)) or not isinstance(temperature, (int, float, np.integer, np.floating)):
        raise TypeError(f"{_OP}: temperature is {temperature!r}; {wants}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{_OP}: temperature is {temperature!r}; {wants}")


def _check_mask(queries: Any, count: int, mask: Any) -> None:
    batch = queries.shape[0]
    if not isinstance(mask, (tuple, list)):
        _check_kind("mask", mask, queries, "bool")
        _checks.check_shape(_OP, "mask", mask, "(B, M)", (batch, count))
        return
    if len(mask) != 2:
        raise ValueError(f"{_OP}: mask has {len(mask)} entries; wants a pair, the labels of queries and those of keys")
    for i, (letters, rows) in enumerate((("(B, G)", batch), ("(M, G)", count))):
        name, labels = f"mask[{i}]", mask[i]
        _check_kind(name, labels, queries, "int64")
        _checks.check_rank(_OP, name, labels, letters, 2)
        columns = mask[0].shape[1]
        if not 1 <= columns <= _MOST_LABELS:
            raise ValueError(f"{_OP}: {name} has {columns} columns; wants 1 to {_MOST_LABELS}")
        _checks.check_shape(_OP, name, labels, letters, (rows, columns))


def _check_kind(name: str, x: Any, queries: Any, dtype: str) -> None:
    kind = _arrays.kind(queries)
    if _arrays.kind(x) != kind:
        wants = {"torch": "a torch tensor", "mlx": "an mlx array"}.get(kind or "", "a numpy array")
        pair = ", or a pair of int64 labels" if name == "mask" else ""
        raise TypeError(f"{_OP}: {name} is a {type(x).__name__}; wants {wants} of {dtype}{pair}")
    found = _arrays.dtype_name(x)
    if found != dtype:
        raise TypeError(f"{_OP}: {name} is {found}; wants {dtype}")
    if kind == "torch" and (x.is_nested or str(x.layout) != "torch.strided"):
        raise TypeError(f"{_OP}: {name} has layout {x.layout}; wants a dense (strided) tensor")
    here, there = _arrays.device(x), _arrays.device(queries)
    if here != there:
        raise ValueError(f"{_OP}: {name} is on {here} but queries is on {there}; move them to one device")


dispatch.register(_OP, info_nce, _check, cpu, triton, mlx, reference)
