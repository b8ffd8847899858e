"""What is wrong with a set of windows, a payload, an index or a model: a verdict in plain words, with its figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlvm.data import Payload
from fastlvm.data.held import HeldWindows
from fastlvm.evaluation.diagnose.alignment import check_alignment
from fastlvm.evaluation.diagnose.drawn import draw
from fastlvm.evaluation.diagnose.indexes import check_index
from fastlvm.evaluation.diagnose.order import Reference, direction, order_sensitivity
from fastlvm.evaluation.diagnose.retrieval import check_ranker
from fastlvm.evaluation.diagnose.splits import check_duplicates, check_splits
from fastlvm.evaluation.diagnose.vectors import check_vectors, describe_space
from fastlvm.evaluation.findings import FAULT, LEVELS, OK, WARNING, Finding
from fastlvm.evaluation.ranker import Pools, Ranker
from fastlvm.files import write_json

__all__ = ["Diagnosis", "diagnose"]

FORMAT = "fastlvm-diagnosis"
VERSION = 1


@dataclass(frozen=True)
class Diagnosis:
    """Findings by section, in the order of the checks; `about` says what was looked at."""

    about: Mapping[str, Any]
    sections: Mapping[str, Sequence[Finding]]

    @property
    def findings(self) -> list[Finding]:
        """All of them, faults first and then warnings."""
        found = [finding for findings in self.sections.values() for finding in findings]
        return sorted(found, key=lambda finding: LEVELS.index(finding.level))

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == FAULT]

    @property
    def verdict(self) -> str:
        """The worst fault in a sentence, or that there is none and what was seen."""
        faults = self.faults
        if faults:
            more = len(faults) - 1
            also = f" (and {more} more fault{'s' if more > 1 else ''})" if more else ""
            return f"{faults[0].sentence}{also}"
        main = [finding.sentence for finding in self.findings if finding.code in ("aligned", "articles-apart", "ranks")]
        warnings = sum(finding.level == WARNING for finding in self.findings)
        warned = f"; {warnings} warning{'s' if warnings > 1 else ''}" if warnings else ""
        return f"no fault found: {'; '.join(main)}{warned}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; an undefined figure is null."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "verdict": self.verdict,
            "faults": [finding.code for finding in self.faults],
            **self.about,
            "sections": {name: [one.to_dict() for one in findings] for name, findings in self.sections.items()},
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the diagnosis as JSON, atomically."""
        write_json(path, self.to_dict())


def diagnose(
    payload: Payload,
    held: HeldWindows,
    models: Sequence[Ranker] = (),
    index: Path | None = None,
    *,
    split: str = "test",
    sample: int = 2000,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Diagnosis:
    """Look for everything that is known to make the figures of an evaluation worthless.

    split: whose windows are ranked, and compared with the training articles; a file without splits is looked at whole.
    sample: most windows of it, a seeded draw. Without a model the whitened recency mixture is ranked. index: a folder.
    say is called with what is about to be done. Raises InputError where there is no such split, or no window in it.
    """
    drawn = draw(held, split, sample, seed)
    say("comparing windows with the payload")
    aligned = check_alignment(held, drawn, payload, seed)
    sections: dict[str, list[Finding]] = {"alignment": aligned.findings}
    sections["vectors"] = check_vectors(drawn, payload, seed)
    say("looking for duplicates and leaks")
    sections["duplicates"] = check_duplicates(drawn, payload)
    sections["splits"] = check_splits(held, drawn, payload, split)
    if index is not None:
        say("searching the index")
        sections["index"] = check_index(index, payload, seed)
    sections["space"] = describe_space(payload, seed)
    say("fitting forward and backward")
    sections["direction"] = direction(payload, held.context, seed)
    rows = aligned.rows[drawn.asked & (aligned.rows[:, -1] >= 0)]
    sections["models"] = _models(payload, rows, models, unseen=split != "train", seed=seed, say=say)
    about = {
        "payload": {"path": str(payload.path), "id": payload.id, "rows": len(payload), "dim": payload.dim},
        "windows": {
            "path": str(held.path),
            "kind": held.kind,
            "count": held.count,
            "context": held.context,
            "split": None if held.split is None else split,
            "drawn": int(np.count_nonzero(drawn.asked)),
        },
        "seed": seed,
    }
    return Diagnosis(about, sections)


def _models(
    payload: Payload,
    rows: np.ndarray,
    models: Sequence[Ranker],
    *,
    unseen: bool,
    seed: int,
    say: Callable[[str], None],
) -> list[Finding]:
    """Findings about the models, or the mixture, on windows of payload rows [n, L + 1]."""
    pools = Pools(payload)
    rankers = list(models)
    reference = None if rankers else Reference.of(payload, rows.shape[1] - 1, seed)
    if reference is not None:
        say("fitting the mixture")
        rankers = [reference.mixture(pools, seed)]
    if not len(rows) or not rankers:
        what = "no window of the split is a whole run of the payload" if not len(rows) else "there is nothing to fit on"
        return [Finding("ranks-not-measured", OK, f"nothing was ranked: {what}", {})]
    findings = []
    for ranker in rankers:
        say(f"ranking {ranker.name}")
        found = check_ranker(ranker, pools, rows, unseen=unseen)
        findings += found
        if found[0].code != "model-bad-output":
            findings.append(order_sensitivity(ranker, pools, rows, seed))
    return findings
