"""Payloads, windows over them and the space they are searched in: numpy and pyarrow, never torch."""

from __future__ import annotations

from fastlvm.data.groups import group_rows
from fastlvm.data.payload import Payload
from fastlvm.data.predecessor import import_ordered, import_payload
from fastlvm.data.provenance import Provenance
from fastlvm.data.remap import Rekeyed, align_windows, remap_windows
from fastlvm.data.space import Space
from fastlvm.data.windows import Alignment, Windows

__all__ = [
    "Alignment",
    "Payload",
    "Provenance",
    "Rekeyed",
    "Space",
    "Windows",
    "align_windows",
    "group_rows",
    "import_ordered",
    "import_payload",
    "remap_windows",
]
