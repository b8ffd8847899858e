"""What a ranker did on every window, and the folder that keeps it, so that an interrupted evaluation goes on."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastlvm.data import npz
from fastlvm.errors import InputError
from fastlvm.evaluation.impostors import Impostors
from fastlvm.evaluation.ranks import Ranks
from fastlvm.files import atomic_file, sha256_json

_FORMAT = "fastlvm-ranks-1"


@dataclass(frozen=True)
class Listed:
    """Places of the truth among the chunks an index lists, context rows left out; `MISS` where it is not among them.

    rank int64 [n]: of the truth, for the prediction; target int64 [n]: of the truth, for its own vector as the query,
    nothing left out. about: the index, and what reorders its list.
    """

    about: str
    k: int
    rank: np.ndarray
    target: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """One ranker on n windows: its ranks, those within the truth's own article int64 [n], and cosines float64 [n].

    kind, keys, space, note: as in `Ranker`, the space by its id. domain: "in" where the ranker was made from this
    payload, else "out". units int64 [n]: the articles or groups that are resampled. impostors and listed: of models
    alone.
    """

    name: str
    kind: str
    keys: bool
    space: str
    note: str
    domain: str
    ranks: Ranks
    within: np.ndarray
    cosine: np.ndarray
    units: np.ndarray
    impostors: Impostors | None = None
    listed: Listed | None = None
    findings: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


_TEXTS = ("name", "kind", "keys", "space", "note", "domain")


class Store:
    """Outcomes in a folder, by what they are of. folder None keeps nothing."""

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        self._folder, self._about = folder, dict(about)

    def path(self, identity: str) -> Path | None:
        """The file for what `identity` names, evaluated as this store is about."""
        if self._folder is None:
            return None
        return self._folder / f"{sha256_json({**self._about, 'of': identity})[:16]}.npz"

    def put(self, identity: str, outcomes: Sequence[Outcome]) -> None:
        """Keep the outcomes, whole or not at all."""
        path = self.path(identity)
        if path is None:
            return
        meta = {"format": _FORMAT, "about": self._about, "of": identity, "outcomes": [_meta(one) for one in outcomes]}
        with atomic_file(path) as temporary, npz.Writer(temporary) as writer:
            writer.array("meta", np.array([json.dumps(meta)]))
            for at, one in enumerate(outcomes):
                for name, array in _arrays(one).items():
                    writer.array(f"{at}.{name}", array)

    def get(self, identity: str) -> list[Outcome] | None:
        """What was kept; None where nothing was, or what is there cannot be read."""
        path = self.path(identity)
        return None if path is None or not path.is_file() else _read(path, self._about)


def read_all(folder: Path, about: Mapping[str, Any]) -> list[Outcome]:
    """Every outcome a folder keeps of evaluations that these entries are about, of whichever state of a model."""
    return [one for path in sorted(folder.glob("*.npz")) for one in _read(path, about) or []]


def _meta(one: Outcome) -> dict[str, Any]:
    listed = None if one.listed is None else {"about": one.listed.about, "k": one.listed.k}
    there = {"findings": list(one.findings), "listed": listed, "impostors": one.impostors is not None}
    return {**{name: getattr(one, name) for name in _TEXTS}, **there}


def _arrays(one: Outcome) -> dict[str, np.ndarray]:
    arrays = {
        "excluded": one.ranks.excluded,
        "included": one.ranks.included,
        "within": one.within,
        "cosine": one.cosine,
        "units": one.units,
    }
    if one.impostors is not None:
        arrays |= {f"impostor_{name}": array for name, array in one.impostors._asdict().items()}
    if one.listed is not None:
        arrays |= {"listed_rank": one.listed.rank, "listed_target": one.listed.target}
    return arrays


def _read(path: Path, about: Mapping[str, Any]) -> list[Outcome] | None:
    """None for a file that is about something else, or cannot be read."""
    try:
        with npz.Archive(path) as archive:
            meta = json.loads(str(archive.array("meta").reshape(-1)[0]))
            if meta["format"] != _FORMAT or not about.items() <= meta["about"].items():
                return None
            return [_outcome(archive, f"{at}.", one) for at, one in enumerate(meta["outcomes"])]
    except (InputError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
        return None


def _outcome(archive: npz.Archive, head: str, meta: Mapping[str, Any]) -> Outcome:
    def array(name: str) -> np.ndarray:
        return archive.array(head + name)

    impostors = None
    if meta["impostors"]:
        impostors = Impostors(*(array(f"impostor_{name}") for name in Impostors._fields))
    listed = meta["listed"]
    return Outcome(
        **{name: meta[name] for name in _TEXTS},
        ranks=Ranks(array("excluded"), array("included")),
        within=array("within"),
        cosine=array("cosine"),
        units=array("units"),
        impostors=impostors,
        listed=None if listed is None else Listed(**listed, rank=array("listed_rank"), target=array("listed_target")),
        findings=tuple(meta["findings"]),
    )
