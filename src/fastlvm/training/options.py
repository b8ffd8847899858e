"""What a training run is asked to do, as data, and the learning rate it follows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fastlvm.errors import InputError, shown

OBJECTIVES = ("contrastive", "infonce", "ar")
PRECISIONS = ("fp32", "bf16")
HARD = ("same-article", "index")
PROJECTIONS = ("none", "mlp")
NEGATIVES = ("batch", "payload")
FALSE_NEGATIVES = ("article", "group")
MOST_HARD = 50
MOST_HIDDEN = 1 << 16
SPACES = ("whiten", "none")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Settings of a run; a resumed run has to have the same ones.

    objective          "contrastive" (InfoNCE and the cosine to the target), "infonce" (InfoNCE alone) or "ar" (cosine
                       and squared error alone).
    space              "whiten": mean and whitening fitted on the training articles; "none": vectors as they are.
    epochs, batch_size, lr, weight_decay, clip, seed    as usual; lr is the peak, clip the gradient norm's bound.
    head_lr            the learning rate of a model's last layer, in units of lr: its outputs, the components of a unit
                       vector, are small beside all activations before it.
    warmup_steps       optimizer steps of linear warm-up, a third of all steps at most, then a cosine down to 1 % of lr
                       at the last step.
    patience           epochs without a better validation R@5 after which the run stops; 0 never stops early.
    projection         where InfoNCE is taken: "none" on the model's output, "mlp" behind a projection head.
    tower              hidden cells of a payload tower, 0 = none: payload and context go through it, InfoNCE teaches it
                       through the payload's side, and it becomes a part of the run's space.
    micro_batch        windows whose activations are held at once, 0 = all: a batch is then gone through twice, so that
                       its loss and its gradients are those of the whole (GradCache, Gao et al. 2021).
    negatives          "batch": the other targets of the batch, of all processes; "payload": every row of the training
                       articles; "payload:K": K of them, others in every step, where there are more.
    queue              with "batch": as many targets of the batches before are negatives as well.
    hard_negatives     "same-article:K": K rows of its own article for each window; "index:K": K of the 50 rows that
                       the model, as it was before the epoch, found nearest. With "batch" they are negatives of the
                       other windows too.
    false_negatives    rows that never serve as negatives: "article", those of the target's article and duplicate group;
                       "group", the duplicate group and the window's own context.
    temperature        of InfoNCE.
    infonce_weight     λ in λ · InfoNCE + (1 − λ) · (1 − cosine).
    context_dropout    probability that a window's last 1–3 context vectors are set to zero.
    span_corruption    probability that one context vector is replaced by one of another training article.
    reverse            train and validate on articles read backwards: the control for a model's sense of direction.
    precision          "bf16": matrix products of the model under torch's autocast, those of InfoNCE in bfloat16 with
                       sums in float32; weights stay float32.
    compile            run the model through torch.compile.
    deterministic      refuse torch operations whose bits change from run to run.
    ema                decay of an exponential average of the weights, which is then evaluated and kept; 0 is off.
    validation_limit   most validation windows an epoch is judged on, a fixed random sample of them.
    gates              "GATE@EPOCH", with the name or the file of a gate: what validation has to reach by the end of
                       that epoch, or the run stops. A resumed run may leave out those of epochs that are done.
    """

    objective: str = "contrastive"
    space: str = "whiten"
    epochs: int = 5
    batch_size: int = 512
    micro_batch: int = 0
    lr: float = 3e-4
    head_lr: float = 0.05
    weight_decay: float = 0.02
    warmup_steps: int = 50
    patience: int = 3
    clip: float = 1.0
    seed: int = 0
    projection: str = "none"
    tower: int = 0
    negatives: str = "payload:32768"
    queue: int = 0
    hard_negatives: str = ""
    false_negatives: str = "group"
    temperature: float = 0.05
    infonce_weight: float = 0.7
    context_dropout: float = 0.0
    span_corruption: float = 0.0
    reverse: bool = False
    precision: str = "fp32"
    compile: bool = False
    deterministic: bool = False
    ema: float = 0.0
    validation_limit: int = 5000
    gates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, known in (
            ("objective", OBJECTIVES),
            ("space", SPACES),
            ("projection", PROJECTIONS),
            ("false_negatives", FALSE_NEGATIVES),
            ("precision", PRECISIONS),
        ):
            value = getattr(self, field)
            if value not in known:
                raise InputError(f"{field} is {value!r}: choose one of {', '.join(known)}")
        for field, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("micro_batch", 0),
            ("tower", 0),
            ("queue", 0),
            ("warmup_steps", 0),
            ("patience", 0),
            ("seed", 0),
            ("validation_limit", 1),
        ):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{field} is {value!r}, and it has to be a whole number of at least {least}")
        for field in ("reverse", "compile", "deterministic"):
            if not isinstance(getattr(self, field), bool):
                raise InputError(f"{field} is {getattr(self, field)!r}, and it has to be true or false")
        self._check_tower()
        self._check_negatives()
        self._check_gates()
        if self.seed >= 2**32:
            raise InputError(f"seed is {self.seed}, and it has to be below 2^32")
        for field, least_open in (
            ("lr", True),
            ("head_lr", True),
            ("clip", True),
            ("temperature", True),
            ("weight_decay", False),
        ):
            value = getattr(self, field)
            if not _is_real(value) or value < 0 or (least_open and value == 0):
                raise InputError(f"{field} is {value!r}, and it has to be {'above' if least_open else 'at least'} 0")
        for field, below_one in (
            ("infonce_weight", False),
            ("context_dropout", False),
            ("span_corruption", False),
            ("ema", True),
        ):
            value = getattr(self, field)
            if not _is_real(value) or not 0 <= value <= 1 or (below_one and value == 1):
                raise InputError(f"{field} is {value!r}, and it has to lie between 0 and 1")

    def _check_tower(self) -> None:
        if self.tower > MOST_HIDDEN:
            raise InputError(f"tower is {self.tower}, and it has to be at most {MOST_HIDDEN}")
        if self.tower and (self.objective == "ar" or self.projection != "none"):
            what = "objective=ar, of which every tower makes one point" if self.objective == "ar" else "projection=mlp"
            raise InputError(f"tower is {self.tower}, and it does not learn with {what}: leave one of them out")

    def _check_negatives(self) -> None:
        parse_hard(self.hard_negatives)
        if parse_negatives(self.negatives)[0] != "payload":
            return
        if self.queue:
            raise InputError(
                f"queue is {self.queue}, and the payload's rows are negatives already: set negatives=batch"
            )
        if self.hard_negatives and self.false_negatives == "group":
            raise InputError(
                f"hard_negatives is {self.hard_negatives!r}, and negatives={self.negatives} with false_negatives=group "
                "takes rows of all articles already: set negatives=batch or false_negatives=article"
            )

    def _check_gates(self) -> None:
        if not isinstance(self.gates, list | tuple):
            raise InputError(f'gates is {shown(self.gates)}, and a list is wanted such as ["epoch-4@4"]')
        object.__setattr__(self, "gates", tuple(self.gates))
        for at, text in enumerate(self.gates):
            _, epoch = parse_gate(text)
            if epoch > self.epochs:
                raise InputError(f"gates has {text!r}, and the run ends with epoch {self.epochs}: name one up to that")
            if text in self.gates[:at]:
                raise InputError(f"gates has {text!r} twice: name every gate and epoch once")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**dataclasses.asdict(self), "gates": list(self.gates)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainOptions:
        """Build from a mapping; a key that is no field is refused."""
        known = option_names()
        for key in values:
            if key not in known:
                raise InputError(f"{key!r} is no training option: choose from {', '.join(known)}")
        return cls(**values)


