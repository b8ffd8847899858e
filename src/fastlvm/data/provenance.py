"""What a payload is and where it comes from: the content of `payload.json`."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

from fastlvm import __version__
from fastlvm.errors import IntegrityError
from fastlvm.files import sha256_json

FORMAT = 1
"""Version of the payload folder's layout."""


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The record kept beside the vectors of a payload.

    norm: "l2_once" (every row has length 1) or "as_given". metric: "ip", the inner product. dtype: of the stored
    vectors. texts_sha256: None where the payload has no texts. created_at: UTC, ISO 8601. tool and version: what wrote
    the folder. normalised, dropped, duplicates: rows scaled to length 1, repeated rows left out, rows whose vector an
    earlier row has too. notices: what was changed on the way in, as sentences.
    """

    encoder: str
    dim: int
    norm: str
    metric: str
    rows: int
    dtype: str
    vectors_sha256: str
    keys_sha256: str
    texts_sha256: str | None
    source: str
    tool: str
    version: str
    created_at: str
    normalised: int
    dropped: int
    duplicates: int
    notices: list[str]

    @property
    def payload_id(self) -> str:
        """16 hex digits over everything that decides what a search returns."""
        content = {
            name: getattr(self, name)
            for name in ("encoder", "dim", "norm", "metric", "rows", "vectors_sha256", "keys_sha256")
        }
        return sha256_json(content)[:16]

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON keeps it, with its id and the layout's version."""
        return {"format": FORMAT, "id": self.payload_id, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, raw: Any, path: object) -> Provenance:
        """Check and take what `path` (named in errors) holds. Raises IntegrityError."""
        if not isinstance(raw, dict):
            raise IntegrityError(f"{path} is not a payload's record: restore it or build the payload again")
        if raw.get("format") != FORMAT:
            raise IntegrityError(
                f"{path} has layout {raw.get('format')!r}, and this fastlvm reads {FORMAT}: build the payload again"
            )
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = raw.get(field.name)
            if not _fits(value, str(field.type)):
                raise IntegrityError(
                    f"{path} has {field.name} = {value!r}, and wants {field.type}: build the payload again"
                )
            values[field.name] = value
        record = cls(**values)
        if raw.get("id") != record.payload_id:
            raise IntegrityError(
                f"{path} carries id {raw.get('id')!r}, and its own content gives {record.payload_id}: "
                "it was edited; restore it or build the payload again"
            )
        return record


def _fits(value: Any, kind: str) -> bool:
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if kind == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, str) or (kind == "str | None" and value is None)


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def version() -> str:
    """Version of fastlvm that writes a file."""
    return __version__
