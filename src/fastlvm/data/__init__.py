"""Payloads, windows over them and the space they are searched in: numpy and pyarrow, never torch."""

from __future__ import annotations

from fastlvm.data.payload import Payload
from fastlvm.data.predecessor import import_ordered, import_payload
from fastlvm.data.provenance import Provenance
from fastlvm.data.space import Space
from fastlvm.data.windows import Alignment, Windows

__all__ = ["Alignment", "Payload", "Provenance", "Space", "Windows", "import_ordered", "import_payload"]