def parse_hard(text: Any) -> tuple[str, int]:
    """Where hard negatives are from and how many a window has; ("", 0) for none."""
    if text == "":
        return "", 0
    source, _, count = text.partition(":") if isinstance(text, str) else ("", "", "")
    if source not in HARD or not count.isdecimal() or not 1 <= int(count) <= MOST_HARD:
        wanted = ", ".join(f"{name}:K" for name in HARD)
        raise InputError(
            f"hard_negatives is {text!r}: choose of {wanted}, with K from 1 to {MOST_HARD}, or leave it out"
        )
    return source, int(count)


def parse_negatives(text: Any) -> tuple[str, int]:
    """Where negatives are from, and how many there are at most; 0 is no bound."""
    name, colon, count = text.partition(":") if isinstance(text, str) else ("", "", "")
    if name not in NEGATIVES or (colon and (name == "batch" or not count.isdecimal() or not 0 < int(count) < 1 << 31)):
        raise InputError(f"negatives is {text!r}: choose one of batch, payload, payload:K with K from 1 on")
    return name, int(count or 0)


def parse_gate(text: Any) -> tuple[str, int]:
    """The name or file of a gate and the epoch it is due at, of "GATE@EPOCH"."""
    gate, _, epoch = text.rpartition("@") if isinstance(text, str) else ("", "", "")
    if not gate or not epoch.isdecimal() or not 1 <= int(epoch) < 1 << 31:
        raise InputError(f"gates has {shown(text)}: name a gate and an epoch from 1 on, such as epoch-4@4")
    return gate, int(epoch)


def option_names() -> list[str]:
    """Names of the fields of `TrainOptions`."""
    return [field.name for field in dataclasses.fields(TrainOptions)]


def learning_rate(step: int, steps: int, options: TrainOptions, floor: float = 0.01) -> float:
    """Rate of optimizer step `step` (0-based) of `steps`: linear up to lr, then a cosine down to floor · lr."""
    warmup = min(options.warmup_steps, steps // 3)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return options.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
