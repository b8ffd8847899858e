"""States that the layers of a model carry from call to call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastlvm.errors import InputError

States = tuple[Tensor, Tensor]  # of the convolution, of the scan; written in place


@dataclass
class InferenceParams:
    """What `inference_params` is: how many tokens the layers have seen, and the states of each by `layer_idx`."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin again with sequences of these bounds; the states stay in memory."""
        self.max_seqlen, self.max_batch_size = max_seqlen, max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def states(inference_params: Any, layer_idx: int | None, start: Callable[[], States], afresh: bool = False) -> States:
    """The states that `inference_params` holds for a layer, made by `start` the first time, zeroed if `afresh`."""
    if layer_idx is None:
        raise InputError("inference_params: the layer has no layer_idx to keep its states under; construct it with one")
    held: States | None = inference_params.key_value_memory_dict.get(layer_idx)
    if held is None:
        held = inference_params.key_value_memory_dict[layer_idx] = start()
    elif afresh:
        for state in held:
            state.zero_()
    return held
