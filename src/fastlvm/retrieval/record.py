"""index.json: what an index was built from and how, what was measured then, and the SHA-256 of its other files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlvm.errors import InputError, IntegrityError, shown
from fastlvm.files import (
    ID,
    Entries,
    holds_digests,
    read_json,
    sha256_file,
    sha256_json,
    whole_number,
    write_json,
    wrong_entry,
)
from fastlvm.retrieval.kinds import KINDS
from fastlvm.retrieval.measure import Point
from fastlvm.retrieval.searcher import SETTINGS, Shape

FORMAT = "fastlvm-index"
VERSION = 3
SPACE, REMOVED, JOURNAL = "space.safetensors", "removed.npy", "journal.bin"
REMEDY = "build the index again"

_FILES = {"keys.npy", "groups.npy"}
_SOMETIMES = {SPACE, REMOVED}
_POINT: Entries = {
    "rows": whole_number(1),
    "recall_at_50": ("a share", lambda value: _share(value)),
    "ms": ("a time", lambda value: isinstance(value, float) and value >= 0),
}
_ENTRIES: Entries = {
    **dict.fromkeys(("id", "payload_id", "space_id"), ID),
    **dict.fromkeys(("rows", "dim"), whole_number(1)),
    **dict.fromkeys(("added", "removed"), whole_number(0)),
    "kind": (f"one of {', '.join(KINDS)}", lambda value: isinstance(value, str) and value in KINDS),
    "recall_at_50": ("a share or null", lambda value: value is None or _share(value)),
    "seed": whole_number(0),
    "curve": (
        f"a list of points of {', '.join(Point._fields)}",
        lambda value: isinstance(value, list) and all(isinstance(one, dict) and _is_point(one) for one in value),
    ),
}


@dataclass(frozen=True)
class Meta:
    """What index.json says beside the hashes.

    rows: of the payload. added: rows that came to them later; removed: how many of all these are gone.
    """

    payload_id: str
    space_id: str
    kind: str
    rows: int
    dim: int
    nlist: int | None
    nprobe: int | None
    ef_search: int | None
    recall_at_50: float | None
    seed: int
    curve: tuple[Point, ...]
    added: int = 0
    removed: int = 0

    def shape(self, count: int, gone: int = 0) -> Shape:
        """What the files of a searcher have to fit that got `count` vectors, `gone` of which were removed."""
        setting = KINDS[self.kind].SETTING
        return Shape(self.dim, count, self.nlist, None if setting is None else getattr(self, setting), gone)

    @property
    def id(self) -> str:
        """Of what it was built from and how: not of the curve, which holds times, nor of what changed since."""
        later = ("curve", "added", "removed")
        return sha256_json({name: value for name, value in vars(self).items() if name not in later})[:16]


@dataclass(frozen=True)
class Recorded:
    """What `read` found: the entries, the hashes of the other files by name, and the checksum of all this."""

    meta: Meta
    files: dict[str, str]
    checksum: str


def write(path: Path, meta: Meta) -> str:
    """index.json of a folder that holds every other file; its checksum."""
    files = {file.name: sha256_file(file) for file in sorted(path.iterdir())}
    entries = vars(meta) | {"curve": [point._asdict() for point in meta.curve], "sha256": files}
    content = {"format": FORMAT, "version": VERSION, "id": meta.id, **entries}
    checksum = sha256_json(content)
    write_json(path / "index.json", content | {"checksum": checksum})
    return checksum


def read(path: Path) -> Recorded:
    """index.json, checked against its own checksum.

    Raises InputError where there is none, IntegrityError where it is damaged or says what no index can be.
    """
    file = path / "index.json"
    if not file.is_file():
        raise InputError(f"{path} holds no index (index.json is missing): build one with fastlvm index build")
    try:
        content = read_json(file)
    except InputError as error:
        raise IntegrityError(f"{error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise IntegrityError(f"{file} is not an index of fastlvm: build one with fastlvm index build")
    if content.get("version") not in (2, VERSION):
        found = shown(content.get("version"))
        raise IntegrityError(f"{file} has version {found}, and {VERSION} is wanted: build it again")
    checksum = sha256_json({name: value for name, value in content.items() if name != "checksum"})
    if content.get("checksum") != checksum:
        raise IntegrityError(f"{file} is damaged, its checksum does not fit: {REMEDY}")
    if content["version"] == 2:  # before there was growth
        content |= {"added": 0, "removed": 0}
    wrong = wrong_entry(content, _ENTRIES) or wrong_entry(content, _of_kind(content["kind"]))
    if wrong:
        raise IntegrityError(f"{file} lacks what an index records ({wrong}): {REMEDY}")
    if content["nprobe"] is not None and content["nprobe"] > content["nlist"]:
        raise IntegrityError(f"{file} has nprobe {content['nprobe']} of {content['nlist']} lists: {REMEDY}")
    entries = {name: content[name] for name in Meta.__dataclass_fields__}
    meta = Meta(**entries | {"curve": tuple(Point(**point) for point in content["curve"])})
    if meta.id != content["id"]:
        raise IntegrityError(f"{file} has id {content['id']}, and its entries make {meta.id}: {REMEDY}")
    return Recorded(meta, content["sha256"], checksum)


def _share(value: Any) -> bool:
    return isinstance(value, float) and 0 <= value <= 1


def _is_point(entry: dict[str, Any]) -> bool:
    """Whether it is a point of a curve as `save` writes it."""
    kind = entry.get("kind")
    if set(entry) != set(Point._fields) or not isinstance(kind, str) or kind not in KINDS:
        return False
    return not wrong_entry(entry, {**_POINT, **_options(kind)})


def _options(kind: str) -> Entries:
    """The options that a kind has, and null for those of others."""
    names = {name for name, there in (("nlist", KINDS[kind].LISTS), (KINDS[kind].SETTING, True)) if there}
    null: tuple[str, Callable[[Any], bool]] = ("null", lambda value: value is None)
    return {name: whole_number(1) if name in names else null for name in ("nlist", *SETTINGS)}


def _of_kind(kind: str) -> Entries:
    """Entries that depend on the kind."""
    files = {*_FILES, *KINDS[kind].FILES}
    return {
        **_options(kind),
        "sha256": (
            f"the hashes of {', '.join(sorted(files))} and perhaps {', '.join(sorted(_SOMETIMES))}",
            lambda value: holds_digests(value) and files <= set(value) <= files | _SOMETIMES,
        ),
    }
