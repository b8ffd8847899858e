"""InfoNCE in plain PyTorch, with all logits in memory: the definition of correct.

    l_ij = q_i·k_j / τ                                 -inf for what is left out
    loss_i = log Σ_j exp(l_ij) - l_ii                  of one direction
    loss_i = (log Σ_j exp(l_ij) + log Σ_j exp(l_ji)) / 2 - l_ii        symmetric

van den Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding" (2018), equation 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlvm.ops import _arrays
from fastlvm.ops._plain import describe, supports, without_autocast

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["describe", "losses", "run", "split", "supports"]


def run(queries: Any, keys: Any, temperature: float, symmetric: bool, mask: Any, reduction: str) -> Any:
    if _arrays.kind(queries) == "mlx":
        from fastlvm.ops.info_nce import reference_mlx

        return reference_mlx.run(queries, keys, temperature, symmetric, split(mask), reduction)

    def reduced(*args: Any) -> tuple[Tensor]:
        each = losses(*args)
        return (each if reduction == "none" else each.sum() if reduction == "sum" else each.mean(),)

    args = (queries, keys, temperature, symmetric, *split(mask))
    if _arrays.kind(queries) == "numpy":
        return _arrays.through_torch(reduced, *args)[0][()]
    return reduced(*args)[0]


def split(mask: Any) -> tuple[Any, Any, Any]:
    """The mask [B, M], labels of the queries [B, G] and of the keys [M, G]; None for what was not given."""
    return (None, *mask) if isinstance(mask, (tuple, list)) else (mask, None, None)


def losses(
    queries: Tensor,
    keys: Tensor,
    temperature: float,
    symmetric: bool,
    mask: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
) -> Tensor:
    """[B], computed in float32, in float64 for float64."""
    import torch
    import torch.nn.functional as F

    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    with without_autocast(queries):
        logits = queries.to(dtype) @ keys.to(dtype).T / temperature  # [B, M]
    own = torch.arange(queries.shape[0], device=queries.device)
    left_out = mask
    if query_labels is not None and key_labels is not None:
        left_out = torch.zeros_like(logits, dtype=torch.bool)
        for ours, theirs in zip(query_labels.unbind(1), key_labels.unbind(1), strict=True):
            left_out = left_out | ((ours[:, None] == theirs) & (ours >= 0)[:, None])
    if left_out is not None:
        positives = own[:, None] == torch.arange(keys.shape[0], device=queries.device)
        logits = logits.masked_fill(left_out & ~positives, float("-inf"))
    loss = F.cross_entropy(logits, own, reduction="none")
    return (loss + F.cross_entropy(logits.T, own, reduction="none")) / 2 if symmetric else loss
