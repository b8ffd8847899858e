"""Gates of a run: what its validation has to reach by an epoch, or it stops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastlvm.errors import InputError
from fastlvm.evaluation.gate_file import Gate, Limit, load_gate
from fastlvm.evaluation.gates import Found, Verdict, verdicts
from fastlvm.training.options import parse_gate
from fastlvm.training.validation import key


class RunGates:
    """The gates that options such as "epoch-4@4" name, by their epoch.

    Judged is the validation split, whatever split a gate is about, and of a gate what a validation gives: metrics over
    the whole payload, the context left out. Raises InputError for a gate that is not known, whose file is none, or
    that limits nothing of the kind.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._gates: list[tuple[int, Gate]] = []
        for text in texts:
            name, epoch = parse_gate(text)
            gate = load_gate(name)
            if not any(_is_judged(limit) for limit in gate.limits):
                raise InputError(f"gate {gate.name} limits no metric of a validation: leave {text} out")
            self._gates.append((epoch, gate))

    def judge(self, entry: Mapping[str, Any], ended: bool) -> list[Verdict]:
        """Verdicts of an epoch's gates on its line of the history, and where the run has ended of those after it."""

        def find(limit: Limit) -> Found:
            if not _is_judged(limit):
                return Found(note="in training", judged=False)
            return Found(entry.get(key(limit.figure)))

        due = [gate for epoch, gate in self._gates if epoch == entry["epoch"] or (ended and epoch > entry["epoch"])]
        return [verdict for gate in due for verdict in verdicts(gate, find)]


def _is_judged(limit: Limit) -> bool:
    return limit.kind == "metric" and limit.rows == "excluded" and not limit.over and limit.domain == "in"
