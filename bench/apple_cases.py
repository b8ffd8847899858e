"""Calls of the ops for an Apple GPU: their inputs, their oracle and the least work they have to do.

Inputs are float32 arrays of numpy whose values the case's dtypes hold exactly, so that the float64 oracle and every
contender see the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

import apple_oracle
import fastlvm

Given = dict[str, Any]
ALL = ("D", "z", "delta_bias", "delta_softplus", "initial_state")
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
TEMPERATURE = 0.07
_PART = (2, 4)  # batch entries and channels that the oracle of a timed shape looks at


def rounded(x: Any, dtype: str) -> Any:
    """The nearest values of `dtype`, to even, as float32."""
    x = np.asarray(x, np.float32)
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return x.astype(dtype).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """One call. `weights` is the dtype of parameters and states, `dtype` that of the other arrays.

    `lengths` packs sequences, and the batch is 1 then. `rows` has channels next to each other in memory. `compiled`
    checks the call through mx.compile as well.
    """

    dtype: str = "float32"
    weights: str = "float32"
    lengths: tuple[int, ...] | None = None
    rows: bool = False
    compiled: bool = False
    gradient: bool = True

    op: ClassVar[str] = ""
    outputs: ClassVar[tuple[str, ...]] = ("out", "final state")
    parameters: ClassVar[frozenset[str]] = frozenset()
    local: ClassVar[tuple[str, ...]] = ()  # whose gradient at a batch entry and channel knows of no others

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def id(self) -> str:
        extra = [] if self.lengths is None else ["packed", *map(str, self.lengths)]
        extra += ["rows"] * self.rows + ["compiled"] * self.compiled + self.marks()
        dtypes = [self.dtype] + [f"weights-{self.weights}"] * (bool(self.parameters) and self.weights != self.dtype)
        return "-".join([self.op, *map(str, self.shape), *dtypes, *extra])

    @property
    def title(self) -> str:
        passes = "" if not self.local else ", fwd + bwd" if self.gradient else ", fwd"
        return f"{self.op} {self.shape}, {self.dtype}{passes}"

    def marks(self) -> list[str]:
        return []

    def drawn(self, rng: np.random.Generator) -> Given:
        """Arguments before they are rounded; what is no array of float32 stays as it is."""
        raise NotImplementedError

    def given(self, seed: int = 0) -> Given:
        found = self.drawn(np.random.default_rng(seed))
        if self.lengths is not None:
            found["cu_seqlens"] = np.cumsum([0, *self.lengths]).astype(np.int32)
        return {name: rounded(x, self.dtype_of(name)) if _floats(x) else x for name, x in found.items()}

    def dtype_of(self, name: str) -> str:
        return self.weights if name in self.parameters else self.dtype

    def call(self, arrays: Given, backend: str = "auto") -> list[Any]:
        """What the op gives for arrays of mlx or torch, states after a step included."""
        found = getattr(fastlvm, self.op)(**arrays, return_final_state=True, backend=backend)
        return list(found)

    def alone(self, arrays: Given, backend: str = "auto") -> list[Any]:
        """`call` without what a timed call does not ask for."""
        return [getattr(fastlvm, self.op)(**arrays, backend=backend)]

    def oracle(self, given: Given, cotangents: Any = None) -> apple_oracle.Found:
        wide = {name: x.astype(np.float64) if _floats(x) else x for name, x in given.items()}
        if cotangents is not None:
            wide["cotangents"] = [g.astype(np.float64) for g in cotangents]
        found: apple_oracle.Found = getattr(apple_oracle, self.op)(**wide)
        return found

    def part(self, given: Given) -> Given:
        """The arguments of a call for a few batch entries and channels."""
        return given

    def cut(self, x: Any) -> Any:
        """That part of an output, or of the gradient of a `local` argument."""
        return x

    def to_mlx(self, given: Given) -> Given:
        return {name: self._array(name, x) for name, x in given.items()}

    def _array(self, name: str, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(mx.array, x))
        if not _floats(x):
            return mx.array(x) if isinstance(x, np.ndarray) else x
        if not self.rows or x.ndim < 3 or name in self.parameters:
            return mx.array(x).astype(getattr(mx, self.dtype_of(name)))
        laid = mx.array(np.ascontiguousarray(x.swapaxes(-1, -2))).astype(getattr(mx, self.dtype_of(name)))
        return mx.swapaxes(laid, -1, -2)

    def bytes(self, given: Given) -> int:
        """Every argument read once and every output written once; with gradients once more, and a gradient each."""
        sizes = {name: x.size * BYTES[self.dtype_of(name)] for name, x in given.items() if _floats(x)}
        out = given[self.result].size * BYTES[self.dtype]
        return sum(sizes.values()) * (3 if self.gradient else 1) + out * (2 if self.gradient else 1)

    result: ClassVar[str] = "u"  # has the size of the output


def _floats(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype == np.float32


def leaves(given: Given) -> list[str]:
    """The names of the arrays that have gradients."""
    return [name for name, x in given.items() if _floats(x)]


def _normal(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape, np.float32)


@dataclass(frozen=True)
class Scan(Case):
    """`B` and `C` are "dn", "bnl", or the number of groups of [B, G, N, L]."""

    batch: int = 2
    channels: int = 4
    length: int = 6
    state: int = 16
    B: str | int = "bnl"
    C: str | int = "bnl"
    options: tuple[str, ...] = ALL
    step: float = 0.5  # scale of the step sizes
    decay: float = 1.0  # scale of A

    op = "ssm_scan"
    parameters = frozenset({"A", "D", "delta_bias", "initial_state"})
    local = ("u", "delta", "z")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.length, self.state

    def marks(self) -> list[str]:
        found = [f"{name}{layout}" for name, layout in (("B", self.B), ("C", self.C)) if layout != "bnl"]
        found += [] if self.options == ALL else ["with", *self.options] if self.options else ["bare"]
        return found + ([] if (self.step, self.decay) == (0.5, 1.0) else [f"step{self.step}", f"decay{self.decay}"])

    def dtype_of(self, name: str) -> str:
        constant = name in "BC" and getattr(self, name) == "dn"
        return self.weights if constant else super().dtype_of(name)

    def drawn(self, rng: np.random.Generator) -> Given:
        b, d, length, n = self.shape
        time, sequences = (b, d, length), b if self.lengths is None else len(self.lengths)
        delta = np.float32(self.step) * _normal(rng, *time)
        found: Given = {
            "u": _normal(rng, *time),
            "delta": delta,
            "A": -np.float32(self.decay) * np.exp(_normal(rng, d, n)),
        }
        if "delta_softplus" not in self.options:
            found["delta"] = abs(delta)
        for name in "BC":
            layout = getattr(self, name)
            found[name] = _normal(rng, *{"dn": (d, n), "bnl": (b, n, length)}.get(layout, (b, layout, n, length)))
        optional: dict[str, Any] = {
            "D": lambda: _normal(rng, d),
            "z": lambda: _normal(rng, *time),
            "delta_bias": lambda: np.float32(0.1) * abs(_normal(rng, d)),
            "delta_softplus": lambda: True,
            "initial_state": lambda: _normal(rng, sequences, d, n),
        }
        return found | {name: optional[name]() for name in self.options}

    def part(self, given: Given) -> Given:
        b, d = _PART
        channels = {name: given[name][:d] for name in ("A", "D", "delta_bias") if name in given}
        batch = {name: given[name][:b] for name in "BC"}
        return given | channels | batch | {name: self.cut(given[name]) for name in self.local if name in given}

    def cut(self, x: Any) -> Any:
        return x[: _PART[0], : _PART[1]]


@dataclass(frozen=True)
class Ssd(Case):
    batch: int = 2
    length: int = 6
    heads: int = 4
    dim: int = 5
    groups: int = 2
    state: int = 16
    options: tuple[str, ...] = ("D", "z", "dt_bias", "dt_softplus", "initial_state")

    op = "ssd_scan"
    parameters = frozenset({"A", "D", "dt_bias", "initial_state"})
    result = "x"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.length, self.heads, self.dim, self.groups, self.state

    def marks(self) -> list[str]:
        return [] if len(self.options) == 5 else ["with", *self.options]

    def drawn(self, rng: np.random.Generator) -> Given:
        b, length, h, p, g, n = self.shape
        sequences = b if self.lengths is None else len(self.lengths)
        found = {"x": _normal(rng, b, length, h, p), "dt": np.float32(0.5) * _normal(rng, b, length, h)}
        if "dt_softplus" not in self.options:
            found["dt"] = abs(found["dt"])
        found |= {"A": -np.exp(_normal(rng, h))} | {name: _normal(rng, b, length, g, n) for name in "BC"}
        optional = {
            "D": _normal(rng, h),
            "z": _normal(rng, b, length, h, p),
            "dt_bias": np.float32(0.1) * abs(_normal(rng, h)),
            "dt_softplus": True,
            "initial_state": _normal(rng, sequences, h, p, n),
        }
        return found | {name: optional[name] for name in self.options}


@dataclass(frozen=True)
class Conv(Case):
    batch: int = 2
    channels: int = 4
    length: int = 6
    width: int = 4
    options: tuple[str, ...] = ("bias", "activation", "initial_state")

    op = "causal_conv1d"
    parameters = frozenset({"weight", "bias"})
    local = ("x",)
    result = "x"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.length, self.width

    def marks(self) -> list[str]:
        return [] if len(self.options) == 3 else ["with", *self.options] if self.options else ["bare"]

    def drawn(self, rng: np.random.Generator) -> Given:
        b, d, length, w = self.shape
        sequences = b if self.lengths is None else len(self.lengths)
        optional = {"bias": _normal(rng, d), "activation": "silu", "initial_state": _normal(rng, sequences, d, w - 1)}
        found = {"x": _normal(rng, b, d, length), "weight": _normal(rng, d, w)}
        return found | {name: optional[name] for name in self.options}

    def part(self, given: Given) -> Given:
        found = given | {name: given[name][: _PART[1]] for name in ("weight", "bias") if name in given}
        return found | {"x": self.cut(given["x"])}

    def cut(self, x: Any) -> Any:
        return x[: _PART[0], : _PART[1]]


@dataclass(frozen=True)
class Stepped(Case):
    """A one-token op, which writes `state`. With `pool` there are so many states, and a row that is padding."""

    batch: int = 3
    channels: int = 4
    pool: int | None = None
    gradient: bool = False

    outputs = ("out", "state after")
    result = "x"

    @property
    def states(self) -> int:
        return self.pool or self.batch

    def marks(self) -> list[str]:
        return [] if self.pool is None else [f"pool{self.pool}"]

    def indexed(self, found: Given, rng: np.random.Generator) -> Given:
        if self.pool is None:
            return found
        indices = rng.permutation(self.pool)[: self.batch].astype(np.int32)
        indices[self.batch // 2] = -1
        return found | {"state_indices": indices}

    def call(self, arrays: Given, backend: str = "auto") -> list[Any]:
        out = getattr(fastlvm, self.op)(**arrays, backend=backend)
        return [out, arrays["state"]]

    alone = call

    def part(self, given: Given) -> Given:
        return given | {
            name: given[name][: _PART[0]] for name in ("state", "x", "delta", "B", "C", "z") if name in given
        }

    def cut(self, x: Any) -> Any:
        return x[: _PART[0]]

    def bytes(self, given: Given) -> int:
        return super().bytes(given) + given["state"].size * BYTES[self.weights]


@dataclass(frozen=True)
class ScanStep(Stepped):
    state: int = 16
    B: str | int = "bn"
    C: str | int = "bn"

    op = "ssm_step"
    parameters = frozenset({"state", "A", "D", "delta_bias"})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.state

    def drawn(self, rng: np.random.Generator) -> Given:
        b, d, n = self.shape
        found = {"state": _normal(rng, self.states, d, n), "x": _normal(rng, b, d)}
        found |= {"delta": np.float32(0.5) * _normal(rng, b, d), "A": -np.exp(_normal(rng, d, n))}
        for name in "BC":
            groups = getattr(self, name)
            found[name] = _normal(rng, *((b, n) if groups == "bn" else (b, groups, n)))
        found |= {"D": _normal(rng, d), "z": _normal(rng, b, d)}
        found |= {"delta_bias": np.float32(0.1) * abs(_normal(rng, d))}
        return self.indexed(found | {"delta_softplus": True}, rng)


@dataclass(frozen=True)
class ConvStep(Stepped):
    width: int = 4
    extra: int = 0  # of what the state holds beyond the inputs that count

    op = "causal_conv1d_step"
    parameters = frozenset({"state", "weight", "bias"})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.width + self.extra

    def drawn(self, rng: np.random.Generator) -> Given:
        held = self.width - 1 + self.extra
        found = {"x": _normal(rng, self.batch, self.channels), "state": _normal(rng, self.states, self.channels, held)}
        found |= {"weight": _normal(rng, self.channels, self.width), "bias": _normal(rng, self.channels)}
        return self.indexed(found | {"activation": "silu"}, rng)


@dataclass(frozen=True)
class Nce(Case):
    """`mask` is None, "dense", or the number of columns of labels; rows have a length of 1 where `unit`."""

    batch: int = 7
    keys: int = 7
    dim: int = 5
    temperature: float = 0.5
    symmetric: bool = False
    mask: str | int | None = None
    reduction: str = "mean"
    unit: bool = False

    op = "info_nce"
    outputs = ("loss",)
    local = ("queries", "keys")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.keys, self.dim

    def marks(self) -> list[str]:
        found = ["both"] * self.symmetric + ([] if self.mask is None else [f"mask-{self.mask}"])
        return found + [self.reduction] * (self.reduction != "mean")

    def drawn(self, rng: np.random.Generator) -> Given:
        found: Given = {"queries": _normal(rng, self.batch, self.dim), "keys": _normal(rng, self.keys, self.dim)}
        if self.unit:
            found = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in found.items()}
        found |= {"temperature": self.temperature, "symmetric": self.symmetric, "reduction": self.reduction}
        if self.mask == "dense":
            found["mask"] = rng.random((self.batch, self.keys)) < 0.3
        elif isinstance(self.mask, int):
            found["mask"] = tuple(rng.integers(-2, 6, (n, self.mask)) for n in (self.batch, self.keys))
        return found

    def call(self, arrays: Given, backend: str = "auto") -> list[Any]:
        return [fastlvm.info_nce(**arrays, backend=backend)]

    alone = call

    def bytes(self, given: Given) -> int:
        return BYTES[self.dtype] * (self.batch + self.keys) * self.dim * (2 if self.gradient else 1)
