"""What a model is made of, as data: one frozen record that goes into every run, checkpoint and artifact."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fastlvm.errors import InputError

STACK = "fastlvm.models.stack:Stack"

# name -> (module:class that builds it, the fields in which it differs from ModelConfig's defaults)
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixture": ("fastlvm.models.mixture:Mixture", {}),
    "mlp": ("fastlvm.models.mlp:Mlp", {}),
    "mamba-s": (STACK, {}),
    "mamba-h": (STACK, {"n_layers": 10, "layout": "mamba mamba mamba attention"}),
    "mamba-xl": (STACK, {"d_model": 960, "n_layers": 12, "d_state": 160, "expand": 3}),
    "mamba-sandwich": (STACK, {"n_layers": 12, "layout": "attention*2 mamba*8 attention*2"}),
    "mamba-gr": (STACK, {"layout": "mamba+gate", "d_state": 144}),
    "mamba2": (STACK, {"d_model": 512, "n_layers": 4, "layout": "mamba2"}),
    "transformer": (
        STACK,
        {"d_model": 512, "n_layers": 4, "layout": "attention+mlp", "heads": 8, "window": None, "positions": True},
    ),
    "gru": (STACK, {"d_model": 512, "n_layers": 4, "layout": "gru"}),
    "lstm": (STACK, {"d_model": 512, "n_layers": 2, "layout": "lstm"}),
    "amn": ("fastlvm.models.amn:Amn", {"d_ff": 512, "decay": 1.0}),
}

BLOCKS = ("mamba", "mamba2", "attention", "mlp", "gate", "gru", "lstm")
"""What a layout is written of."""

MOST = 1 << 16  # of any count below


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a predictor `[B, L, vector_dim] -> [B, vector_dim]`.

    vector_dim  length of the payload's vectors.
    d_model     width of the blocks; when it differs from vector_dim an input layer maps one to the other.
    n_layers    number of layers.
    layout      what they are, one after the other and again from the first: a block's name, or several with + between
                them; "mamba*3 attention" is three layers of mamba and one of attention.
    d_state, d_conv, expand    mamba and mamba2: state size N, convolution width, d_inner / d_model.
    dt_rank     mamba: rank of the step-size projection; None becomes ceil(d_model / 16).
    head_dim    mamba2: channels of a head.
    heads, window    attention: heads, and how many positions one sees; None is all of the context.
    d_ff        the block mlp, and the models mlp and amn: width of the first hidden layer.
    hidden      gate: cells of the GRU; amn: length of query and keys, and of the second hidden layer.
    positions   a learned vector a position is added to the input.
    dropout     on the input and on each block's output, while training.
    context     most positions a context holds.
    residual    the head is added to a learned recency mixture of the context; without it the head stands alone.
    decay       the mixture's weights start at decay ** age, the newest position having age 0.
    norm_eps    epsilon of every RMSNorm.
    """

    name: str = "mamba-s"
    vector_dim: int = 768
    d_model: int = 768
    n_layers: int = 8
    layout: str = "mamba"
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    head_dim: int = 64
    heads: int = 4
    window: int | None = 8
    d_ff: int = 2048
    hidden: int = 256
    positions: bool = False
    dropout: float = 0.3
    context: int = 5
    residual: bool = True
    decay: float = 0.3
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.name not in PRESETS:
            raise InputError(f"model {self.name!r} is not known: choose one of {', '.join(sorted(PRESETS))}")
        for field in _COUNTS:
            _check_count(field, getattr(self, field))
        if self.window is not None:
            _check_count("window", self.window)
        if self.dt_rank is None:
            object.__setattr__(self, "dt_rank", math.ceil(self.d_model / 16))
        _check_count("dt_rank", self.dt_rank)
        for field in ("residual", "positions"):
            if not isinstance(getattr(self, field), bool):
                raise InputError(f"{field} is {getattr(self, field)!r}, and it has to be True or False")
        _check_real("dropout", self.dropout, "at least 0 and below 1", lambda v: 0 <= v < 1)
        _check_real("decay", self.decay, "above 0 and at most 1", lambda v: 0 < v <= 1)
        _check_real("norm_eps", self.norm_eps, "above 0", lambda v: 0 < v < math.inf)

        self._check_blocks({block for layer in self.layers for block in layer})

    def _check_blocks(self, blocks: set[str]) -> None:
        if PRESETS[self.name][0] != STACK:
            return
        if "attention" in blocks and self.d_model % self.heads:
            raise InputError(f"heads is {self.heads}, and it has to divide d_model, which is {self.d_model}")
        if "mamba2" in blocks and self.d_inner % self.head_dim:
            raise InputError(f"head_dim is {self.head_dim}, and it has to divide expand · d_model, {self.d_inner}")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """The names of each layer's blocks."""
        cycle = _parse_layout(self.layout)
        return tuple(cycle[i % len(cycle)] for i in range(self.n_layers))

    def check_context(self, shape: tuple[int, ...], dtype: object, floating: bool) -> None:
        """Raises InputError for what is no context: an array of this shape and dtype."""
        if len(shape) != 3 or shape[2] != self.vector_dim or not 1 <= shape[1] <= self.context:
            raise InputError(
                f"the context has shape {shape}, and the model takes [batch, 1 to {self.context}, {self.vector_dim}]"
            )
        if not floating:
            raise InputError(f"the context has dtype {dtype}, and the model takes floating-point vectors")

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


_COUNTS = (
    "vector_dim",
    "d_model",
    "n_layers",
    "d_state",
    "d_conv",
    "expand",
    "head_dim",
    "heads",
    "d_ff",
    "hidden",
    "context",
)


def _parse_layout(text: Any) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for part in text.split() if isinstance(text, str) else []:
        names, star, times = part.partition("*")
        blocks = tuple(names.split("+"))
        count = int(times) if times.isdecimal() and len(times) < 6 else 0 if star else 1
        if not set(blocks) <= set(BLOCKS) or not 1 <= count <= MOST:
            raise InputError(f"layout has {part!r}, and names of {', '.join(BLOCKS)} are wanted, such as mamba+gate*2")
        found += [blocks] * count
    if not found:
        raise InputError(f"layout is {text!r}, and one or more of {', '.join(BLOCKS)} are wanted")
    return found


def _check_count(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise InputError(f"{field} is {value!r}, and it has to be a whole number from 1 to {MOST}")


def _check_real(field: str, value: Any, wanted: str, holds: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
        raise InputError(f"{field} is {value!r}, and it has to be a number {wanted}")
