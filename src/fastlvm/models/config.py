"""What a model is made of, as data: one frozen record that goes into every run, checkpoint and artifact."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fastlvm.errors import InputError

# name -> (module:class that builds it, the fields in which it differs from ModelConfig's defaults)
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba-s": ("fastlvm.models.mamba:MambaPredictor", {}),
}

MOST = 1 << 16  # of any count below


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a predictor `[B, L, vector_dim] -> [B, vector_dim]`.

    vector_dim  length of the payload's vectors.
    d_model     width of the blocks; when it differs from vector_dim an input layer maps one to the other.
    n_layers, d_state, d_conv, expand    Mamba blocks: number, state size N, convolution width, d_inner / d_model.
    dt_rank     rank of the step-size projection; None becomes ceil(d_model / 16).
    dropout     on each block's output, while training.
    context     most positions a context holds.
    residual    the head is added to a learned recency mixture of the context; without it the head stands alone.
    decay       the mixture's weights start at decay ** age, the newest position having age 0.
    norm_eps    epsilon of every RMSNorm.
    """

    name: str = "mamba-s"
    vector_dim: int = 768
    d_model: int = 768
    n_layers: int = 8
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    dropout: float = 0.1
    context: int = 5
    residual: bool = True
    decay: float = 0.3
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.name not in PRESETS:
            raise InputError(f"model {self.name!r} is not known: choose one of {', '.join(sorted(PRESETS))}")
        for field in ("vector_dim", "d_model", "n_layers", "d_state", "d_conv", "expand", "context"):
            _check_count(field, getattr(self, field))
        if self.dt_rank is None:
            object.__setattr__(self, "dt_rank", math.ceil(self.d_model / 16))
        _check_count("dt_rank", self.dt_rank)
        if not isinstance(self.residual, bool):
            raise InputError(f"residual is {self.residual!r}, and it has to be True or False")
        _check_real("dropout", self.dropout, "at least 0 and below 1", lambda v: 0 <= v < 1)
        _check_real("decay", self.decay, "above 0 and at most 1", lambda v: 0 < v <= 1)
        _check_real("norm_eps", self.norm_eps, "above 0", lambda v: 0 < v < math.inf)

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed; dt_rank follows a new d_model unless it is given."""
        if "d_model" in changes and "dt_rank" not in changes:
            changes["dt_rank"] = None
        return ModelConfig.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build from a mapping; a key that is no field is refused."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise InputError(f"{key!r} is no field of a model: choose from {', '.join(known)}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """The configuration of a named model, with some fields overridden."""
        if name not in PRESETS:
            raise InputError(f"model {name!r} is not known: choose one of {', '.join(sorted(PRESETS))}")
        return cls.from_dict({"name": name, **PRESETS[name][1], **overrides})


def _check_count(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise InputError(f"{field} is {value!r}, and it has to be a whole number from 1 to {MOST}")


def _check_real(field: str, value: Any, wanted: str, holds: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
        raise InputError(f"{field} is {value!r}, and it has to be a number {wanted}")
